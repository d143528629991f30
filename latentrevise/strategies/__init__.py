"""Ways to recover a zero-hit prompt, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from latentrevise.checkers.loading import StepChecker, load
from latentrevise.errors import ConfigError
from latentrevise.revise.hull import TextRule
from latentrevise.revise.revision import ReviseConfig
from latentrevise.strategies.base import Choice, Cut, Proposal, Strategy, Tools, Work
from latentrevise.strategies.beam import Beam
from latentrevise.strategies.branch_checked import BranchChecked
from latentrevise.strategies.branching import Branching
from latentrevise.strategies.candidates import ForkConfig
from latentrevise.strategies.dart import Dart, DartConfig
from latentrevise.strategies.evocot import EvoCoT, EvoCoTConfig
from latentrevise.strategies.explain import Explain, ExplainConfig
from latentrevise.strategies.gcg import GCG, GCGConfig
from latentrevise.strategies.hint import Hint, HintConfig
from latentrevise.strategies.intervene import Intervene, InterveneConfig
from latentrevise.strategies.latent import Latent, Window
from latentrevise.strategies.pair import Pair, PairConfig, PairRandom
from latentrevise.strategies.pivot import Pivot, PivotConfig, PivotRandom
from latentrevise.strategies.pivot_checked import PivotChecked
from latentrevise.strategies.resample import Resample, ResamplePrefix
from latentrevise.strategies.retry import Retry, RetryConfig
from latentrevise.strategies.self_hint import SelfHint, SelfHintConfig
from latentrevise.strategies.step_checked import StepChecked, StepCheckedConfig

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
    return ReviseConfig(
        hull="plausible",
        solver="entropic",
        step_size=2.0,
        step_rule="constant",
        explore_weight=0.0,
        fluency_weight=0.0,
        reduction="mean",
        stop_guide=None,
        special_vertices=False,
        iterate="best",
        rounding="argmax",
    )


def _softmax() -> ReviseConfig:
    return ReviseConfig(solver="softmax", mass=0.1, step_size=2.0, step_rule="constant")


def _posterior() -> PivotConfig:
    return PivotConfig(scope="all", order="mass", mass_weight=1.0)


@dataclass(frozen=True, kw_only=True)
class StrategySettings:
    """The settings of every strategy that has any; each field is one strategy's, or one family of strategies'.

    latent: the published method; its ablations change it by one thing each. rho: where they cut a failed rollout.
    window: what ``latent-plausible`` revises, see ``Latent``. step_checker: ``module:attribute`` of a function (prompt,
    what was written before, one step) to true, false or None (it can't say); code of yours, imported by name. It serves
    ``step-checked``, ``branch-checked``, ``pivot-checked``, ``intervene`` and the guard ``false-step``.
    """

    latent: ReviseConfig = field(default_factory=ReviseConfig)
    latent_plausible: ReviseConfig = field(default_factory=_plausible)
    rho: float = 0.8
    window: Window = "prefix"
    forks: ForkConfig = field(default_factory=ForkConfig)
    pivot: PivotConfig = field(default_factory=PivotConfig)
    pivot_trie: PivotConfig = field(default_factory=_posterior)
    pair: PairConfig = field(default_factory=PairConfig)
    latent_softmax: ReviseConfig = field(default_factory=_softmax)
    explain: ExplainConfig = field(default_factory=ExplainConfig)
    self_hint: SelfHintConfig = field(default_factory=SelfHintConfig)
    retry: RetryConfig = field(default_factory=RetryConfig)
    intervene: InterveneConfig = field(default_factory=InterveneConfig)
    evocot: EvoCoTConfig = field(default_factory=EvoCoTConfig)
    hint: HintConfig = field(default_factory=HintConfig)
    gcg: GCGConfig = field(default_factory=GCGConfig)
    dart: DartConfig = field(default_factory=DartConfig)
    step_checked: StepCheckedConfig = field(default_factory=StepCheckedConfig)
    step_checker: str | None = None


def _published(
    name: str, settings: StrategySettings, *, rho: float | None = None, text: TextRule = "inner-product", **changes: Any
) -> Latent:
    """The published method, or an ablation of it: what of its settings is changed."""
    config = replace(settings.latent, **changes)
    rho = settings.rho if rho is None else rho
    return Latent(name, config, uses_answer=config.guide_weight > 0, forks=settings.forks, rho=rho, text=text)


def _ours(name: str, settings: StrategySettings, window: Window) -> Latent:
    return Latent(name, settings.latent_plausible, window=window, forks=settings.forks)


def load_step_checker(settings: StrategySettings) -> StepChecker | None:
    """What ``step_checker`` names; None for None. Raises ConfigError if it cannot be imported."""
    return None if settings.step_checker is None else load(settings.step_checker, "step_checker")


def _needed_checker(name: str, settings: StrategySettings) -> StepChecker:
    check = load_step_checker(settings)
    if check is None:
        raise ConfigError(
            f"strategy {name} needs a step_checker, such as latentrevise.checkers.arithmetic:check_step for word"
            " problems; name one, or leave the strategy out"
        )
    return check


def _checked(name: str, settings: StrategySettings) -> dict[str, Any]:
    """What the strategies are made of that fork where steps hold."""
    check = _needed_checker(name, settings)
    return {"forks": settings.forks, "steps": settings.step_checked, "step_checker": check}


_STRATEGIES: dict[str, Callable[[StrategySettings], Strategy]] = {
    "latent": lambda s: _published("latent", s),
    "latent-nearest": lambda s: _published("latent-nearest", s, text="nearest"),
    "latent-adam": lambda s: _published("latent-adam", s, solver="adam"),
    "latent-no-guide": lambda s: _published("latent-no-guide", s, guide_weight=0.0),
    "latent-no-explore": lambda s: _published("latent-no-explore", s, explore_weight=0.0),
    "latent-no-fluency": lambda s: _published("latent-no-fluency", s, fluency_weight=0.0),
    "latent-rho0.5": lambda s: _published("latent-rho0.5", s, rho=0.5),
    "latent-rho0.2": lambda s: _published("latent-rho0.2", s, rho=0.2),
    "latent-k5": lambda s: _published("latent-k5", s, steps=5),
    "latent-k20": lambda s: _published("latent-k20", s, steps=20),
    "latent-random": lambda s: _published("latent-random", s, solver="random"),
    "latent-softmax": lambda s: Latent("latent-softmax", s.latent_softmax, rho=s.rho, text="inner-product"),
    "latent-plausible": lambda s: _ours("latent-plausible", s, s.window),
    "latent-window": lambda s: _ours("latent-window", s, "entropy"),
    "explain": lambda s: Explain(s.explain),
    "self-hint": lambda s: SelfHint(s.self_hint),
    "retry": lambda s: Retry("retry", s.retry.shown, "retry.shown"),
    "retry-told": lambda s: Retry("retry-told", s.retry.told, "retry.told"),
    "intervene": lambda s: Intervene(s.intervene, s.forks.banned, load_step_checker(s)),
    "evocot": lambda s: EvoCoT(s.evocot, s.forks.banned),
    "hint": lambda s: Hint(s.hint),
    "gcg": lambda s: GCG(s.gcg),
    "step-checked": lambda s: StepChecked(s.step_checked, s.forks.banned, _needed_checker("step-checked", s)),
    "dart": lambda s: Dart(s.dart),
    "pivot": lambda s: Pivot("pivot", s.forks, s.pivot),
    "pivot-trie": lambda s: Pivot("pivot-trie", s.forks, s.pivot_trie),
    "pivot-checked": lambda s: PivotChecked(config=s.pivot_trie, **_checked("pivot-checked", s)),
    "pivot-random": lambda s: PivotRandom(s.forks, s.pivot),
    "branch-mass": lambda s: Branching("branch-mass", s.forks, "mass"),
    "branch-checked": lambda s: BranchChecked(**_checked("branch-checked", s)),
    "branch-entropy": lambda s: Branching("branch-entropy", s.forks, "entropy"),
    "resample-new": lambda s: Branching("resample-new", s.forks, "draw"),
    "pivot-pair": lambda s: Pair("pivot-pair", s.forks, s.pair),
    "pivot-pair-linear": lambda s: Pair("pivot-pair-linear", s.forks, replace(s.pair, exhaustive=0)),
    "pivot-beam": lambda s: Beam("pivot-beam", s.forks, s.pair),
    "pair-random": lambda s: PairRandom("pair-random", s.forks, s.pair),
    "resample-rho0.8": lambda s: ResamplePrefix("resample-rho0.8", 0.8),
    "resample-rho0.5": lambda s: ResamplePrefix("resample-rho0.5", 0.5),
    "resample-rho0.2": lambda s: ResamplePrefix("resample-rho0.2", 0.2),
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
