"""Ways to recover a zero-hit prompt, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from latentrevise.errors import ConfigError
from latentrevise.revision import ReviseConfig
from latentrevise.strategies.base import Cut, Proposal, Strategy, Tools, Work
from latentrevise.strategies.latent import Latent
from latentrevise.strategies.resample import Resample, ResamplePrefix

__all__ = [
    "Cut",
    "Latent",
    "Proposal",
    "Resample",
    "ResamplePrefix",
    "Strategy",
    "StrategySettings",
    "Tools",
    "Work",
    "build",
    "names",
]


def _plausible() -> ReviseConfig:
    return ReviseConfig(hull="plausible", solver="entropic", step_size=2.0, beta=0.0, iterate="best", rounding="argmax")


@dataclass(frozen=True, kw_only=True)
class StrategySettings:
    """The settings of every strategy that has any; each field is one strategy's, or one family of strategies'."""

    latent: ReviseConfig = field(default_factory=ReviseConfig)
    latent_plausible: ReviseConfig = field(default_factory=_plausible)


_STRATEGIES: dict[str, Callable[[StrategySettings], Strategy]] = {
    "latent": lambda s: Latent("latent", s.latent),
    "latent-plausible": lambda s: Latent("latent-plausible", s.latent_plausible),
    "resample-prefix": lambda s: ResamplePrefix(),
    "resample": lambda s: Resample(),
}


def names() -> list[str]:
    """Every strategy that can be asked for."""
    return list(_STRATEGIES)


def build(name: str, settings: StrategySettings) -> Strategy:
    """The strategy of that name. Raises ConfigError for a name that is none."""
    if name not in _STRATEGIES:
        raise ConfigError(f"unknown strategy {name!r}; choose from {', '.join(names())}")
    return _STRATEGIES[name](settings)
