"""``evocot``: rationales written from the gold answer, given from the longest part of one to the shortest.

After EvoCoT (arXiv 2508.07809): the policy explains the answer it is told; an explanation that does not come to it is
dropped; training then goes over the question and the explanation's steps, fewer of them from stage to stage, dropped
from the end. Here each stage is a start: what is sampled behind it is verified, and the row is the kept steps and the
continuation behind the plain question. EvoCoT's last stage, with no step left, is ``resample``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from latentrevise.config import at_least_one
from latentrevise.data.records import decoded, row_seed
from latentrevise.strategies.asking import ask, check_places, write
from latentrevise.strategies.base import Proposal, Tools, Work
from latentrevise.strategies.candidates import Reader, charged, spread
from latentrevise.strategies.explain import ExplainConfig
from latentrevise.strategies.steps import steps_of


@dataclass(frozen=True)
class EvoCoTConfig:
    """template: asks for a rationale, with ``{prompt}``, ``{answer}`` and, if it likes, ``{form}``; that of
    ``explain``. rationales: sampled for each prompt. stages: starts of each, from all of its steps but the last down to
    the first alone, evenly spread where it has more."""

    template: str = ExplainConfig().template
    rationales: int = 2
    stages: int = 4

    def __post_init__(self) -> None:
        check_places(self, "template", "prompt", "answer")
        at_least_one(self, "rationales", "stages")


@dataclass(frozen=True)
class EvoCoT:
    """The longest starts first; where samples are fewer than starts, the shortest get none."""

    config: EvoCoTConfig
    banned: tuple[str, ...]
    name: str = "evocot"
    uses_answer: bool = True
    backend: str = "none"

    def propose(self, tools: Tools, work: Sequence[Work], samples: int) -> list[list[Proposal]]:
        config, reader = self.config, Reader(tools, work[0].template_ids, self.banned)
        asked = [ask(tools, item, "evocot.template", config.template, answer=item.target) for item in work]
        seeds = [row_seed(item.seed, self.name) for item in work]
        proposals = []
        for item, texts, compute in zip(work, *write(tools, asked, seeds, n=config.rationales), strict=True):
            starts: dict[tuple[int, ...], int] = {}  # how many steps are dropped
            for written in texts:
                steps = steps_of(reader, written.ids)
                if item.target.strip() not in decoded(tools.tokenizer, written.ids[len(steps.ids) :]):
                    continue  # it comes to another answer, or to none
                for kept in stages(len(steps), config.stages):
                    starts.setdefault(steps.before(kept), len(steps) - kept)
            ordered = sorted(starts, key=lambda ids: starts[ids])
            made = spread([Proposal(n=1, plain_ids=ids) for ids in ordered], samples)
            proposals.append(charged(made, samples, compute))
        return proposals


def stages(steps: int, most: int) -> list[int]:
    """How many of ``steps`` are kept in each of at most ``most`` stages: all but one, and evenly down to one."""
    longest = steps - 1
    count = min(most, longest)
    if count <= 1:
        return [longest] * count
    return [round(longest - i * (longest - 1) / (count - 1)) for i in range(count)]
