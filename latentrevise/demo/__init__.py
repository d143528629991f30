"""Checkable task families with tiny models, for the offline demo, the recovery study and tests.

*rule* is built to suit answer-driven revision, *chain* is its negative control, and *pair* takes two decisions at once.
See the modules rule, chain and joint.  Their models are bundled; those of pair's variants are trained on demand.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from latentrevise.demo.chain import ChainFamily
from latentrevise.demo.data import make_prompts, split_of
from latentrevise.demo.family import Derivation, Family, Settings, Step, Trace
from latentrevise.demo.joint import JointFamily
from latentrevise.demo.rule import RuleFamily
from latentrevise.errors import ConfigError, InputError, ModelError

__all__ = [
    "BUNDLED",
    "Derivation",
    "Family",
    "Settings",
    "Step",
    "Trace",
    "check",
    "families",
    "family_of",
    "get_family",
    "make_prompts",
    "model_dir",
    "split_of",
]

BUNDLED = ("rule", "chain", "pair")

_FAMILIES: tuple[Family, ...] = (
    RuleFamily(),
    ChainFamily(),
    JointFamily("pair", "AB", rules=16),
    JointFamily("pair64", "CD", rules=64),
    JointFamily("far", "HJ", rules=16, filler=4),
    JointFamily("partial", "KL", rules=16, partial=True),
)


def families() -> dict[str, Family]:
    """The task families by name."""
    return {family.name: family for family in _FAMILIES}


def get_family(name: str) -> Family:
    """The family of that name.  Raises ConfigError for an unknown one."""
    known = families()
    if name not in known:
        raise ConfigError(f"unknown demo family {name!r}; choose one of: {', '.join(known)}")
    return known[name]


def family_of(prompt: str) -> Family | None:
    """The family whose problem ``prompt`` is, or None."""
    return next((family for family in families().values() if family.accepts(prompt)), None)


def model_dir(name: str) -> Path:
    """The Hugging Face model directory bundled for a family.

    Raises:
        ConfigError: there is no such family.
        ModelError: no weights are bundled for it, or the installation lacks them.
    """
    if get_family(name).name not in BUNDLED:
        raise ModelError(
            f"no {name!r} model is bundled, only those of {', '.join(BUNDLED)}; "
            f"train one with: python -m latentrevise.demo.train --families {name}"
        )
    path = Path(str(files("latentrevise.demo"))) / "models" / name
    if not (path / "model.safetensors").is_file():
        raise ModelError(
            f"the bundled {name!r} model is missing from {path}; reinstall latentrevise, "
            f"or train it again with: python -m latentrevise.demo.train --families {name} --out {path.parent}"
        )
    return path


def check(prompt: str, prefix: str, continuation: str, answer: str) -> Derivation:
    """The checker of a prompt's own family: ``checker="latentrevise.demo:check"`` in the pipeline's settings.

    Raises InputError if the prompt is of no family.
    """
    family = family_of(prompt)
    if family is None:
        raise InputError(f"prompt {prompt!r} is of no demo family; leave out `checker` for prompts of your own")
    return family.check(prompt, prefix, continuation, answer)
