"""Names of images and lists, as files of others give them: paths that stay in their folder, or they are refused."""

from collections.abc import Iterable

from vop import files

SUSPECT = r"\.\.|^/|\x00|^[/.]*$"  # every name with a problem matches it, and few others


class UnsafeNameError(ValueError):
    """A name that leads out of the folder that it counts from."""


def problem(name: str) -> str | None:
    """Why a name cannot stand below a folder; None: it can. Backslashes are letters, as on every system but Windows."""
    if not name.strip("/."):
        return "names no file"
    if "\0" in name:
        return "holds a NUL character"
    if name.startswith("/"):
        return "is an absolute path"
    if ".." in name.split("/"):
        return "leads to a folder above (`..`)"
    return None


def checked(names: Iterable[str], source: str) -> list[str]:
    """The names, all of which stay in their folder. Raises `UnsafeNameError` that says where the first other stands."""
    names = list(names)
    for name in names:
        if wrong := problem(name):
            raise UnsafeNameError(
                f"{source} names {name!r}, which {wrong}: names must be relative paths of files below their folder. "
                "Mend the file, or do not use one that you do not know"
            )
    return names


def inside(folder: str, name: str, source: str) -> str:
    """The path of a name below a folder or URI. Raises `UnsafeNameError` as `checked` does."""
    return files.join(folder, *checked([name], source))
