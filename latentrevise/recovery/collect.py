"""What a run came to: results of every arm, what each cost, admitted trajectories and metrics; part by part."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from latentrevise.data.atoms import AtomsWriter, atoms_writer
from latentrevise.data.parquet import read_table
from latentrevise.data.records import Prompt, Sample, Start, Trajectory, Verdict, read_records, write_records
from latentrevise.data.storage import write_signed
from latentrevise.errors import RunError
from latentrevise.model.compute import Compute
from latentrevise.recovery.job import Job
from latentrevise.recovery.metrics import run_metrics
from latentrevise.recovery.mined import Mined, glances
from latentrevise.recovery.outcome import Judged, Outcome, Result
from latentrevise.recovery.rounds import repeated
from latentrevise.recovery.selection import select
from latentrevise.recovery.stages import Arm, Part, given_up, read_output, read_starts, tensors_of

_STARTS = ("forward_tokens", "backward_tokens", "decoded_tokens", "seconds")
_SAMPLES = ("completion_ids", "finish_reason", "seconds")


def results(job: Job, part: Part) -> list[Result]:
    """Every sample of a part with its start and its verdict. Raises RunError before it is verified."""
    name = part.of().name
    path = job.run.part("verdicts", part.index, name)
    if not path.exists():
        step = "revise" if job.config.stop_at_success else "verify"
        raise RunError(f"{job.run.path}: {name} is not verified yet; run `latentrevise {step}` first")
    starts = {s.start_id: s for s in read_records(read_output(job.run, "starts", part, "revise"), Start)}
    samples = read_records(job.run.part("samples", part.index, name), Sample)
    return [(starts[s.start_id], s, v) for s, v in zip(samples, read_records(path, Verdict), strict=True)]


def admitted(verdict: Verdict) -> bool:
    """Whether a sample may become a label."""
    return verdict.verdict == "correct" and verdict.guard is None


def cost(job: Job, parts: Iterable[Part]) -> Compute:
    """What parts of an arm cost, from their starts and samples on disk."""
    proposing, sampling = proposing_and_sampling(job, parts)
    return proposing + sampling


def proposing_and_sampling(job: Job, parts: Iterable[Part]) -> tuple[Compute, Compute]:
    """The same in two: what the starts took, and what was sampled from them."""
    proposing, sampling = Compute(), Compute()
    for part in parts:
        starts = read_table(read_output(job.run, "starts", part, "revise"), _STARTS)
        samples = read_table(read_output(job.run, "samples", part, "continue"), _SAMPLES)
        proposing += Compute(*(pc.sum(starts[name]).as_py() or 0 for name in _STARTS))
        ended = pc.sum(pc.equal(samples["finish_reason"], "stop")).as_py() or 0
        tokens = pc.sum(pc.list_value_length(samples["completion_ids"])).as_py() or 0
        sampling += Compute(0, 0, tokens + ended, pc.sum(samples["seconds"]).as_py() or 0.0)
        if not job.engine.shares_prefixes:
            sampling += Compute(forward=_run_again(job, part))
    return proposing, sampling


def _run_again(job: Job, part: Part) -> int:
    """Tokens of prompts and prefixes that an engine without shared prefixes ran again, for each request of a start
    behind its first."""
    starts = read_records(read_output(job.run, "starts", part, "revise"), Start)
    names = read_table(read_output(job.run, "samples", part, "continue"), ("start_id",))["start_id"]
    prompts = {prompt.id: prompt for prompt in job.zero_hit_at(part.rows)}
    again = repeated(starts, Counter(names.to_pylist()), part.of().rounds)
    return sum(
        again.get(s.start_id, 0) * (len(s.context_ids or prompts[s.prompt_id].ids) + len(s.plain_ids)) for s in starts
    )


def mined(job: Job) -> Mined:
    """What mining came to. Raises RunError while it is not complete."""
    found, config = Mined(), job.config
    zero_hit = set(job.targets["row"].to_pylist())
    for chunk, parts in job.mined().items():
        own, first = glances(job.run, parts), chunk * config.chunk
        for row, prompt in enumerate(job.prompts[first : first + config.chunk], first):
            if rollouts := own.get(prompt.id):
                begun = (config.mine.drawn(config.rollouts, number).start for number in range(config.mine.rounds))
                rounds = sum(first < len(rollouts) for first in begun)
                found.add(rollouts, rounds * len(prompt.ids), row in zero_hit)
    return found


def collect(job: Job, arms: Sequence[Arm], parts: Mapping[str, Sequence[Part]]) -> dict[str, Any]:
    """Write the admitted trajectories, their mixtures and the metrics, and return the metrics. No more than a part is
    held.

    parts: of every arm, by its name; without those that were set aside.
    """
    header, judged, chained = job.run.read_header(), Judged(), job.config.stop_at_success
    outcomes = {
        a.name: Outcome(
            a.name, a.strategy.name, a.strategy.uses_answer, a.wrong, judged, chained, in_rounds=a.rounds.rounds > 1
        )
        for a in arms
    }
    with atoms_writer(job.run.atoms) as atoms:
        each = ((arm, part) for arm in arms for part in parts[arm.name])
        rows = (row for arm, part in each for row in _counted(job, header, part, outcomes[arm.name], atoms))
        write_records(job.run.trajectories, rows, Trajectory)
    metrics = run_metrics(
        list(outcomes.values()),
        judged,
        mined=mined(job),
        left_out=len(job.run.read_errors()),
        checked=job.checker is not None,
        chained=chained,
        label=job.config.label,
        set_aside=given_up(job.run),
    )
    write_signed(job.run.metrics, metrics)
    return metrics


def _counted(job: Job, header: Mapping[str, Any], part: Part, outcome: Outcome, atoms: AtomsWriter) -> list[Trajectory]:
    """The trajectories of a part, none of a side arm; their mixtures are written, and the part is counted."""
    found, arm, kept = results(job, part), part.of(), list[Trajectory]()
    if not arm.wrong and arm.name == arm.strategy.name:
        kept = _trajectories(job, header, part, found)
        names = {row.start_id for row in kept}
        mixtures = read_starts(job.run, part)[1]
        atoms.write(*tensors_of({name: mixture for name, mixture in mixtures.items() if name in names}))
    aimed = job.targets["wrong"].take(pa.array(part.rows, pa.int64()))
    outcome.add(part.names(job), len(aimed) - aimed.null_count, cost(job, [part]), found, len(kept))
    return kept


def _trajectories(job: Job, header: Mapping[str, Any], part: Part, found: Sequence[Result]) -> list[Trajectory]:
    """The rows of a part, in the order of the selection."""
    prompts = {prompt.id: prompt for prompt in job.zero_hit_at(part.rows)}
    by_prompt: dict[str, list[Trajectory]] = defaultdict(list)
    for start, sample, verdict in found:
        if admitted(verdict):
            prompt = prompts[sample.prompt_id]
            by_prompt[prompt.id].append(_trajectory(job, part.of(), header, prompt, start, sample, verdict))
    return [
        replace(trajectory, rank=rank)
        for own in by_prompt.values()
        for rank, trajectory in enumerate(select(own, job.config.select, job.config.keep))
    ]


def _trajectory(
    job: Job, arm: Arm, header: Mapping[str, Any], prompt: Prompt, start: Start, sample: Sample, verdict: Verdict
) -> Trajectory:
    config = job.config
    return Trajectory(
        prompt_id=prompt.id,
        sample_id=sample.sample_id,
        start_id=start.start_id,
        parent_sample_id=start.parent_sample_id,
        strategy=arm.strategy.name,
        prompt=prompt.text,
        prompt_ids=prompt.ids,
        prefix_ids=start.prefix_ids,
        plain_prefix_ids=config.rendered(start),
        prefix_rendering=config.rendering,
        completion_ids=sample.completion_ids,
        completion=sample.completion,
        answer=prompt.answer,
        extracted_answer=verdict.extracted,
        verdict=verdict.verdict,
        valid=verdict.valid,
        reward=1.0,
        finish_reason=sample.finish_reason,
        model=header["model"]["path"],
        seed=config.seed,
        temperature=config.temperature,
        top_p=config.top_p,
        steps=verdict.steps,
        trace=start.trace,
        sampling_logprobs=sample.sampling_logprobs,
        plain_logprobs=verdict.plain_logprobs,
        backend=arm.strategy.backend,
        config_hash=header["config_hash"],
    )
