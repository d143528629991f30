"""``step-checked``: fresh rollouts, step by step; a step that the step checker calls false is sampled again.

No gold answer is read: what helps is a program that can tell a false step by the question. With a calculator alone it
does not help a model whose mistakes are in what it computes. Our own decision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from latentrevise.checkers.loading import StepChecker
from latentrevise.config import at_least_one
from latentrevise.data.records import decoded, row_seed
from latentrevise.model.compute import Compute
from latentrevise.strategies.asking import Written, write
from latentrevise.strategies.base import Proposal, Tools, Work
from latentrevise.strategies.candidates import Reader, charged, spread


@dataclass(frozen=True)
class StepCheckedConfig:
    """tries: samples of one step at most; a rollout none of whose tries holds is given up."""

    tries: int = 6

    def __post_init__(self) -> None:
        at_least_one(self, "tries")


@dataclass
class Path:
    """A rollout on its way: the steps that were accepted, and how often the next one was tried."""

    number: int
    ids: tuple[int, ...] = ()
    start: Proposal = field(default_factory=lambda: Proposal(n=1))  # where it began
    tried: int = 0
    going: bool = True
    given_up: bool = False
    compute: Compute = field(default_factory=Compute)


@dataclass(frozen=True)
class StepChecked:
    """One rollout a sample, up to its answer, which is sampled as everywhere; those that were given up hand their
    sample on. Steps are sampled as the run samples; one that the checker can't judge is accepted."""

    config: StepCheckedConfig
    banned: tuple[str, ...]
    step_checker: StepChecker
    name: str = "step-checked"
    uses_answer: bool = False
    backend: str = "none"

    def propose(self, tools: Tools, work: Sequence[Work], samples: int) -> list[list[Proposal]]:
        reader = Reader(tools, work[0].template_ids, self.banned)
        paths = [[Path(j) for j in range(samples)] for _ in work]
        with tools.engine.reusing():
            walk(tools, reader, self.step_checker, self.config.tries, self.name, list(zip(work, paths, strict=True)))
        return [arrived(own, samples, Compute()) for own in paths]


def walk(
    tools: Tools,
    reader: Reader,
    check: StepChecker,
    tries: int,
    name: str,
    paths: Sequence[tuple[Work, Sequence[Path]]],
) -> None:
    """Sample the paths of each piece of work, up to where the answer opens. name: of the strategy, for the seeds."""
    while going := [(item, path) for item, own in paths for path in own if path.going]:
        seeds = [row_seed(item.seed, name, path.number, len(path.ids), path.tried) for item, path in going]
        contexts = [(*item.prompt.ids, *path.ids) for item, path in going]
        texts, computes = write(tools, contexts, seeds, **reader.boundary.stops, cached=True)
        for (item, path), step, compute in zip(going, texts, computes, strict=True):
            path.compute += compute
            _take(tools, reader, check, tries, item, path, step[0] if step else None)


def arrived(paths: Sequence[Path], samples: int, spent: Compute) -> list[Proposal]:
    """What the paths of one piece of work come to. spent: on finding where they begin."""
    # What was decoded to get there need not be run again, as in a rollout that was sampled in one go.
    left = [replace(p.start, plain_ids=p.ids, kept=len(p.ids)) for p in paths if not p.given_up]
    return charged(spread(left, samples), samples, sum((p.compute for p in paths), spent))


def _take(
    tools: Tools, reader: Reader, check: StepChecker, tries: int, item: Work, path: Path, step: Written | None
) -> None:
    """Judge what was sampled for a path's next step."""
    length = tools.sampling.max_new_tokens
    end = None if step is None else reader.boundary.first(path.ids, step.ids)
    ids = () if step is None else step.ids[:end]
    if not ids or reader.reasoning((*path.ids, *ids)) < len(path.ids) + len(ids):
        path.going = False  # no room is left, it ended, or the answer opens
        return
    path.tried += 1
    before, written = (decoded(tools.tokenizer, part) for part in (path.ids, ids))
    if check(item.prompt.text, before, written) is False:
        path.given_up = path.tried == tries
        path.going = not path.given_up
        return
    path.ids, path.tried = (*path.ids, *ids), 0
    path.going = end is not None and len(path.ids) < length - 1
