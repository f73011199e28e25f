"""What a job is told: the schema of `vop.schema`, loaded from YAML files and `key=value` overrides.

OmegaConf checks types and merges; it never leaves this file.
"""

import ast
import dataclasses
import difflib
import inspect
import itertools
import json
import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vop import files, storage
from vop.schema import Config, ConfigError

# A trained encoder's descriptors are spread otherwise than whitened tokens: its defaults, the paper's for MegaDepth.
ENCODER_DEFAULTS = {"embedding": {"whiten": None}, "retrieval": {"radius": 0.2}}
PATHS = (
    *("images", "queries", "database", "root", "output", "store", "truth", "positions", "h5", "tokens"),
    *("cameras", "pair_list", "features", "matches", "map", "dataset.root", "export.hloc", "export.colmap"),
    *("plan.rates", "plan.file"),
    *("pair_labels", "train.labels", "train.scenes", "train.validation", "train.cache", "retrieval.cache"),
    *("localize.intrinsics", "hloc.features", "hloc.matches", "retrieval.global_descriptors"),
)
PLAIN = re.compile(r"[\w./:@+-]+")  # what needs no quotes, in YAML and in a shell
# Credentials in a URI: NAME:PASSWORD@ (but not HOST:PORT/...@), and in its query what object stores sign requests with.


def load(config_files: Iterable[str] = (), overrides: Iterable[str] = (), **values: object) -> Config:
    """Merge defaults, YAML files, keyword values and `key=value` overrides, later ones winning.

    Local paths become absolute, so that workers with another working directory find them; with a cluster address
    they must be absolute already. Raises `ConfigError` for an unknown key (with a suggestion), a value of the wrong
    type or out of bounds, a file that is missing or is not YAML, and, since a run writes its config into its directory,
    for a URI with credentials in it and for an interpolation, such as `${oc.env:NAME}`.
    """
    told = OmegaConf.create()
    sources = [*(_from_file(name) for name in config_files), ("the arguments", dict(values)), _from_dotlist(overrides)]
    for origin, source in sources:
        try:
            content = OmegaConf.create(source)
            plain = OmegaConf.to_container(content, resolve=False)
            _check_values(plain, "", origin)
            _check_keys(plain, Config, "", origin)
            told = OmegaConf.merge(told, content)
            OmegaConf.merge(OmegaConf.structured(Config), content)  # types are checked here, to name the origin
        except OmegaConfBaseException as error:
            raise ConfigError(f"{origin}: {str(error).splitlines()[0]}{_at(error)}") from error
    defaults = [OmegaConf.structured(Config)] + ([ENCODER_DEFAULTS] if told.get("encoder") else [])
    try:
        config = OmegaConf.to_object(OmegaConf.merge(*defaults, told))
    except OmegaConfBaseException as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from None
        raise ConfigError(f"{str(error).splitlines()[0]}{_at(error)}") from error
    return _with_absolute_paths(config)


def _at(error: OmegaConfBaseException) -> str:
    key = getattr(error, "full_key", None)
    return f" (key {key})" if key else ""


def _from_file(name: str) -> tuple[str, object]:
    check_uri("the name of a config file", str(name))
    try:
        return name, OmegaConf.create(files.read_bytes(name).decode())
    except FileNotFoundError as error:
        raise ConfigError(f"config file {name!r} does not exist") from error
    except Exception as error:
        raise ConfigError(f"config file {name!r} is not YAML: {error}") from error


def _from_dotlist(overrides: Iterable[str]) -> tuple[str, object]:
    overrides = list(overrides)
    for text in overrides:
        check_uri(text.split("=")[0] if "=" in text else "an argument", text)  # first: later errors show the text
        if "=" not in text:
            raise ConfigError(f"{text!r} is not an override: write key=value, such as output=run")
        try:
            OmegaConf.from_dotlist([text])
        except Exception as error:  # of the YAML parser too, which OmegaConf does not wrap
            key, _, value = text.partition("=")
            raise ConfigError(
                f"{text!r}: the value is not YAML; if it is meant as text, quote it twice: '{key}=\"{value}\"'"
            ) from error
    return "the command line", OmegaConf.from_dotlist(overrides)


def check_uri(key: str, value: str) -> None:
    """Raise `ConfigError`, which does not show it, for a URI with a password or another secret in it."""
    if storage.has_credentials(value):
        raise ConfigError(f"{key} is {storage.WITH_CREDENTIALS}")


def _check_values(content: object, key: str, origin: str) -> None:
    """Refuse what would put a secret into the config that a run writes down."""
    if isinstance(content, Mapping):
        for name, value in content.items():
            _check_values(value, f"{key}.{name}" if key else str(name), origin)
    elif isinstance(content, (list, tuple)):
        for value in content:
            _check_values(value, key, origin)
    elif isinstance(content, str):
        check_uri(f"{origin}: {key}", content)
        if "${" in content:
            raise ConfigError(f"{origin}: {key} is the interpolation {content!r}, which configs do not have: what the "
                              "environment holds may be secret. Write the value, or give it as key=value")  # fmt: skip


def _check_keys(content: object, schema: type, prefix: str, origin: str) -> None:
    if not isinstance(content, Mapping):
        raise ConfigError(f"{origin}: {prefix.rstrip('.') or 'the file'} must hold keys, but is {content!r}")
    types = typing.get_type_hints(schema)
    for key, value in content.items():
        if key not in types:
            guess = _similar(str(key), types, prefix)
            hint = f"did you mean {guess!r}?" if guess else f"known keys here: {', '.join(types)}"
            raise ConfigError(f"{origin}: unknown key {prefix + str(key)!r}; {hint}")
        if dataclasses.is_dataclass(types[key]):
            _check_keys(value, types[key], f"{prefix}{key}.", origin)


def _similar(key: str, siblings: Iterable[str], prefix: str) -> str | None:
    """The known key whose last part is most like `key`: of this section, or else of any."""
    leaves = {known.rpartition(".")[2]: known for known in reversed(KEYS)}
    leaves |= {name: f"{prefix}{name}" for name in siblings}
    close = difflib.get_close_matches(key, leaves, n=1)
    return leaves[close[0]] if close else None


def _with_absolute_paths(config: Config) -> Config:
    for name in PATHS:
        section, _, key = name.rpartition(".")
        owner = getattr(config, section) if section else config
        path = getattr(owner, key)
        if path is None:
            continue
        _check_absolute(name, path, config)
        changed = dataclasses.replace(owner, **{key: _absolute(name, path)})
        config = dataclasses.replace(config, **{section: changed}) if section else changed
    for name in ("weights", "encoder"):  # a weights name may also be a hub id, which is no path
        path = getattr(config, name)
        if path and (files.is_uri(path) or Path(path).expanduser().exists()):
            _check_absolute(name, path, config)
            config = dataclasses.replace(config, **{name: _absolute(name, path)})
    return config


def _check_absolute(name: str, path: str, config: Config) -> None:
    if config.cluster.address and not files.is_uri(path) and not Path(path).is_absolute():
        raise ConfigError(
            f"{name} is the relative path {path!r}, but the job runs on a cluster, whose processes have other "
            "working directories: give an absolute path on a file system that every node mounts, or a URI"
        )


def _absolute(name: str, path: str) -> str:
    try:
        return files.absolute(path)
    except ValueError as error:  # before the config is written anywhere
        raise ConfigError(f"{name}: {error}") from None


def to_yaml(config: Config) -> str:
    """The resolved config as YAML, in schema order."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def overrides(config: Config) -> list[str]:
    """The `key=value` that make a config: `load([], overrides(config)) == config`, on any machine."""
    usual = OmegaConf.structured(Config)
    if config.encoder is not None:
        usual = OmegaConf.merge(usual, ENCODER_DEFAULTS)
    own = OmegaConf.structured(config)
    pairs = ((key, *(OmegaConf.select(each, key) for each in (own, usual))) for key in KEYS)
    return [f"{key}={_written(value)}" for key, value, default in pairs if value != default]


def _written(value: object) -> str:
    """A value as `key=value` takes it."""
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value)
    if isinstance(value, str) and PLAIN.fullmatch(value) and OmegaConf.from_dotlist([f"text={value}"]).text == value:
        return value
    return json.dumps(value, ensure_ascii=False)


def documented(schema: type = Config, prefix: str = "") -> Iterator[tuple[str, str, object]]:
    """(key, what it means, default) of every field, nested ones as `section.key`."""
    body = ast.parse(inspect.cleandoc(inspect.getsource(schema))).body[0].body
    docs = {
        node.target.id: " ".join(ast.literal_eval(following.value).split())
        for node, following in itertools.pairwise(body)
        if isinstance(node, ast.AnnAssign) and isinstance(following, ast.Expr)
    }
    types = typing.get_type_hints(schema)
    for item in dataclasses.fields(schema):
        if dataclasses.is_dataclass(types[item.name]):
            yield from documented(types[item.name], f"{prefix}{item.name}.")
        else:
            made = item.default_factory
            yield f"{prefix}{item.name}", docs[item.name], item.default if made is dataclasses.MISSING else made()


KEYS = tuple(key for key, _, _ in documented())
