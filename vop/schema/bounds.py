"""The error of a config that no job can run with, and the checks that raise it."""


class ConfigError(ValueError):
    """A key or value that no job can run with; the message says what to write instead."""


def require(name: str, value: object, holds: bool, bound: str) -> None:
    """Raise `ConfigError`, naming the key, its value and the bound, unless it holds."""
    if not holds:
        raise ConfigError(f"{name} is {value!r}, but must be {bound}")


def positive(section: str, config: object, *names: str) -> None:
    """Require that fields of a section are null or above 0."""
    for name in names:
        value = getattr(config, name)
        require(f"{section}.{name}", value, value is None or value > 0, "greater than 0")


def local_folder(name: str, path: str | None) -> None:
    """Require that a folder is null or on a disk of every node: what is mapped into memory cannot lie in a bucket."""
    require(name, path, path is None or "://" not in path, "a folder on a local disk, which files are mapped from")
