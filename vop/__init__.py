"""vop: which photographs see the same thing.

    import vop
    run = vop.register(images="photos", output="run")
    print(run.summary())

Every command of the command line is a function here and takes the same keys.
"""

from collections.abc import Iterable


def _command(name: str):
    def call(config: Iterable[str] = (), **keys: object):
        from vop import config as configuration
        from vop import pipeline

        files = [config] if isinstance(config, str) else list(config)
        return getattr(pipeline, name)(configuration.load(files, **keys))

    call.__name__ = name
    call.__doc__ = f"""Run `vop {name.replace("_", "-")}`.

    Args:
        config: YAML files, or one; later files win.
        keys: settings as on the command line, sections as dictionaries: `retrieval={{"k": 5}}`.

    Returns the record of the run (`vop.run.Run`). Raises `vop.config.ConfigError` for an unknown or impossible setting.
    """
    return call


embed = _command("embed")
register = _command("register")
retrieve = _command("retrieve")
match = _command("match")
relative_pose = _command("relative_pose")
localize = _command("localize")
reconstruct = _command("reconstruct")
train = _command("train")
export_matches = _command("export_matches")
import_hloc = _command("import_hloc")
status = _command("status")
plan = _command("plan")
report = _command("report")
demo = _command("demo")
export_h5 = _command("export_h5")
import_h5 = _command("import_h5")
