"""What a run came to: results of every arm, what each cost, admitted trajectories and metrics."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow.compute as pc

from latentrevise.data.records import (
    Prompt,
    Rollout,
    Sample,
    Start,
    Trajectory,
    Verdict,
    read_records,
    read_table,
    write_records,
)
from latentrevise.data.storage import write_signed
from latentrevise.errors import RunError
from latentrevise.model.compute import Compute
from latentrevise.recovery.job import Job
from latentrevise.recovery.metrics import Outcome, run_metrics
from latentrevise.recovery.rundir import RunDirectory
from latentrevise.recovery.selection import select
from latentrevise.recovery.settings import RecoverConfig
from latentrevise.recovery.stages import Arm, Part, given_up, read_output, read_starts, write_mixtures
from latentrevise.revise.hull import Mixture

_STARTS = ("forward_tokens", "backward_tokens", "decoded_tokens", "seconds")
_SAMPLES = ("completion_ids", "finish_reason", "seconds")
Result = tuple[Start, Sample, Verdict]


def results(job: Job, parts: Iterable[Part]) -> list[Result]:
    """Every sample of an arm with its start and its verdict. Raises RunError before all parts are verified."""
    rows: list[Result] = []
    for part in parts:
        arm = part.of()
        path = job.run.part("verdicts", part.index, arm.name)
        if not path.exists():
            step = "revise" if job.config.stop_at_success else "verify"
            raise RunError(f"{job.run.path}: {arm.name} is not verified yet; run `latentrevise {step}` first")
        starts = {start.start_id: start for start in read_starts(job.run, part)[0]}
        samples = read_records(job.run.part("samples", part.index, arm.name), Sample)
        verdicts = read_records(path, Verdict)
        rows += [(starts[s.start_id], s, v) for s, v in zip(samples, verdicts, strict=True)]
    return rows


def admitted(verdict: Verdict) -> bool:
    """Whether a sample may become a label."""
    return verdict.verdict == "correct" and verdict.guard is None


def cost(run: RunDirectory, parts: Iterable[Part]) -> Compute:
    """What parts of an arm cost, from their starts and samples on disk."""
    total = Compute()
    for part in parts:
        starts = read_table(read_output(run, "starts", part, "revise"), _STARTS)
        samples = read_table(read_output(run, "samples", part, "continue"), _SAMPLES)
        total += Compute(*(pc.sum(starts[name]).as_py() or 0 for name in _STARTS))
        ended = pc.sum(pc.equal(samples["finish_reason"], "stop")).as_py() or 0
        tokens = pc.sum(pc.list_value_length(samples["completion_ids"])).as_py() or 0
        total += Compute(0, 0, tokens + ended, pc.sum(samples["seconds"]).as_py() or 0.0)
    return total


def mining_cost(prompts: Iterable[Prompt], rollouts: Mapping[str, Sequence[Rollout]], config: RecoverConfig) -> Compute:
    """What the rollouts cost: their tokens, and each prompt's once for every round that it was drawn in."""
    total = Compute()
    for prompt in prompts:
        own = rollouts.get(prompt.id, ())
        rounds = sum(config.drawn(number).start < len(own) for number in range(config.mine.rounds))
        decoded = sum(decoded_tokens(r.completion_ids, r.finish_reason) for r in own)
        total += Compute(forward=rounds * len(prompt.ids), decoded=decoded)
    return total


def decoded_tokens(ids: Sequence[int], finish_reason: str) -> int:
    """Tokens that were decoded: the end-of-sequence token is not among the ids, but was paid for."""
    return len(ids) + (finish_reason == "stop")


def collect(
    job: Job, arms: Sequence[Arm], parts: Mapping[str, Sequence[Part]]
) -> tuple[list[Trajectory], dict[str, Any]]:
    """Write the admitted trajectories, their mixtures and the metrics, and return rows and metrics.

    parts: of every arm, by its name; without those that were set aside.
    """
    found = {arm.name: results(job, parts[arm.name]) for arm in arms}
    rows: list[Trajectory] = []
    mixtures: dict[str, Mixture] = {}
    header, prompts = job.run.read_header(), {prompt.id: prompt for prompt in job.prompts}
    for arm in arms:
        if not arm.wrong and arm.name == arm.strategy.name:
            kept, own = _trajectories(job, arm, parts[arm.name], found[arm.name], header, prompts)
            rows += kept
            mixtures.update(own)
    write_mixtures(job.run.atoms, mixtures)
    write_records(job.run.trajectories, rows, Trajectory)
    count = Counter(row.strategy for row in rows)
    rollouts = job.rollouts()
    metrics = run_metrics(
        [
            Outcome(
                arm.name,
                arm.strategy.name,
                arm.strategy.uses_answer,
                arm.wrong,
                [name for part in parts[arm.name] for name in part.names(job)],
                cost(job.run, parts[arm.name]),
                found[arm.name],
                0 if arm.wrong else count[arm.name],
            )
            for arm in arms
        ],
        rollouts=rollouts,
        zero_hit=job.targets["prompt_id"].to_pylist(),
        aimed_wrong=job.targets.filter(pc.is_valid(job.targets["wrong"]))["prompt_id"].to_pylist(),
        mined=mining_cost(job.prompts, rollouts, job.config),
        left_out=len(job.run.read_errors()),
        checked=job.checker is not None,
        chained=job.config.stop_at_success,
        label=job.config.label,
        set_aside=given_up(job.run),
    )
    write_signed(job.run.metrics, metrics)
    return rows, metrics


def _trajectories(
    job: Job,
    arm: Arm,
    parts: Sequence[Part],
    found: Sequence[Result],
    header: Mapping[str, Any],
    prompts: Mapping[str, Prompt],
) -> tuple[list[Trajectory], dict[str, Mixture]]:
    """The rows of one arm, in the order of the selection, and the mixtures of their starts."""
    by_prompt: dict[str, list[Trajectory]] = defaultdict(list)
    for start, sample, verdict in found:
        if admitted(verdict):
            prompt = prompts[sample.prompt_id]
            by_prompt[prompt.id].append(_trajectory(job, arm, header, prompt, start, sample, verdict))
    mixtures: dict[str, Mixture] = {}
    for part in parts:
        mixtures.update(read_starts(job.run, part)[1])
    rows = [
        replace(trajectory, rank=rank)
        for own in by_prompt.values()
        for rank, trajectory in enumerate(select(own, job.config.select, job.config.keep))
    ]
    kept = {row.start_id for row in rows}
    return rows, {name: mixture for name, mixture in mixtures.items() if name in kept}


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
