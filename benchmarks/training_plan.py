"""The plan of the training study: its arms, what they spend, what is measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from latentrevise.demo.data import Split
from latentrevise.recovery.guards import GuardConfig, pass_at_k

UNGUARDED = GuardConfig(
    leak_weight=None,
    min_derivation_tokens=None,
    min_tokens=None,
    min_plain_logprob=None,
    max_text_nll=None,
    told=False,
    max_mention=None,
)
RUNS: dict[str, dict[str, Any]] = {
    "guarded": {"strategies": ("latent-plausible", "pivot")},
    "unguarded": {"strategies": ("latent", "resample"), "samples": 16, "guards": UNGUARDED},
}
# What people would use instead, as published: without our guards, with as many samples as `fresh-resampled`.
RIVAL_RUN: dict[str, Any] = {
    "strategies": ("self-hint", "retry", "evocot", "step-checked"),
    "samples": 16,
    "guards": UNGUARDED,
}
SFT = {  # arm: the run and the strategy that its own half comes from
    "ordinary": ("guarded", ""),
    "fresh-resampled": ("unguarded", "resample"),
    "smuggled": ("unguarded", "latent"),
    "latent-plausible": ("guarded", "latent-plausible"),
    "pivot": ("guarded", "pivot"),
    "latent": ("unguarded", "latent"),
}
SFT_RIVALS = {name: ("rivals", name) for name in RIVAL_RUN["strategies"]}


@dataclass(frozen=True)
class Arm:
    """An RLVR arm. repair: the strategy. published: repair by the settings of ``paper-grpo``. group: rollouts a prompt,
    in those of plain GRPO. equal_to: the arm whose repair is paid in rollouts. distill: OPSD or SDPO in place of GRPO.
    trainer: further arguments of TRL's."""

    repair: str = "none"
    loss: str = "trl"
    published: bool = False
    group: float = 1.0
    dynamic: int = 0
    equal_to: str = ""
    distill: Literal["", "opsd", "sdpo"] = ""
    trainer: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class PrefixArm(Arm):
    """Its prompts end within the trajectories of ``starts``, the longest first, the prompts alone last: RL from
    prefixes (PrefixRL, arXiv 2601.18795) by a curriculum (EvoCoT, arXiv 2508.07809)."""

    starts: str = "pivot"


RLVR = {
    "grpo": Arm(),
    "grpo n=16": Arm(group=2.0),
    "dapo": Arm(dynamic=3, trainer=(("loss_type", "dapo"), ("epsilon_high", 0.28))),
    "opsd": Arm(distill="opsd"),
    "sdpo": Arm(distill="sdpo"),
    "grpo + latent": Arm("latent", published=True),
    "grpo = latent": Arm(equal_to="grpo + latent"),
    "grpo + pivot": Arm("pivot"),
    "grpo = pivot": Arm(equal_to="grpo + pivot"),
    "grpo + latent-plausible": Arm("latent-plausible"),
    "grpo = latent-plausible": Arm(equal_to="grpo + latent-plausible"),
    "oc + pivot": Arm("pivot", "oc"),
} | {name: Arm(loss=name) for name in ("nsr", "w_reinforce", "sign", "topr", "rl_zvp", "lens", "verifree")}
# Their rows take the place of one failed row, as all repairs do, behind the plain prompt (NuRL regenerates the group).
RLVR_RIVALS: dict[str, Arm] = {
    "grpo + self-hint": Arm("self-hint"),
    "grpo = self-hint": Arm(equal_to="grpo + self-hint"),
    "grpo + evocot": Arm("evocot"),
    "grpo = evocot": Arm(equal_to="grpo + evocot"),
    "grpo + step-checked": Arm("step-checked"),
    "grpo = step-checked": Arm(equal_to="grpo + step-checked"),
    "prefix-rl": PrefixArm(),
}
PUBLISHED: dict[str, tuple[tuple[float, float] | None, ...]] = {  # arXiv 2606.29938, trained on zero-hit prompts
    # pass@1, pass@32 over four benchmarks: Qwen2.5-1.5B-Instruct, Qwen3-8B-Base; DAPO was run on all prompts alone
    "start": ((16.05, 46.67), (18.24, 64.36)),
    "grpo": ((14.65, 44.84), (19.43, 62.75)),
    "grpo n=16": ((17.71, 50.69), (21.01, 58.90)),
    "dapo": (None, None),
    "opsd": ((7.07, 40.42), (16.09, 60.36)),
    "latent": ((17.62, 50.50), (21.26, 64.46)),
    "grpo + latent": ((18.13, 53.51), (22.58, 65.14)),
}
ARMS = {"start": ("start",), "sft": (*SFT, *SFT_RIVALS), "rlvr": (*RLVR, *RLVR_RIVALS)}
METRICS: dict[str, Callable[[int, int, int], float]] = {  # of samples, correct, valid
    "valid@1": lambda n, correct, valid: valid / n,
    "pass@1": lambda n, correct, valid: correct / n,
    "pass@8": lambda n, correct, valid: pass_at_k(n, correct, 8),
}

COSTS = ("different", "valid_rows", "tokens", "recovered_rows", "repair_s", "repair_passes", "sampled_tokens", "group")
COSTS += ("train_s",)


@dataclass(frozen=True)
class Sizes:
    """What a cell spends.

    mined: prompts to train on, zero-hit or not. rows: an SFT arm's own rows, and ordinary ones besides. sft_steps,
    sft_batch (rows), sft_rate: of its training. rl_steps, rl_groups (prompts a step), group (rollouts a prompt),
    rl_rate. judged: prompts that judge, of ``split``; samples: of each.
    """

    mined: int = 320
    rows: int = 96
    sft_steps: int = 48
    sft_batch: int = 16
    sft_rate: float = 3e-4
    rl_steps: int = 24
    rl_groups: int = 8
    group: int = 8
    rl_rate: float = 3e-4
    judged: int = 192
    samples: int = 16
    split: Split = "report"


QUICK = Sizes(mined=32, rows=8, sft_steps=2, sft_batch=8, rl_steps=2, rl_groups=2, judged=8, samples=8)


def plan() -> list[Any]:
    """What tells one study from another, besides its sizes: the arms. Those of the rivals can be added to a study that
    was begun without them: each of their cells has its own (``defined``)."""
    return [SFT, {name: asdict(arm) for name, arm in RLVR.items()}]


def defined(kind: str, arm: str) -> dict[str, Any]:
    """What a rival's cell was made by: its arm's definition. Nothing for the arms that ``plan`` holds."""
    found = {"sft": SFT_RIVALS, "rlvr": RLVR_RIVALS}.get(kind, {}).get(arm)
    if found is None:
        return {}
    return {"defined": json.loads(json.dumps(asdict(found) if isinstance(found, Arm) else found))}
