"""What a run will take, before it is begun: a few of its prompts run to the end, and their cost times as many."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from latentrevise.engines import Request
from latentrevise.errors import ConfigError, InputError
from latentrevise.recovery.collect import cost, mined
from latentrevise.recovery.guards import wilson
from latentrevise.recovery.pipeline import Recovery


@dataclass(frozen=True)
class Cost:
    """Of a stage or an arm, over the whole run: prompts that reach it, token passes (None: not charged), seconds of one
    worker."""

    name: str
    prompts: float
    passes: float | None
    seconds: float


@dataclass(frozen=True)
class Estimate:
    """prompts: usable; left_out: rows that are not; sampled: prompts that were run. zero_hit: their share with its 95 %
    Wilson interval. costs: of ``mine``, each arm, ``verify``. disk: bytes of the run; memory: bytes, the peak of the
    device (of this process on a CPU) while the sample ran."""

    prompts: int
    left_out: int
    sampled: int
    zero_hit: tuple[float, float, float]
    costs: list[Cost]
    disk: float
    memory: int

    @property
    def seconds(self) -> tuple[float, float, float]:
        """Of one worker for everything, and between which bounds by the interval of the zero-hit share alone."""
        mine = self.costs[0].seconds
        rest = sum(cost.seconds for cost in self.costs[1:])
        share, low, high = self.zero_hit
        return (mine + rest, mine + rest * low / share, mine + rest * high / share) if share else (mine, mine, mine)


def estimate(
    recovery: Recovery, prompts: str | os.PathLike[str] | Iterable[Mapping[str, Any]], sample: int | None = None
) -> Estimate:
    """Run ``sample`` prompts (by default one part), spread evenly over all, in the directory of a new ``recovery``.

    Raises ConfigError for a sample below 1, InputError without a usable prompt, and what the run raises.
    """
    usable, errors = recovery.job.read_prompts(prompts)
    size = min(recovery.config.chunk if sample is None else sample, len(usable))
    if sample is not None and sample < 1:
        raise ConfigError(f"a sample of {sample} prompts: it must be at least 1")
    if not usable:
        raise InputError(f"no usable prompt among {len(errors)} rows: {errors[0].message if errors else 'no rows'}")
    chosen = [usable[i * len(usable) // size] for i in range(size)]
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with recovery.session():
        recovery.run.begin(recovery.job.header, chosen, errors)
        _warm(recovery)
        taken = costs_of(recovery)
    times, zero_hit = len(usable) / size, len(recovery.job.targets)
    costs = [
        Cost(c.name, c.prompts * times, None if c.passes is None else c.passes * times, c.seconds * times)
        for c in taken
    ]
    on_disk = sum(path.stat().st_size for path in recovery.run.path.rglob("*") if path.is_file())
    share = wilson(zero_hit, size)
    return Estimate(len(usable), len(errors), size, share, costs, on_disk * times, _peak(recovery))


def costs_of(recovery: Recovery) -> list[Cost]:
    """Run a recovery that has its prompts and nothing else from stage to stage, to its end: what each took."""
    mining = _seconds(recovery.mine)
    recovery.revise()
    recovery.sample()
    verified = _seconds(recovery.verify)
    decoded = mined(recovery.job).compute.decoded
    costs = [Cost("mine", len(recovery.prompts), decoded, mining)]
    for arm in recovery.all_arms():
        parts = recovery.parts(arm)
        spent = cost(recovery.job, parts)
        costs.append(Cost(arm.name, sum(part.size for part in parts), spent.passes, spent.seconds))
    return [*costs, Cost("verify", len(recovery.job.targets), None, verified)]


def _warm(recovery: Recovery) -> None:
    """What a process does once, however many prompts there are: workers of the verifier, buffers, compilation."""
    job, first = recovery.job, recovery.prompts[0]
    recovery.engine.generate([Request(first.ids, seed=0)], [job.config.sampling(1, left=1)])
    job.verifier.verify([(r"\frac{\sqrt{8}}{2}", r"\boxed{2^{1/2}}")])  # it takes a worker to tell


def _seconds(stage: Any) -> float:
    began = time.perf_counter()
    stage()
    return time.perf_counter() - began


def _peak(recovery: Recovery) -> int:
    device = recovery.job.policy.device
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def estimate_text(found: Estimate, workers: int = 1) -> str:
    """The estimate as a table, and what most of the time goes into."""
    share, low, high = found.zero_hit
    lines = [
        f"{found.prompts:,} prompts ({found.left_out:,} rows left out); measured on {found.sampled:,} of them",
        f"zero-hit: {share:.0%} [{low:.0%}, {high:.0%}]",
        f"{'':24} {'prompts':>10} {'token passes':>14} {'hours':>9}",
    ]
    for line in found.costs:
        passes = "" if line.passes is None else f"{line.passes:,.0f}"
        lines.append(f"{line.name:24} {line.prompts:>10,.0f} {passes:>14} {line.seconds / 3600:>9,.3g}")
    total, least, most = (seconds / 3600 / workers for seconds in found.seconds)
    largest = max(found.costs, key=lambda line: line.seconds)
    part = largest.seconds / max(sum(line.seconds for line in found.costs), 1e-9)
    lines += [
        f"in all {total:,.3g} hours [{least:,.3g}, {most:,.3g}] on {workers} worker{'s' * (workers > 1)} like this one;"
        f" {part:.0%} of it is {largest.name}",
        f"disk {found.disk / 1e9:,.3g} GB; memory {found.memory / 1e9:,.3g} GB at the peak of the sample",
    ]
    if not share:
        lines.append("no sampled prompt is zero-hit, so nothing is known of what follows mining; raise --sample")
    return "\n".join(lines)
