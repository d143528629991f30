"""Groups of one generation batch: verdicts, advantages, and what a loss needs to know of a row's peers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from latentrevise.data.records import decoded
from latentrevise.recovery.verdicts import before_answer
from latentrevise.train.repair import zero_hit
from latentrevise.verify.patterns import BOXED, AnswerPattern
from latentrevise.verify.verifier import Judgement, VerdictName, Verifier

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class VerifiedReward:
    """TRL's reward function: 1 for a verified answer, 0 for a wrong one, None (not scored) for an undecided one."""

    __name__ = "verified"

    def __init__(self, verifier: Verifier) -> None:
        self.verifier = verifier

    def __call__(self, completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float | None]:
        judged = judged_completions(self.verifier, answer, completions)
        return [{"correct": 1.0, "wrong": 0.0, "unknown": None}[j.verdict] for j in judged]


@dataclass(frozen=True)
class Groups:
    """The judgements of a generation batch over all processes, ``size`` rows a group, groups one after another."""

    judged: list[Judgement]
    size: int

    @property
    def verdicts(self) -> list[VerdictName]:
        return [judgement.verdict for judgement in self.judged]

    def each(self) -> list[list[VerdictName]]:
        verdicts = self.verdicts
        return [verdicts[i : i + self.size] for i in range(0, len(verdicts), self.size)]

    def zero_hit(self) -> list[int]:
        """Groups of which every row is verified wrong."""
        return [g for g, verdicts in enumerate(self.each()) if zero_hit(verdicts)]

    def rows_without_correct(self, rescues: Mapping[int, Any]) -> set[int]:
        """Rows of groups that have neither a correct row nor a rescued one."""
        rescued = {i // self.size for i in rescues}
        dead = [g for g, verdicts in enumerate(self.each()) if "correct" not in verdicts and g not in rescued]
        return {g * self.size + i for g in dead for i in range(self.size)}


def judged_completions(verifier: Verifier, answers: Sequence[str], completions: Sequence[Any]) -> list[Judgement]:
    """Of completions as TRL hands them on: texts, or lists of messages."""
    texts = [c if isinstance(c, str) else str(c[-1].get("content") or "") for c in completions]
    return verifier.verify(list(zip(map(str, answers), texts, strict=True)))


def onpolicy_advantages(rewards: Tensor, recovered: Tensor, size: int, scale: str) -> Tensor:
    """``(r - mean) / std`` of a generation batch's ``rewards [N]``, both taken from the sampled rows alone.

    rewards: NaN where undecided. recovered: ``[N]`` bool. size: rows of a group. scale: TRL's ``scale_rewards``: the
    deviation is the group's, the whole batch's, or none. A deviation of 0 counts as 1.
    """
    rewards, marked = rewards.view(-1, size), recovered.view(-1, size)
    sampled = rewards.masked_fill(marked, math.nan)
    mean = sampled.nanmean(1, keepdim=True).nan_to_num()
    centre = sampled.nanmean().nan_to_num() if scale == "batch" else mean
    squares, known = (sampled - centre) ** 2, sampled.isfinite()
    if scale == "batch":
        std = (squares.nansum() / (known.sum() - 1).clamp(min=1)).sqrt().expand_as(mean)
    else:
        std = (squares.nansum(1, keepdim=True) / (known.sum(1, keepdim=True) - 1).clamp(min=1)).sqrt()
    std = torch.ones_like(std) if scale == "none" else torch.where(std > 0, std, 1.0)
    return ((rewards - mean) / std).nan_to_num().flatten()


def peers_of(stats: Tensor, size: int) -> Tensor:
    """``[N, size, K]``: what is known of all rows of each row's group, itself first. stats: ``[N, K]``."""
    grouped = stats.view(-1, size, stats.shape[1])
    return torch.stack([grouped.roll(-i, 1) for i in range(size)], 1).flatten(0, 1)


def with_gold(
    ids: Sequence[int], answer: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int], list[int]]:
    """A row whose answer and end are the gold ones: ``(ids, reasoning, answer)``, the last two 0 or 1 for each token.

    ids: without the end. A row that comes to no ``\\boxed`` stays as it is, all of it reasoning.
    """
    text = decoded(tokenizer, ids)
    if "\\boxed" not in text:
        return list(ids), [1] * len(ids), [0] * len(ids)
    kept = list(ids[: before_answer(tokenizer, ids, text, AnswerPattern(BOXED))])
    gold = tokenizer.encode(f"\\boxed{{{answer}}}", add_special_tokens=False)
    gold += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [*kept, *gold], [1] * len(kept) + [0] * len(gold), [0] * len(kept) + [1] * len(gold)


def padded(rows: Mapping[int, Sequence[float]], like: Tensor, fill: float) -> Tensor:
    """``[B, T]`` as ``like`` is, float32: the given rows from the left, ``fill`` elsewhere."""
    out = torch.full(like.shape, fill, device=like.device)
    for i, row in rows.items():
        out[i, : len(row)] = torch.tensor(row, dtype=out.dtype)
    return out


def one_outcome(groups: Groups, kinds: Sequence[VerdictName]) -> list[int]:
    """Groups of which all rows have the same verdict, one of ``kinds``."""
    return [g for g, verdicts in enumerate(groups.each()) if len(set(verdicts)) == 1 and verdicts[0] in kinds]
