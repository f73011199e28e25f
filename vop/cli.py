"""The command line: `vop COMMAND [--config FILE...] [key=value...] [--dry-run]`."""

import argparse
import signal
import sys
import threading
import traceback

from vop import config
from vop.config import Config, ConfigError
from vop.exit_codes import DONE, MEANINGS, described, exit_code, reason

COMMANDS = {
    "embed": "bring a store of descriptors up to date with a collection",
    "register": "pair every image of a collection with those that see the same thing",
    "retrieve": "rank the database images of every query",
    "match": "match the local features of listed pairs, or of those that it registers first",
    "relative-pose": "judge pairs by the relative poses that their matches give",
    "localize": "estimate the poses of queries from a database whose poses are known",
    "reconstruct": "make a COLMAP model, or several, of a collection",
    "train": "train the encoder on images whose overlaps are known, or on warped copies of any images",
    "export-matches": "write the features and matches of a finished run for hloc, or as a COLMAP database",
    "import-hloc": "make stores of the features and matches that hloc wrote, for matching.method=imported",
    "status": "tell how far the run in a directory is, while it runs and after it died: vop status DIR",
    "plan": "say what a collection would take on a cluster: hours, memory, disk, bottleneck; refuse what cannot fit",
    "report": "write report.html of a finished run again",
    "demo": "render rooms with known overlaps, register them, print precision and recall",
    "export-h5": "write a store in the layout of the original's overlap_feats.h5",
    "import-h5": "make a store from a file in that layout",
}
JOBS = (  # what `vop submit` takes
    *("embed", "register", "retrieve", "match", "relative-pose", "localize", "reconstruct", "train", "demo"),
)
SUBMIT = "run one of the commands as a job on a Ray cluster and follow it"
EXAMPLES = """examples:
  vop register images=photos output=run
  vop register images=photos output=run backbone=dinov2_vitl14 retrieval.k=40
  vop retrieve queries=phone database=map output=run --config my.yaml
  vop status run               how far it is, while it runs and after it died
  vop submit register --address http://HEAD:8265 images=s3://bucket/photos output=s3://bucket/run
  vop register --help          every key, its meaning and its default

exit codes:
""" + "\n".join(f"  {code:<4} {meaning}" for code, meaning in MEANINGS.items())


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = argparse.ArgumentParser(
        prog="vop",
        description="Which photographs see the same thing: visual place recognition by overlap prediction.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    keys = "\n".join(f"  {key}={_shown(default)}\n      {meaning}" for key, meaning, default in config.documented())
    for name, purpose in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=purpose,
            description=f"vop {name}: {purpose}.",
            epilog=f"keys and their defaults:\n{keys}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _add_settings(command)
    _add_submit(commands)
    return top


def _add_settings(command: argparse.ArgumentParser) -> None:
    command.add_argument("overrides", nargs="*", metavar="key=value", help="settings, see the list below")
    command.add_argument("--config", nargs="+", action="extend", default=[], metavar="FILE", help="YAML files")
    command.add_argument("--dry-run", action="store_true", help="print the resolved config and stop")


def _add_submit(commands) -> None:
    command = commands.add_parser(
        "submit",
        help=SUBMIT,
        description=f"vop submit: {SUBMIT}. Paths must be URIs, or absolute on storage that every node mounts; config "
        "files are read here. Uploads the working directory, at most 100 MB, without images, data, environments and "
        "what .gitignore and .rayignore name. The exit code is that of the job; interrupting it leaves the job alone.",
        epilog="the settings are those of the command: vop register --help",
    )
    command.add_argument("job", choices=JOBS, help="the command to run")
    _add_settings(command)
    command.add_argument("--address", required=True, help="the dashboard of the cluster, http://HEAD:8265")
    command.add_argument("--working-dir", default=".", metavar="DIR", help="folder to upload (default: this one)")
    command.add_argument("--no-working-dir", dest="working_dir", action="store_const", const=None,
                         help="upload nothing; enough without a dataset.format of one's own")  # fmt: skip
    command.add_argument("--python", default="python", help="the interpreter with vop on the nodes (default: python)")
    command.add_argument("--no-wait", action="store_true", help="leave as soon as the job is submitted")


def _shown(default: object) -> str:
    if default is None or isinstance(default, bool):
        return {None: "null", True: "true", False: "false"}[default]
    return str(default)


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns its exit code (`vop.exit_codes`).

    On a cluster the last lines are the status, the place of the result and, if it failed, the reason.
    """
    options, rest = (commands := parser()).parse_known_args(arguments)
    # `--config a.yaml key=value`: the option takes what follows it, and an override is told by its equals sign; what
    # comes after another option than the first, argparse leaves.
    if unknown := [text for text in rest if text.startswith("-") or "=" not in text]:
        commands.error(f"unrecognized arguments: {' '.join(unknown)}")
    files = [text for text in options.config if "=" not in text]
    overrides = [*options.overrides, *(text for text in options.config if "=" in text), *rest]
    if options.command == "status":  # `vop status DIR`
        overrides = [text if "=" in text else f"output={text}" for text in overrides]
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupted)  # of a scheduler or `ray job stop`: told like Ctrl-C
    resolved, code, why = None, DONE, ""
    try:
        if options.command == "submit":
            return _submitted(options, config.load(files, [*overrides, "cluster.address=auto"]))
        resolved = config.load(files, overrides)
        if options.dry_run:
            print(config.to_yaml(resolved), end="")
            return DONE
        from vop import pipeline  # Ray and torch take seconds to import; --help and --dry-run need neither

        run = getattr(pipeline, options.command.replace("-", "_"))(resolved)
        print(run.summary(), flush=True)
    except (Exception, KeyboardInterrupt) as error:
        code, why = exit_code(error), reason(error)
        told = f"vop {options.command} failed: {why}"
        if isinstance(error, ConfigError):
            told = f"vop: {why}"
        elif isinstance(error, KeyboardInterrupt):
            told = "vop: interrupted; the same command continues where it stopped"
        elif not isinstance(error, (ValueError, OSError, RuntimeError, ImportError)):
            traceback.print_exc()
        print(told, file=sys.stderr, flush=True)
    if any(text.startswith("cluster.address=") for text in overrides) or (resolved and resolved.cluster.address):
        print(_verdict(options.command, code, resolved, why), flush=True)
    return code


def _submitted(options: argparse.Namespace, resolved: Config) -> int:
    from vop.stages import submit

    if options.dry_run:
        print(f"{config.to_yaml(resolved)}# {submit.command_line(options.job, resolved, options.python)}")
        return DONE
    return submit.submit(
        options.job, resolved, options.address, options.working_dir, options.python, not options.no_wait
    )


def _verdict(command: str, code: int, resolved: Config | None, why: str) -> str:
    """The last lines of a job."""
    lines = [f"status     vop {command}: exit code {described(code)}"]
    if resolved is not None:
        lines.append(f"result     {resolved.store_path if command == 'embed' else resolved.output}")
    return "\n".join([*lines, *([f"reason     {why}"] if code else [])])


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
