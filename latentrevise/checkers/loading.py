"""What a setting names by ``module:attribute``, imported; and what is called under such a name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, Protocol

from latentrevise.errors import ConfigError


class Derivation(Protocol):
    """What a checker returns: whether the derivation holds, and its steps, each with ``text`` and ``ok``."""

    valid: bool
    steps: Sequence[Any]


Checker = Callable[[str, str, str, str], Derivation]  # (prompt, prefix, continuation, answer)

StepChecker = Callable[[str, str, str], bool | None]
"""(prompt, what was written before, one step) to whether the step holds; None: it can't say. It reads no answer."""


def load(name: str, setting: str) -> Any:
    """What ``module:attribute`` names, imported. Raises ConfigError, with the setting's name, if it cannot be."""
    module, colon, attribute = name.partition(":")
    try:
        if not colon:
            raise AttributeError("no colon in it")
        found: Any = import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"{setting} = {name!r} can't be imported ({error}); write it as package.module:function"
        ) from error
    return found
