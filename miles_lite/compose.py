"""hydra YAML and overrides -> one frozen Config; whatever is mistyped is answered by name."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from miles_lite import foreign
from miles_lite.config import Config, ConfigError, SourceConfig
from miles_lite.untrusted import short

T = TypeVar("T")

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def compose(overrides: Sequence[str]) -> Config:
    """The configuration of `experiment=NAME [key=value ...]`. Raises ConfigError."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    names = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
    chosen = [o.split("=", 1)[1] for o in overrides if o.startswith("experiment=")]
    if len(chosen) != 1 or chosen[0] not in names:
        raise ConfigError(
            f"say which experiment: experiment=NAME, with NAME one of {', '.join(names)}"
            + (f"; not {chosen[0]!r}{_nearest(chosen[0], names)}" if chosen else "")
        )
    overrides = [_checked_override(override) for override in overrides]
    ConfigStore.instance().store(name="knobs", node=_defaults(Config))
    # in YAML, ${project:}/... names a file of this project wherever the user stands
    OmegaConf.register_new_resolver("project", lambda: str(CONFIGS.parent), replace=True)
    # ${share:0.2,${...}} is a whole number, a share of another key
    OmegaConf.register_new_resolver("share", lambda part, of: int(part * of), replace=True)
    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            composed = hydra_compose("train", overrides)
        raw = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(str(error).strip()) from None
    assert isinstance(raw, dict)
    named = {str(key): value for key, value in raw.items()}
    return build(Config, named | {"experiment": chosen[0]}, "")


def build(cls: type[T], raw: Mapping[str, Any], path: str) -> T:
    """A frozen dataclass from plain values; unknown, missing or ill-typed keys are ConfigErrors."""
    hints = get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}  # pyright: ignore[reportArgumentType]
    for key in raw:
        if key not in known:
            raise ConfigError(f"unknown key {path}{key}{_nearest_key(key, path, list(known))}")
    values = {}
    for name, entry in known.items():
        value = raw.get(name, "???")
        if isinstance(value, str) and value == "???":
            if entry.default is MISSING and entry.default_factory is MISSING:
                raise ConfigError(f"{path}{name} has no value: set {path}{name}=...")
            continue
        values[name] = _convert(value, hints[name], path + name)
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{path.rstrip('.') or 'config'}: {error}") from None


def _convert(value: Any, hint: Any, path: str) -> Any:
    """`value` as type `hint`, or a ConfigError naming the key."""
    if is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path} = {value!r} is not a section of keys")
        return build(hint, value, path + ".")  # pyright: ignore[reportArgumentType]
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        if value not in args:
            own = foreign.own_value(path, value)
            near = f"; {own} here" if own else _nearest(str(value), [str(a) for a in args])
            raise ConfigError(f"{path} = {value!r} is not one of {', '.join(map(str, args))}{near}")
        return value
    if origin in (Union, UnionType):
        return None if value is None else _convert(value, args[0], path)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{path} = {value!r} is not a list: write {path}=[{value}]")
        return tuple(_convert(entry, args[0], path) for entry in value)
    if origin is dict:
        if args[1] is SourceConfig and isinstance(value, str):
            value = {_source_name(value): {"path": value}} if value else {}
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path} = {value!r} is not a mapping")
        if is_dataclass(args[1]):
            return {str(name): _convert(v, args[1], f"{path}.{name}") for name, v in value.items()}
        return dict(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:  # of an integer with hundreds of digits
            raise ConfigError(f"{path} is more than any number that a float holds") from None
        if math.isnan(number):  # it would pass every comparison with a bound
            raise ConfigError(f"{path} = {value} is no number")
        return number
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{path} = {value!r} is {type(value).__name__}, wanted {hint.__name__}")


def _source_name(path: str) -> str:
    """`train` of data/train.jsonl[:100]."""
    return path.split("[")[0].split("?")[0].rstrip("@/").rsplit("/", 1)[-1].split(".")[0]


def _defaults(cls: Any) -> dict[str, Any]:
    """All knobs of a dataclass with their defaults, "???" where there is none, for hydra."""
    node: dict[str, Any] = {}
    hints = get_type_hints(cls)
    for entry in fields(cls):
        hint = hints[entry.name]
        if is_dataclass(hint):
            node[entry.name] = _defaults(hint)
        elif entry.default is not MISSING:
            default = entry.default
            node[entry.name] = str(default) if isinstance(default, Path) else default
        elif entry.default_factory is not MISSING:
            node[entry.name] = entry.default_factory()
        else:
            node[entry.name] = "???"
    return node


def _checked_override(override: str) -> str:
    """Refuse a mistyped key with the nearest name, and what is no override at all (hydra's own
    messages name neither)."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    key, equals, value = override.partition("=")
    if not (key and equals):
        own, lacks = _called_here(key), "key" if equals else "'='"
        raise ConfigError(
            f"override {override!r} has no {lacks}: write key=value" + f", here {own}" * bool(own)
        )
    if "[" in value and value[0] not in "[{'\"":
        override = f"{key}='{value}'"  # rows of a file, which hydra would take for a list
    try:
        OverridesParser.create().parse_override(override)
    except (HydraException, ValueError) as error:  # ValueError: a number of thousands of digits
        told = str(error).partition("\n")[0]
        raise ConfigError(
            f"override {short(override)} cannot be read ({told[:200]}): text with spaces, quotes "
            f"or brackets goes into quotes, {key}='...'"
        ) from None
    groups = {path.name for path in CONFIGS.iterdir() if path.is_dir()} - {"hardware"}
    if key in groups:
        return override
    cls: Any = Config
    parts = key.lstrip("+~").split(".")
    for depth, part in enumerate(parts):
        names = [f.name for f in fields(cls)]
        if part not in names:
            where = ".".join([*parts[:depth], ""])
            raise ConfigError(f"unknown key {key}{_nearest_key(key, where, names)}")
        hint = get_type_hints(cls)[part]
        if get_origin(hint) is dict:
            return "++" + override.lstrip("+")  # an open map: its keys are new by nature
        if not is_dataclass(hint):
            break
        cls = hint
    return override


def _nearest_key(key: str, where: str, names: Sequence[str]) -> str:
    """What is called so elsewhere, else a name of the section or one spelt alike anywhere."""
    if own := _called_here(key):
        return f"; here it is {own}"
    part = key.lstrip("+~").removeprefix(where).split(".")[0]
    if near := difflib.get_close_matches(part, names, n=1, cutoff=0.5):
        return f"; did you mean {where}{near[0]}?"
    known = _keys_by_name()
    near = difflib.get_close_matches(_name(key), known, n=1, cutoff=0.6)
    return f"; did you mean {known[near[0]]}?" if near else ""


def _called_here(key: str) -> str:
    """Our key for what has that name in another section or another framework; or ""."""
    return foreign.own_key(_name(key)) or _keys_by_name().get(_name(key), "")


def _name(key: str) -> str:
    """weight_decay of optim.weight_decay or --weight-decay."""
    return key.rsplit(".", 1)[-1].lstrip("+-~").replace("-", "_")


def _keys_by_name() -> dict[str, str]:
    return {_name(key): key for key in all_keys(Config)}


def all_keys(cls: Any, prefix: str = "") -> list[str]:
    keys = []
    for name, hint in get_type_hints(cls).items():
        keys += all_keys(hint, f"{prefix}{name}.") if is_dataclass(hint) else [prefix + name]
    return keys


def _nearest(name: str, known: Sequence[str]) -> str:
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {match[0]}?" if match else ""
