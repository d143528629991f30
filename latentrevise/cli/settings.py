"""``latentrevise config``: every setting with its default, as commented YAML or as a JSON schema for editors."""

from __future__ import annotations

import dataclasses
import importlib
import re
import textwrap
import types
import typing
from typing import Any, Literal

from latentrevise.errors import ConfigError

# What each command reads.
GROUPS = {
    "recover": "latentrevise.recovery.settings:RecoverConfig",
    "eval": "latentrevise.recovery.evaluate:EvalRunConfig",
    "sft": "latentrevise.train.sft:SFTSettings",
    "rlvr": "latentrevise.train.settings:RLVRSettings",
    "groups": "latentrevise.train.offline:GroupSettings",
    "distill": "latentrevise.train.distill:DistillSettings",
}
WIDTH = 100


def settings_of(command: str) -> type:
    """The dataclass of a command's settings. Raises ConfigError for a command that has none."""
    if command not in GROUPS:
        raise ConfigError(f"no settings of {command!r}; choose one of {', '.join(GROUPS)}")
    module, name = GROUPS[command].split(":")
    return getattr(importlib.import_module(module), name)


def commented_yaml(cls: type) -> str:
    """Defaults as a YAML file that ``--config`` reads back as they are, each setting under what it means."""
    return "\n".join(_yaml(cls, _defaults(cls), 0)) + "\n"


def _yaml(cls: type, values: dict[str, Any], depth: int) -> list[str]:
    import yaml

    indent, meaning, lines = "  " * depth, meanings(cls), []
    for name, value in values.items():
        if name in meaning:
            lines += textwrap.wrap(
                meaning[name], WIDTH - len(indent), initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# "
            )
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            own = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
            lines += [f"{indent}{name}:", *_yaml(type(value), own, depth + 1)]
        else:
            plain = list(value) if isinstance(value, tuple) else value
            text = yaml.safe_dump([plain], default_flow_style=True, width=10**6).strip()
            lines.append(f"{indent}{name}: {text[1:-1]}")
    return lines


def meanings(cls: type) -> dict[str, str]:
    """Setting -> what the docstrings of its class, and of those it inherits from, say of it.

    A docstring names settings as ``name: text`` or ``name, other: text``; what stands before the next such place is
    theirs.
    """
    found: dict[str, str] = {}
    for base in cls.__mro__:
        if not dataclasses.is_dataclass(base) or not base.__doc__ or base.__doc__.startswith(f"{base.__name__}("):
            continue
        names = {f.name for f in dataclasses.fields(base)}
        text = " ".join(base.__doc__.split())
        places = [
            (match.start(), match.end(), own)
            for match in re.finditer(r"\b(\w+(?:, \w+)*): ", text)
            if (own := [name for name in match[1].split(", ") if name in names])
        ]
        ends = [*(start for start, _, _ in places[1:]), len(text)]
        for (_, begin, own), end in zip(places, ends, strict=False):
            for name in own:
                found.setdefault(name, text[begin:end].strip().removesuffix(";").strip())
    return found


def json_schema(cls: type, title: str) -> dict[str, Any]:
    """A JSON schema (draft 2020-12) of a settings file; unknown names are not allowed."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": f"latentrevise {title}"}
    return schema | _object(cls, _defaults(cls))


def _object(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    hints, meaning, properties = typing.get_type_hints(cls), meanings(cls), {}
    for name, value in values.items():
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            own = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
            properties[name] = _object(type(value), own)
        else:
            properties[name] = _typed(hints[name]) | {"default": list(value) if isinstance(value, tuple) else value}
        if name in meaning:
            properties[name]["description"] = meaning[name]
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _typed(hint: Any) -> dict[str, Any]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_typed(argument) for argument in arguments]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is tuple:
        return {"type": "array", "items": _typed(arguments[0])}
    if origin is dict or hint is dict:
        return {"type": "object"}
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _object(hint, _defaults(hint)) | {"required": [f.name for f in dataclasses.fields(hint)]}
    names = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}
    return {"type": names[hint]} if hint in names else {}


def _defaults(cls: type) -> dict[str, Any]:
    values = {}
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        if field.default is not dataclasses.MISSING:
            values[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            values[field.name] = field.default_factory()
    return values
