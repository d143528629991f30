"""The stages of a recovery, each over one part of one arm: what it reads, what it writes, and the work between.

A part is some prompts of one arm. Its output is one file, written once and whole; it depends on the part's prompts, on
what the stage before wrote of them and on the settings alone. So any process may run any part, in any order that keeps
a part's stages in theirs.

    mine      prompts              -> rollouts/part
    propose   zero-hit cases       -> starts/ARM/part (and the mixtures beside it)
    continue  starts/ARM/part      -> samples/ARM/part
    judge     samples/ARM/part     -> verdicts/ARM/part
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa

from latentrevise.data.atoms import read_atoms, write_atoms
from latentrevise.data.parquet import REMEDY
from latentrevise.data.records import (
    Prompt,
    Rollout,
    Sample,
    Start,
    Verdict,
    decoded,
    read_records,
    row_seed,
    write_records,
)
from latentrevise.data.storage import read_signed, write_signed
from latentrevise.engines import Completion, Request
from latentrevise.errors import RunError
from latentrevise.recovery import verdicts
from latentrevise.recovery.job import Job
from latentrevise.recovery.progress import Progress
from latentrevise.recovery.rounds import plans
from latentrevise.recovery.rundir import RunDirectory
from latentrevise.recovery.settings import RoundsConfig
from latentrevise.revise.hull import Mixture
from latentrevise.strategies import Proposal, Strategy, Work

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Arm:
    """A strategy in a run, or its control. wrong: aimed at a wrong answer; samples: continuations a prompt, at most;
    rounds: that they are drawn in."""

    name: str
    strategy: Strategy
    wrong: bool
    samples: int
    rounds: RoundsConfig = field(default_factory=RoundsConfig)


@dataclass(frozen=True)
class Part:
    """One piece of work: the ``index``-th of an arm (of the run itself, while mining). rows: of the prompts while
    mining, else of the zero-hit prompts (``Job.targets``); what stands in them is read by who runs the part. round: of
    mining."""

    index: int
    rows: Sequence[int]
    arm: Arm | None = None
    round: int = 0

    @property
    def size(self) -> int:
        return len(self.rows)

    def names(self, job: Job) -> list[str]:
        """The ids of its prompts."""
        if self.arm is None:
            return [job.prompts[row].id for row in self.rows]
        return list(job.targets.column("prompt_id").take(pa.array(self.rows, pa.int64())).to_pylist())

    def of(self) -> Arm:
        assert self.arm is not None  # only a part of mining has none
        return self.arm


class Stage(Protocol):
    """name: on the bar. folder: of the run directory, where ``output`` lies. run: from input to output, once."""

    name: str
    folder: str

    def run(self, job: Job, part: Part, bar: Progress) -> None: ...


def output(run: RunDirectory, stage: Stage, part: Part) -> Path:
    """The file that a stage writes of a part; it is there when the part is done."""
    return run.part(stage.folder, part.index, "" if part.arm is None else part.arm.name)


ORDER = ("rollouts", "starts", "samples", "verdicts")  # the stages' folders


def set_aside(run: RunDirectory, arm: Arm | None) -> set[int]:
    """The parts of an arm that a stage gave up: they count as absent, whatever there is of them."""
    folders, name = (ORDER[:1], "") if arm is None else (ORDER[1:], arm.name)
    return set().union(*(run.given_up(folder, name) for folder in folders))


def settled(run: RunDirectory, stage: Stage, part: Part) -> bool:
    """Whether nothing is left to do for the part in this stage."""
    return output(run, stage, part).exists() or part.index in set_aside(run, part.arm)


def unsettled(run: RunDirectory, stage: Stage, parts: Sequence[Part]) -> list[Part]:
    """Those of one arm's parts of which something is left to do: two looks at folders, however many there are."""
    arm = parts[0].arm if parts else None
    done = run.there(stage.folder, "" if arm is None else arm.name) | set_aside(run, arm)
    return [part for part in parts if part.index not in done]


def give_up(job: Job, stage: Stage, part: Part, reasons: Sequence[str]) -> None:
    """Note that a part is given up, and why."""
    arm = "" if part.arm is None else part.arm.name
    path = job.run.aside(stage.folder, part.index, arm)
    note = {"stage": stage.name, "arm": arm, "part": part.index, "prompts": part.names(job), "reasons": list(reasons)}
    write_signed(path, note)
    log.warning("%s is set aside: %s", described(note), "; ".join(reasons))


def given_up(run: RunDirectory) -> list[dict[str, Any]]:
    """What was noted of every part that was given up."""
    found = sorted((run.path / "aside").rglob("part-*.json"))
    return [read_signed(path, "delete it and run again: the part is then tried anew") for path in found]


def described(note: Mapping[str, Any]) -> str:
    """A part that was given up, in words."""
    of = f" of {note['arm']}" if note["arm"] else ""
    return f"part {note['part']}{of} in {note['stage']} ({len(note['prompts'])} prompts)"


def read_output(run: RunDirectory, folder: str, part: Part, command: str) -> Path:
    """The same of the stage before. Raises RunError that names the command which makes it."""
    path = run.part(folder, part.index, part.of().name)
    if not path.exists():
        raise RunError(f"{run.path} has no {path.relative_to(run.path)} yet; run `latentrevise {command}` first")
    return path


def read_starts(run: RunDirectory, part: Part) -> tuple[list[Start], dict[str, Mixture]]:
    """The starts of a part, and the mixtures of those that have one."""
    path = read_output(run, "starts", part, "revise")
    remedy = f"delete it and {path.name} beside it, and run again; nothing else is lost"
    return read_records(path, Start), read_mixtures(path.with_suffix(".safetensors"), remedy)


class Mine:
    """Sample the part's round of ``rollouts`` of each prompt and verify them."""

    name, folder = "mine", "rollouts"

    def run(self, job: Job, part: Part, bar: Progress) -> None:
        config, prompts = job.config, [job.prompts[row] for row in part.rows]
        drawn = config.mine.drawn(config.rollouts, part.round)
        requests = [Request(p.ids, seed=row_seed(config.seed, "mine", p.id), first=drawn.start) for p in prompts]
        left = [job.tools().left(len(p.ids)) for p in prompts]
        found = job.generate(requests, [config.sampling(len(drawn), left=room) for room in left], bar)
        flat = [
            (prompt, j, completion, decoded(job.tokenizer, completion.ids))
            for prompt, own in zip(prompts, found, strict=True)
            for j, completion in zip(drawn, own, strict=True)
        ]
        judged = job.verifier.verify([(prompt.answer, text) for prompt, _, _, text in flat])
        rows = [
            Rollout(
                prompt_id=prompt.id,
                sample_id=f"{prompt.id}/{j}",
                completion_ids=completion.ids,
                completion=text,
                extracted=judgement.extracted,
                verdict=judgement.verdict,
                finish_reason=completion.finish_reason,
                sampling_logprobs=completion.logprobs or (),
            )
            for (prompt, j, completion, text), judgement in zip(flat, judged, strict=True)
        ]
        _publish(job, self, part, rows, Rollout)


class Propose:
    """Let the arm's strategy propose prefixes to continue from."""

    name, folder = "revise", "starts"

    def run(self, job: Job, part: Part, bar: Progress) -> None:
        arm = part.of()
        work = [case.work(arm.wrong) for case in job.cases_at(part.rows)]
        began = time.perf_counter()
        proposals = arm.strategy.propose(job.tools(), work, arm.samples)
        spare = time.perf_counter() - began - sum(p.compute.seconds for own in proposals for p in own)
        count, shares = sum(len(own) for own in proposals), job.engine.shares_prefixes
        rows, mixtures = [], {}
        for item, own in zip(work, proposals, strict=True):
            for j, proposal in enumerate(own):
                start = _start(f"{arm.name}/{item.prompt.id}/{j}", item, proposal, max(spare, 0.0) / count, shares)
                rows.append(start)
                if proposal.mixture is not None:
                    mixtures[start.start_id] = proposal.mixture
        _publish(job, self, part, rows, Start, mixtures)


class Continue:
    """Sample from the arm's starts."""

    name, folder = "continue", "samples"

    def run(self, job: Job, part: Part, bar: Progress) -> None:
        starts, mixtures = read_starts(job.run, part)
        prompts = {prompt.id: prompt for prompt in job.zero_hit_at(part.rows)}
        began = time.perf_counter()
        found = continuations(job, starts, mixtures, prompts, part.of().rounds, bar)
        seconds = (time.perf_counter() - began) / max(sum(map(len, found)), 1)
        rows = [
            Sample(
                start_id=start.start_id,
                prompt_id=start.prompt_id,
                sample_id=f"{start.start_id}/{j}",
                completion_ids=completion.ids,
                completion=decoded(job.tokenizer, completion.ids),
                finish_reason=completion.finish_reason,
                sampling_logprobs=completion.logprobs or (),
                seconds=seconds,
            )
            for start, completions in zip(starts, found, strict=True)
            for j, completion in enumerate(completions)
        ]
        _publish(job, self, part, rows, Sample)


def continuations(
    job: Job,
    starts: Sequence[Start],
    mixtures: Mapping[str, Mixture],
    prompts: Mapping[str, Prompt],
    rounds: RoundsConfig,
    bar: Progress,
) -> list[list[Completion]]:
    """What is sampled from each start, in rounds: behind each, whoever has enough samples that come to the answer aimed
    at is left out. Where the model has no position left behind a start, nothing."""
    found: dict[str, list[Completion]] = {start.start_id: [] for start in starts}
    tools = job.tools()
    left = {s.start_id: tools.left(len(s.context_ids or prompts[s.prompt_id].ids) + len(s.plain_ids)) for s in starts}
    if full := sum(room <= 0 for room in left.values()):
        told = "%d of %d starts fill all positions of the model; nothing is sampled from them"
        log.warning(told, full, len(starts))
    waiting, number, correct = plans(starts, rounds), 0, Counter[str]()
    while waiting:
        draws = [d for plan in waiting.values() for d in plan.rounds[number] if left[d.start.start_id] > 0]
        requests = [job.request(prompts[d.start.prompt_id], mixtures.get(d.start.start_id), d) for d in draws]
        params = [job.config.sampling(d.n, d.start.greedy, left[d.start.start_id]) for d in draws]
        drawn = job.generate(requests, params, bar)
        for draw, completions in zip(draws, drawn, strict=True):
            found[draw.start.start_id] += completions
        number += 1
        waiting = {name: plan for name, plan in waiting.items() if number < len(plan.rounds)}
        new = [(d.start, c) for d, own in zip(draws, drawn, strict=True) if d.start.prompt_id in waiting for c in own]
        hits = job.succeed([(start.target, decoded(job.tokenizer, completion.ids)) for start, completion in new])
        correct.update(start.prompt_id for (start, _), hit in zip(new, hits, strict=True) if hit)
        waiting = {name: plan for name, plan in waiting.items() if correct[name] < plan.stop}
    return list(found.values())


class Judge:
    """Verify the arm's samples, check derivations, compute plain log-probs, apply the guards."""

    name, folder = "verify", "verdicts"

    def run(self, job: Job, part: Part, bar: Progress) -> None:
        arm = part.of()
        starts, mixtures = read_starts(job.run, part)
        samples = read_records(read_output(job.run, "samples", part, "continue"), Sample)
        judge = verdicts.Judge(job.tools(), job.verifier, job.checker, job.config, job.boundary)
        cases = {case.prompt.id: case for case in job.cases_at(part.rows)}
        generate = partial(job.generate, bar=bar)
        rows = judge.verdicts(arm.strategy, arm.wrong, cases, starts, mixtures, samples, generate)
        _publish(job, self, part, rows, Verdict)


def _publish(
    job: Job,
    stage: Stage,
    part: Part,
    rows: Sequence[Any],
    cls: type,
    mixtures: Mapping[str, Mixture] | None = None,
) -> None:
    """Write a part's output, unless it is there: then another process took the part over, and its file stays, since
    others may have read it."""
    path = output(job.run, stage, part)
    if path.exists():
        return
    if mixtures is not None:
        write_mixtures(path.with_suffix(".safetensors"), mixtures)
    write_records(path, rows, cls)


def _start(start_id: str, item: Work, proposal: Proposal, seconds: float, shares_prefixes: bool) -> Start:
    compute = proposal.compute
    # What is charged as cached must be: an engine that does not share prefixes runs each request from its first token.
    whole = len(proposal.context_ids or item.prompt.ids) + len(proposal.plain_ids)
    return Start(
        start_id=start_id,
        prompt_id=item.prompt.id,
        parent_sample_id=proposal.parent,
        target=item.target,
        prefix_ids=proposal.original_ids,
        plain_ids=proposal.plain_ids,
        latent=proposal.latent,
        greedy=proposal.greedy,
        n=proposal.n,
        forward_tokens=compute.forward + (proposal.uncached if shares_prefixes else whole),
        backward_tokens=compute.backward,
        decoded_tokens=compute.decoded,
        seconds=compute.seconds + seconds,
        trace=None if proposal.trace is None else asdict(proposal.trace),
        context_ids=proposal.context_ids,
        rounds=proposal.rounds,
    )


def write_mixtures(path: Path, mixtures: Mapping[str, Mixture]) -> None:
    """Atoms and offsets of mixtures by id, to one safetensors file."""
    write_atoms(path, *tensors_of(mixtures))


def tensors_of(mixtures: Mapping[str, Mixture]) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Mixtures as ``write_atoms`` takes them: ids and weights, and offsets, by id."""
    offsets = {name: m.offset for name, m in mixtures.items() if m.offset is not None}
    return {name: (m.ids, m.weights) for name, m in mixtures.items()}, offsets


def read_mixtures(path: Path, remedy: str = REMEDY) -> dict[str, Mixture]:
    """What ``write_mixtures`` wrote. Raises InputError with the remedy."""
    atoms, offsets = read_atoms(path, remedy)
    return {name: Mixture(ids, weights, offsets.get(name)) for name, (ids, weights) in atoms.items()}
