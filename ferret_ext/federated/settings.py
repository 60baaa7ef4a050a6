"""Dataclasses as settings: dotted keys, what values they take, and where these come from.

A field made by `option` has a help text and limits. Its dotted key (`training.learning_rate`) is at once the
field's path, its place in a YAML file, its override and its flag.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

Setting = tuple[str, Any]  # dotted key and value
C = TypeVar("C")


class ConfigError(ValueError):
    """A setting that does not exist or fit; the text names its key, what was expected and what it got."""


def option(
    default: Any,
    help: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
) -> Any:
    limits = {"at_least": at_least, "above": above, "at_most": at_most}
    return field(default=default, metadata={"help": help, "limits": limits})


@dataclass(frozen=True)
class Leaf:
    """One setting: a field of the config or of one of its sections."""

    key: str
    hint: Any
    default: Any
    help: str
    limits: Mapping[str, float | None]


def leaves(cls: type, prefix: str = "") -> Iterator[Leaf]:
    """All settings, in the order of the fields."""
    hints = get_type_hints(cls)
    for item in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[item.name]):
            yield from leaves(hints[item.name], f"{prefix}{item.name}.")
        else:
            yield Leaf(
                f"{prefix}{item.name}",
                hints[item.name],
                item.default,
                item.metadata["help"],
                item.metadata["limits"],
            )


def fill(cls: type[C], settings: Iterable[Setting]) -> C:
    """A dataclass with these settings; a later one wins over an earlier one. Raises ConfigError."""
    known = {leaf.key: leaf for leaf in leaves(cls)}
    values = {}
    for key, value in settings:
        if key not in known:
            raise ConfigError(_unknown(key, value, known))
        values[key] = _convert(known[key], value)
    filled: C = _construct(cls, values, "")
    return filled


def flatten(section: Mapping[str, Any], prefix: str = "") -> Iterator[Setting]:
    """A nested mapping as dotted settings."""
    for name, value in section.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice; YAML takes the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key for key, _ in node.value]
        for place, key in enumerate(keys):
            if key.value in [before.value for before in keys[:place]]:
                problem = f"the key {key.value!r} a second time"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> list[Setting]:
    """The settings of a YAML file. Raises ConfigError."""
    try:
        content = yaml.load(path.read_text("utf-8"), _Loader)  # a safe one
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"config file {path}: expected readable YAML, got: {one_line(error)}") from None
    if not isinstance(content, Mapping):
        raise ConfigError(f"config file {path}: expected `key: value` lines, got {type(content).__name__}")
    return list(flatten(content))


def one_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def read_override(text: str) -> Setting:
    """`key=value` as a setting. Raises ConfigError."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"override {text!r}: expected key=value, e.g. rounds=5 or ferret.K=4096")
    return key.strip(), value


def nearest(key: str, known: Iterable[str]) -> list[str]:
    """The known keys that end with this one, else the one that is spelled most like it, if any is."""
    keys = list(known)
    ends = [name for name in keys if name.lower().endswith(f".{key.lower()}")]
    return ends or closest(key, keys)


def closest(word: str, known: Iterable[str]) -> list[str]:
    """The known word that is nearest to this one, whatever its capitals; none if nothing is near."""
    by_small = {name.lower(): name for name in known}
    return [by_small[name] for name in difflib.get_close_matches(word.lower(), by_small, n=1)]


def expected(leaf: Leaf) -> str:
    """In words, which values a setting takes."""
    return _describe(leaf.hint, leaf.limits)


def _describe(hint: Any, limits: Mapping[str, float | None]) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_describe(option, limits) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return " or ".join(get_args(hint))
    if get_origin(hint) is tuple:
        return f"none or, with commas between them, {_describe(get_args(hint)[0], limits)}"
    if hint in (int, float):
        kind = "an integer" if hint is int else "a number" if limits["at_most"] else "a finite number"
        return f"{kind} {_bounds(limits)}".rstrip()
    return {str: "text", bool: "true or false"}.get(hint, "none")


def _bounds(limits: Mapping[str, float | None]) -> str:
    signs = {"at_least": ">=", "above": ">", "at_most": "<="}
    return " and ".join(
        f"< 2^{limit.bit_length()}"  # all that many bits hold
        if isinstance(limit, int) and limit >= 2**31
        else f"{signs[name]} {limit:g}"
        for name, limit in limits.items()
        if limit is not None
    )


def _convert(leaf: Leaf, value: Any) -> Any:
    """The value in the setting's type. Text is read as a value too: YAML takes 1e-4 for text."""
    options = get_args(leaf.hint) if get_origin(leaf.hint) in (Union, types.UnionType) else (leaf.hint,)
    for option in sorted(options, key=lambda option: option is str):
        try:
            converted = _read_as(option, value)
        except (ValueError, OverflowError):
            continue
        if _within(converted, leaf.limits):
            return converted
        break
    near = closest(value, _words(leaf.hint)) if isinstance(value, str) else []
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(f"{leaf.key}: expected {expected(leaf)}, got {value!r}{hint}")


def _words(hint: Any) -> Iterator[str]:
    """The words that a type takes, alone or among other things."""
    if get_origin(hint) is Literal:
        yield from get_args(hint)
    else:
        for part in get_args(hint):
            yield from _words(part)


def _read_as(hint: Any, value: Any) -> Any:
    """The value as one plain type; ValueError if it is none of it."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is type(None) and (value is None or value in ("none", "null")):
        return None
    if get_origin(hint) is Literal and value in get_args(hint):
        return value
    if get_origin(hint) is tuple:
        return tuple(dict.fromkeys(_read_as(get_args(hint)[0], item) for item in _items(value)))
    if hint is bool and value in (True, False, "true", "false"):
        return value in (True, "true")
    if hint is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    if hint is int and (isinstance(value, str) or (is_number and value == int(value))):
        return int(value)
    if hint is float and (isinstance(value, str) or is_number):
        return float(value)
    raise ValueError


def _items(value: Any) -> list[Any]:
    """A list, or one as text: `a,b`, `none` or nothing."""
    if isinstance(value, str):
        items = [item.strip() for item in value.split(",")]
        return [] if items in ([""], ["none"], ["null"]) else items
    if value is None or isinstance(value, (list, tuple)):
        return list(value or [])
    raise ValueError


def _within(value: Any, limits: Mapping[str, float | None]) -> bool:
    if not isinstance(value, (int, float)):
        return True
    low, above, high = limits["at_least"], limits["above"], limits["at_most"]
    finite = value - value == 0
    return (
        finite
        and (low is None or value >= low)
        and (above is None or value > above)
        and (high is None or value <= high)
    )


def _unknown(key: str, value: Any, known: Mapping[str, Leaf]) -> str:
    inside = [name for name in known if name.startswith(f"{key}.")]
    if inside:
        return f"{key}: expected a section with the keys {', '.join(inside)}, got {value!r}"
    near = nearest(key, known)
    hint = f"; did you mean {' or '.join(near)}?" if near else "; ferret simulate --help lists all"
    return f"{key}: no such setting (got {value!r}){hint}"


def _construct(cls: Any, values: Mapping[str, Any], prefix: str) -> Any:
    arguments = {}
    hints = get_type_hints(cls)
    for item in dataclasses.fields(cls):
        key = f"{prefix}{item.name}"
        if dataclasses.is_dataclass(hints[item.name]):
            arguments[item.name] = _construct(hints[item.name], values, f"{key}.")
        elif key in values:
            arguments[item.name] = values[key]
    return cls(**arguments)
