"""The command line: `vop COMMAND [--config FILE...] [key=value...] [--dry-run]`."""

import argparse
import sys

from vop import config
from vop.config import ConfigError

COMMANDS = {
    "embed": "bring a store of descriptors up to date with a collection",
    "register": "pair every image of a collection with those that see the same thing",
    "retrieve": "rank the database images of every query",
    "match": "match the local features of listed pairs, or of those that it registers first",
    "relative-pose": "judge pairs by the relative poses that their matches give",
    "train": "train the encoder on images whose overlaps are known, or on warped copies of any images",
    "export-matches": "write the features and matches of a finished run for hloc, or as a COLMAP database",
    "plan": "say what a collection would take on a cluster: hours, memory, disk, bottleneck; refuse what cannot fit",
    "report": "write report.html of a finished run again",
    "demo": "render rooms with known overlaps, register them, print precision and recall",
    "export-h5": "write a store in the layout of the original's overlap_feats.h5",
    "import-h5": "make a store from a file in that layout",
}
EXAMPLES = """examples:
  vop register images=photos output=run
  vop register images=photos output=run backbone=dinov2_vitl14 retrieval.k=40
  vop retrieve queries=phone database=map output=run --config my.yaml
  vop register --help          every key, its meaning and its default
"""


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
        command.add_argument("overrides", nargs="*", metavar="key=value", help="settings, see the list below")
        command.add_argument("--config", nargs="+", action="extend", default=[], metavar="FILE", help="YAML files")
        command.add_argument("--dry-run", action="store_true", help="print the resolved config and stop")
    return top


def _shown(default: object) -> str:
    if default is None or isinstance(default, bool):
        return {None: "null", True: "true", False: "false"}[default]
    return str(default)


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 0 done, 1 failed, 2 told something impossible, 130 interrupted."""
    options = parser().parse_args(arguments)
    # `--config a.yaml key=value`: the option takes what follows it, and an override is told by its equals sign.
    files = [text for text in options.config if "=" not in text]
    overrides = [*options.overrides, *(text for text in options.config if "=" in text)]
    try:
        resolved = config.load(files, overrides)
        if options.dry_run:
            print(config.to_yaml(resolved), end="")
            return 0
        from vop import pipeline  # Ray and torch take seconds to import; --help and --dry-run need neither

        run = getattr(pipeline, options.command.replace("-", "_"))(resolved)
        print(run.summary())
        return 0
    except ConfigError as error:
        print(f"vop: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("vop: interrupted; the same command continues where it stopped", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        print(f"vop {options.command} failed: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
