"""Settings as dataclasses: to and from plain data, YAML files and ``key=value`` overrides, every value type-checked.

Works for any nesting of dataclasses whose fields are bool, int, float, str, Literal, ``X | None``, tuples of these, or
dataclasses again, or a value or a dataclass.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import yaml

from latentrevise.errors import ConfigError

Config = TypeVar("Config")
PRESETS = Path(__file__).parent / "configs"
"""Settings that come with the package: ``paper-grpo`` and ``paper-sft`` are the published ones of training."""


def require(settings: Any, **wanted: tuple[bool, str]) -> None:
    """Raises ConfigError that names the first of these settings whose condition does not hold, and what it must be."""
    for name, (holds, words) in wanted.items():
        if not holds:
            raise ConfigError(f"{type(settings).__name__}.{name} = {getattr(settings, name)!r}: it must be {words}")


def at_least_one(settings: Any, *names: str) -> None:
    """Raises ConfigError that names the first of these settings that is below 1."""
    require(settings, **{name: (getattr(settings, name) >= 1, "at least 1") for name in names})


def to_dict(config: Any) -> dict[str, Any]:
    """The settings as dicts, lists and scalars that JSON and YAML can hold."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def unlike(config: Any, other: Any) -> dict[str, Any]:
    """The settings in which two of a kind differ, with the values of the first, as ``to_dict`` gives them."""
    return _unlike(to_dict(config), to_dict(other))


def _unlike(values: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for name, value in values.items():
        other = others.get(name)
        if isinstance(value, Mapping) and isinstance(other, Mapping) and value != other:
            found[name] = _unlike(value, other)
        elif value != other:
            found[name] = value
    return found


def from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """A ``cls`` from nested mappings; fields that are not named keep their defaults.

    Raises ConfigError that names the key: unknown (with the nearest known one), or of the wrong type.
    """
    return _build(cls, None, values, "")


def load_config(cls: type[Config], path: str | os.PathLike[str] | None = None, overrides: Sequence[str] = ()) -> Config:
    """A ``cls`` from a YAML file (or none) and ``key=value`` overrides, ``a.b=value`` for nested ones.

    path: of a file, or the name of one of PRESETS where there is no such file.
    The value of an override is read as YAML: ``true``, ``3``, ``0.5``, ``null``, ``[a, b]``. Where the setting is a
    text, the value is that text as it stands (``#``, ``:``, brackets and all). But ``\\n`` and ``\\t`` are a newline
    and a tab unless a lower-case letter follows, which makes them LaTeX (``\\nu``, ``\\text``); and a text in
    quotation marks is read as YAML's. Several texts are parted by commas, or a YAML list.
    """
    values = _read_yaml(path) if path is not None else {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {override!r}: write it as key=value, for instance latent.steps=20")
        *parents, last = key.split(".")
        value = _value(text, _hint(cls, [*parents, last]), override)
        place = values
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise ConfigError(f"--set {override!r}: {parent} is a single value and has no fields")
        place[last] = value
    return from_dict(cls, values)


def _hint(cls: Any, keys: Sequence[str]) -> Any:
    """The type of a nested setting; None where there is no such one, or where it lies inside a free mapping."""
    for key in keys:
        own = next((c for c in (cls, *typing.get_args(cls)) if dataclasses.is_dataclass(c)), None)
        cls = None if own is None else typing.get_type_hints(own).get(key)
    return cls


def _value(text: str, hint: Any, override: str) -> Any:
    """The value of an override, by the type of its setting."""
    optional = type(None) in typing.get_args(hint)
    kinds = [a for a in typing.get_args(hint) if a is not type(None)] if optional else [hint]
    if kinds == [str] or (str in kinds and not text.lstrip().startswith("{")):
        return None if optional and text in ("", "null") else _text(text)
    if kinds == [tuple[str, ...]] and not text.lstrip().startswith("["):
        whole = _quoted(text)
        return [_text(part.strip()) for part in text.split(",") if part.strip()] if whole is None else [whole]
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is not YAML ({_one_line(error)}); quote it") from error
    if "#" in text and "#" not in str(value):
        raise ConfigError(f"--set {override!r}: # begins a comment in YAML, so the rest would be lost; quote the value")
    if kinds == [tuple[str, ...]] and isinstance(value, list):
        return [_escaped(item) if isinstance(item, str) else item for item in value]
    return value


def _text(text: str) -> str:
    quoted = _quoted(text)
    return _escaped(text) if quoted is None else quoted


def _quoted(text: str) -> str | None:
    """What YAML reads in a text that is in quotation marks; None for any other."""
    if len(text) < 2 or text[0] not in "'\"" or text[-1] != text[0]:
        return None
    try:
        return str(yaml.safe_load(text))
    except yaml.YAMLError:  # quotation marks within, such as 'a' or 'b'
        return None


def _escaped(text: str) -> str:
    return re.sub(r"(?<!\\)\\([nt])(?![a-z])", lambda found: {"n": "\n", "t": "\t"}[found[1]], text)


def _read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    file, preset = Path(path).expanduser(), PRESETS / f"{path}.yaml"
    file = preset if not file.exists() and preset.is_file() else file
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        names = ", ".join(sorted(p.stem for p in PRESETS.glob("*.yaml")))
        raise ConfigError(
            f"settings file {path} can't be read ({error}); check the path, or name a preset: {names}"
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"settings file {path} is not valid YAML ({_one_line(error)})") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"settings file {path} holds a {type(values).__name__}; it must be a mapping of settings")
    return values


def _build(cls: type[Config], default: Any, values: Any, path: str) -> Config:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path.rstrip('.')} = {values!r}: give a mapping of {cls.__name__} fields")
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    found: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            renamed = getattr(cls, "RENAMED", {}).get(key)
            if renamed is not None:
                raise ConfigError(f"setting {path}{key} is gone; its place is taken by {renamed}")
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {path}{near[0]}?" if near else f"known: {', '.join(known)}"
            raise ConfigError(f"unknown setting {path}{key}; {hint}")
        nested = hints[key]
        if dataclasses.is_dataclass(nested):
            # A nested mapping changes the fields it names and keeps this field's own default for the others.
            own = getattr(default, key) if default is not None else _default(known[key])
            found[key] = _build(cast(type[Any], nested), own, value, f"{path}{key}.")
        else:
            found[key] = _convert(value, nested, f"{path}{key}")
    if default is not None:
        return dataclasses.replace(default, **found)
    empty = dataclasses.MISSING
    if missing := [f.name for f in known.values() if f.name not in found and f.default is f.default_factory is empty]:
        raise ConfigError(f"{path.rstrip('.') or cls.__name__}: give its {', '.join(missing)}")
    return cls(**found)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else None


def _convert(value: Any, hint: Any, key: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        inner = [a for a in arguments if a is not type(None)]
        (chosen,) = [a for a in inner if len(inner) == 1 or dataclasses.is_dataclass(a) is isinstance(value, Mapping)]
        return _convert(value, chosen, key)
    if dataclasses.is_dataclass(hint):
        return _build(cast(type[Any], hint), None, value, f"{key}.")
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{key} = {value!r}: choose one of {', '.join(map(str, arguments))}")
        return value
    if origin is tuple:
        if isinstance(value, str) and arguments[0] is str:
            value = [part.strip() for part in value.split(",")]
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{key} = {value!r}: give a list")
        return tuple(_convert(item, arguments[0], f"{key}[{i}]") for i, item in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):
        # YAML 1.1 reads 1e-4, without a dot, as text.
        with suppress(ValueError):
            value = float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        quote = "; put it in quotation marks" if hint is str and isinstance(value, (bool, int, float)) else ""
        raise ConfigError(f"{key} = {value!r}: it must be of type {hint.__name__}{quote}")
    if isinstance(value, float) and math.isnan(value):
        raise ConfigError(f"{key} = nan: it is no number; give one")
    return value


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
