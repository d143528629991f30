"""The settings of a recovery, and what it shares with repairs inside RLVR."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from latentrevise.config import at_least_one, require
from latentrevise.data.boundary import Regex
from latentrevise.data.prompts import PromptSettings
from latentrevise.data.records import Start, original_prefix
from latentrevise.engines import SamplingParams, VLLMConfig
from latentrevise.errors import ConfigError
from latentrevise.recovery.gate import GateConfig
from latentrevise.recovery.guards import GuardConfig
from latentrevise.recovery.selection import Select
from latentrevise.strategies import StrategySettings, build
from latentrevise.verify.settings import VerifySettings


@dataclass(frozen=True, kw_only=True)
class CutSettings(StrategySettings):
    """How a zero-hit prompt is worked on, in a recovery or in a trainer; and every strategy's settings.

    samples: continuations for each prompt and strategy. revised_rollouts: failed rollouts revised for each prompt; the
    samples are spread over them.
    prefix_fraction: where a failed rollout is cut (the paper's rho; the strategy ``latent`` has a ``rho`` of its own);
    prefix_boundary: what ends a step, a text (a newline, say) or ``{regex: ...}``, in the decoded rollout: the cut is
    moved behind the nearest one.
    answer_template: text between prefix and answer under which the answer is scored; by default the
    answer pattern's, for boxes the paper's. guards: what may become a label, see ``GuardConfig``. token_budget: padded
    tokens in one batch of plain log-probs and branch scores.
    """

    samples: int = 8
    revised_rollouts: int = 1
    prefix_fraction: float = 0.8
    prefix_boundary: str | Regex | None = None
    answer_template: str | None = None
    guards: GuardConfig = field(default_factory=GuardConfig)
    token_budget: int = 16384

    def __post_init__(self) -> None:
        at_least_one(self, "samples", "revised_rollouts", "token_budget")
        if self.revised_rollouts > self.samples:
            raise ConfigError(
                f"{type(self).__name__}: {self.revised_rollouts} revised rollouts share {self.samples} samples; raise"
                " `samples` to at least `revised_rollouts`"
            )
        if not 0.0 <= self.prefix_fraction < 1.0:
            raise ConfigError(
                f"{type(self).__name__}.prefix_fraction = {self.prefix_fraction!r}: it must lie in [0, 1)"
            )
        if self.guards.min_true_steps is not None and self.step_checker is None:
            raise ConfigError(
                f"guards.min_true_steps = {self.guards.min_true_steps!r} needs a step_checker, such as"
                " latentrevise.checkers.arithmetic:check_step for word problems; name one, or set it to null"
            )


def new_tokens(setting: int | None, left: int | None) -> int:
    """Tokens that a completion may get: the setting, or 1024 (our own decision), and no more than there is room for."""
    wanted = 1024 if setting is None else setting
    return wanted if left is None else min(wanted, left)


@dataclass(frozen=True, kw_only=True)
class RoundsConfig:
    """How a prompt's samples are drawn. rounds: so many, of like size, one after another (1: all at once).
    stop_after_correct: a prompt with so many samples that are verified correct is left out of the rounds that follow.
    """

    rounds: int = 1
    stop_after_correct: int = 1

    def __post_init__(self) -> None:
        at_least_one(self, "rounds", "stop_after_correct")

    def drawn(self, samples: int, number: int) -> range:
        """Which of ``samples`` are drawn in this round (from 0)."""
        first, end = (samples * n // self.rounds for n in (number, number + 1))
        return range(first, end)


@dataclass(frozen=True, kw_only=True)
class RayConfig:
    """resources: of each Ray worker beside or in place of one CPU and, where the cluster has GPUs, one of them; such as
    ``{CPU: 8, GPU: 2}``, or a name that the cluster's nodes were started with. Torch gets as many threads as CPUs.
    """

    resources: dict = field(default_factory=dict)  # type: ignore[type-arg]  # of any names

    def __post_init__(self) -> None:
        for name, amount in self.resources.items():
            if isinstance(amount, bool) or not isinstance(amount, (int, float)) or amount < 0:
                raise ConfigError(f"ray.resources.{name} = {amount!r}: it must be a number, 0 or more")


@dataclass(frozen=True, kw_only=True)
class RecoverConfig(CutSettings, PromptSettings, VerifySettings):
    """Settings of a recovery: the pipeline's, all our own decision; those of ``CutSettings``, ``PromptSettings`` and
    ``VerifySettings``.

    strategies: by name, in the order of the table. rollouts: mined for each prompt, at most; mine: the rounds that they
    are drawn in: a prompt is zero-hit when all ``rollouts`` failed, however many there are. continuations: the rounds
    that a strategy's ``samples`` of a prompt are drawn in, see ``RoundsConfig``; an arm aimed at a wrong answer stops
    at that. The equal-compute control is drawn whole.
    temperature, top_p: of sampling. stop: strings that end a rollout. max_new_tokens: of a rollout (None: 1024, or what
    its prompt leaves of the model's positions, if that is less).
    rendering: the text that stands for a revised prefix in training rows: ``argmax`` (as the strategy writes it, in the
    loss), ``original`` (the failed tokens), ``continuation`` (as the strategy writes it, masked from the loss).
    checker: ``module:attribute`` of a derivation checker, called as (prompt, prefix, continuation, answer); code of
    yours, imported by name. audit: run the wrong-target arms. equal_compute: sample the equal-compute control;
    equal_compute_cap: at most so many rollouts a prompt.
    stop_at_success: the strategies run one after another, in their order, each on the prompts of which none before it
    brought an admitted trajectory: name the cheap ones first. select: the order of a prompt's admitted trajectories,
    equal texts once: ``first`` sampled, ``shortest``, ``surprising`` (lowest mean log-prob behind the plain prefix) or
    ``diverse`` (fewest token trigrams in common with those taken). keep: how many stay for each strategy (None: all).
    label: what the report calls this run. chunk: prompts in one part. seed: of everything random. gate: see
    ``GateConfig``. vllm: of that engine, see ``VLLMConfig``.
    deaths: a part over which so many processes died is set aside, and the run goes on without it. lease_seconds: a
    process of a shared run that has given no sign of life for so long has died. ray: see ``RayConfig``.
    """

    ELSEWHERE: ClassVar[tuple[str, ...]] = ("deaths", "lease_seconds", "ray")  # who computes, not what

    strategies: tuple[str, ...] = ("latent", "pivot", "branch-mass", "resample-prefix", "resample")
    rollouts: int = 16
    mine: RoundsConfig = field(default_factory=RoundsConfig)
    continuations: RoundsConfig = field(default_factory=RoundsConfig)
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    rendering: Literal["argmax", "original", "continuation"] = "argmax"
    checker: str | None = None
    audit: bool = True
    equal_compute: bool = True
    equal_compute_cap: int = 256
    stop_at_success: bool = False
    select: Select = "first"
    keep: int | None = None
    label: str | None = None
    chunk: int = 64
    seed: int = 0
    gate: GateConfig = field(default_factory=GateConfig)
    vllm: VLLMConfig = field(default_factory=VLLMConfig)
    deaths: int = 3
    lease_seconds: float = 120.0
    ray: RayConfig = field(default_factory=RayConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_verification()
        self.pattern().template(self.answer_template)
        at_least_one(self, "rollouts", "chunk", "equal_compute_cap", "deaths")
        for name, samples in (("mine", "rollouts"), ("continuations", "samples")):
            rounds, count = getattr(self, name).rounds, getattr(self, samples)
            if rounds > count:
                raise ConfigError(
                    f"{name}.rounds = {rounds}: {count} {samples} cannot be drawn in more rounds than there are; raise"
                    f" `{samples}`"
                )
        require(
            self,
            lease_seconds=(self.lease_seconds > 0, "a positive number"),
            max_new_tokens=(self.max_new_tokens is None or self.max_new_tokens >= 1, "at least 1, or null"),
            keep=(self.keep is None or self.keep >= 1, "at least 1, or null to keep all"),
        )
        for name in self.strategies:
            build(name, self)
        if len(set(self.strategies)) != len(self.strategies) or not self.strategies:
            raise ConfigError(f"RecoverConfig.strategies = {self.strategies!r}: name at least one, and each only once")

    def sampling(self, n: int, greedy: bool = False, left: int | None = None) -> SamplingParams:
        """How ``n`` continuations are drawn; left: positions that the model has for them."""
        return SamplingParams(
            n=n,
            temperature=0.0 if greedy else self.temperature,
            top_p=self.top_p,
            max_new_tokens=new_tokens(self.max_new_tokens, left),
            stop=self.stop,
            logprobs=True,
        )

    def rendered(self, start: Start) -> tuple[int, ...]:
        """A start's prefix as its rows show it."""
        return original_prefix(start.prefix_ids, start.plain_ids) if self.rendering == "original" else start.plain_ids
