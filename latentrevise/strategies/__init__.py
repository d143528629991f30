"""Ways to recover a zero-hit prompt, by name."""

from __future__ import annotations

from collections.abc import Mapping

from latentrevise.errors import ConfigError
from latentrevise.revision import ReviseConfig
from latentrevise.strategies.base import Cut, Proposal, Strategy, Work
from latentrevise.strategies.latent import Latent
from latentrevise.strategies.resample import Resample, ResamplePrefix

__all__ = ["Cut", "Latent", "Proposal", "Resample", "ResamplePrefix", "Strategy", "Work", "build", "names"]

PLAIN: dict[str, type[Resample] | type[ResamplePrefix]] = {"resample": Resample, "resample-prefix": ResamplePrefix}


def names(latents: Mapping[str, ReviseConfig]) -> list[str]:
    """Every strategy that can be asked for, given the configured latent ones."""
    return [*latents, *PLAIN]


def build(name: str, latents: Mapping[str, ReviseConfig]) -> Strategy:
    """The strategy of that name; ``latents`` maps the names of latent strategies to their settings."""
    if name in latents:
        return Latent(name, latents[name])
    if name in PLAIN:
        return PLAIN[name]()
    raise ConfigError(f"unknown strategy {name!r}; choose from {', '.join(names(latents))}")
