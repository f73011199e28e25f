"""Optional packages: whether they are installed, and in which version."""

import json
from importlib import metadata, util


def is_installed(module: str) -> bool:
    """Whether a module can be imported; it is not imported."""
    return util.find_spec(module) is not None


def version(distribution: str) -> str:
    """Name and version of an installed distribution, with the commit if it was installed from a repository.

    Raises `ImportError` if pip knows nothing of it.
    """
    try:
        installed = metadata.distribution(distribution)
    except metadata.PackageNotFoundError as error:
        raise ImportError(f"{distribution} is not installed by pip, so its version is unknown: install it") from error
    origin = json.loads(installed.read_text("direct_url.json") or "{}")
    commit = origin.get("vcs_info", {}).get("commit_id")
    return f"{distribution} {installed.version}" + (f" at {commit}" if commit else "")
