"""``hint``: continue a prefix of a reference solution, where the data has one.

In the style of PrefixRL (arXiv 2601.18795) and QuestA: what can be had with more than an answer, and so an upper mark
for strategies that have the answer alone. The prefix is cut by tokens, behind a step where the run knows steps, and
always in front of the boxed answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from latentrevise.errors import ConfigError, InputError
from latentrevise.strategies.base import Proposal, Tools, Work, shares

if TYPE_CHECKING:
    from latentrevise.data.records import Prompt

COLUMNS = ("solution", "reference_solution", "gold_solution", "rationale", "answer")


@dataclass(frozen=True)
class HintConfig:
    """column: of the prompts' file, with the reference solution; None: the first of COLUMNS that a prompt has.
    fractions: of the solution's tokens that are given; the samples are spread over them, the shortest hint first.
    """

    column: str | None = None
    fractions: tuple[float, ...] = (0.25, 0.5)

    def __post_init__(self) -> None:
        if not self.fractions or not all(0.0 < f < 1.0 for f in self.fractions):
            raise ConfigError(f"HintConfig.fractions = {self.fractions!r}: give one or more shares in (0, 1)")


@dataclass(frozen=True)
class Hint:
    """One proposal a fraction. It reads the solution and not the target, so the audit has no wrong target for it."""

    config: HintConfig
    name: str = "hint"
    uses_answer: bool = False
    backend: str = "none"

    def propose(self, tools: Tools, work: Sequence[Work], samples: int) -> list[list[Proposal]]:
        fractions = sorted(self.config.fractions)[:samples]
        return [
            [
                Proposal(n=n, plain_ids=prefix)
                for prefix, n in zip(
                    self._prefixes(tools, item.prompt, fractions), shares(samples, len(fractions)), strict=True
                )
            ]
            for item in work
        ]

    def _prefixes(self, tools: Tools, prompt: Prompt, fractions: Sequence[float]) -> list[tuple[int, ...]]:
        text = self._solution(prompt)
        ids = tuple(tools.tokenizer.encode(text, add_special_tokens=False))
        every = range(1, len(ids) + 1)
        ends = (tools.boundary and tools.boundary.ends(ids)) or every
        return [ids[: min(ends, key=lambda end: (abs(end - f * len(ids)), end))] for f in fractions]

    def _solution(self, prompt: Prompt) -> str:
        """The reference solution, up to its boxed answer or (GSM8K) the mark in front of it."""
        columns = COLUMNS if self.config.column is None else (self.config.column,)
        texts = [prompt.meta[column] for column in columns if isinstance(prompt.meta.get(column), str)]
        # "####" ends a solution of GSM8K; a box ends most others.
        head, box, whole = next(iter(texts), "").rsplit("####", 1)[0].rpartition("\\boxed")
        solution = (head if box else whole).strip()
        if not solution:
            raise InputError(
                f"strategy hint: prompt {prompt.id} has no reference solution in {', '.join(columns)} (its further"
                f" columns: {', '.join(prompt.meta) or 'none'}); name the column with hint.column, or leave the"
                " strategy out"
            )
        return solution
