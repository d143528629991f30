"""Ways to recover a zero-hit prompt, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from latentrevise.errors import ConfigError
from latentrevise.revise.revision import ReviseConfig
from latentrevise.strategies.base import Choice, Cut, Proposal, Strategy, Tools, Work
from latentrevise.strategies.beam import Beam
from latentrevise.strategies.branching import Branching
from latentrevise.strategies.candidates import ForkConfig
from latentrevise.strategies.dart import Dart, DartConfig
from latentrevise.strategies.explain import Explain, ExplainConfig
from latentrevise.strategies.gcg import GCG, GCGConfig
from latentrevise.strategies.hint import Hint, HintConfig
from latentrevise.strategies.latent import Latent, Window
from latentrevise.strategies.pair import Pair, PairConfig, PairRandom
from latentrevise.strategies.pivot import Pivot, PivotConfig, PivotRandom
from latentrevise.strategies.resample import Resample, ResamplePrefix

__all__ = [
    "Choice",
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


def _softmax() -> ReviseConfig:
    return ReviseConfig(solver="softmax", mass=0.1, step_size=2.0)


def _posterior() -> PivotConfig:
    return PivotConfig(scope="all", order="mass", mass_weight=1.0)


@dataclass(frozen=True, kw_only=True)
class StrategySettings:
    """The settings of every strategy that has any; each field is one strategy's, or one family of strategies'.

    window: what the latent strategies revise, see ``Latent``.
    """

    latent: ReviseConfig = field(default_factory=ReviseConfig)
    latent_plausible: ReviseConfig = field(default_factory=_plausible)
    window: Window = "prefix"
    forks: ForkConfig = field(default_factory=ForkConfig)
    pivot: PivotConfig = field(default_factory=PivotConfig)
    pivot_trie: PivotConfig = field(default_factory=_posterior)
    pair: PairConfig = field(default_factory=PairConfig)
    latent_softmax: ReviseConfig = field(default_factory=_softmax)
    explain: ExplainConfig = field(default_factory=ExplainConfig)
    hint: HintConfig = field(default_factory=HintConfig)
    gcg: GCGConfig = field(default_factory=GCGConfig)
    dart: DartConfig = field(default_factory=DartConfig)


def _latent(name: str, settings: StrategySettings, config: ReviseConfig) -> Latent:
    return Latent(name, config, window=settings.window, forks=settings.forks)


_STRATEGIES: dict[str, Callable[[StrategySettings], Strategy]] = {
    "latent": lambda s: _latent("latent", s, s.latent),
    "latent-plausible": lambda s: _latent("latent-plausible", s, s.latent_plausible),
    "latent-window": lambda s: replace(_latent("latent-window", s, s.latent_plausible), window="entropy"),
    "latent-gold": lambda s: _latent("latent-gold", s, replace(s.latent, beta=0.0)),
    "latent-away": lambda s: replace(_latent("latent-away", s, replace(s.latent, alpha=0.0)), uses_answer=False),
    "latent-random": lambda s: _latent("latent-random", s, replace(s.latent, solver="random")),
    "latent-free": lambda s: _latent("latent-free", s, replace(s.latent, solver="unconstrained")),
    "latent-softmax": lambda s: _latent("latent-softmax", s, s.latent_softmax),
    "explain": lambda s: Explain(s.explain),
    "hint": lambda s: Hint(s.hint),
    "gcg": lambda s: GCG(s.gcg),
    "dart": lambda s: Dart(s.dart),
    "pivot": lambda s: Pivot("pivot", s.forks, s.pivot),
    "pivot-trie": lambda s: Pivot("pivot-trie", s.forks, s.pivot_trie),
    "pivot-random": lambda s: PivotRandom(s.forks, s.pivot),
    "branch-mass": lambda s: Branching("branch-mass", s.forks, "mass"),
    "branch-entropy": lambda s: Branching("branch-entropy", s.forks, "entropy"),
    "pivot-pair": lambda s: Pair("pivot-pair", s.forks, s.pair),
    "pivot-pair-linear": lambda s: Pair("pivot-pair-linear", s.forks, replace(s.pair, exhaustive=0)),
    "pivot-beam": lambda s: Beam("pivot-beam", s.forks, s.pair),
    "pair-random": lambda s: PairRandom("pair-random", s.forks, s.pair),
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
