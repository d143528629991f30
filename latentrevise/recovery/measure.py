"""What some prompts take from mining to verdicts: the units that a plan is made of."""

from __future__ import annotations

import re
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import pyarrow.compute as pc
import torch

from latentrevise.engines import HFEngine, Request
from latentrevise.model.compute import Compute
from latentrevise.recovery.collect import admitted, proposing_and_sampling, results
from latentrevise.recovery.job import Job
from latentrevise.recovery.mined import Glance, glances
from latentrevise.recovery.pipeline import Recovery
from latentrevise.recovery.progress import Progress
from latentrevise.recovery.schedule import Alone
from latentrevise.recovery.settings import RecoverConfig
from latentrevise.recovery.stages import ORDER, Arm, Continue, Judge, Mine, Part, Propose, Stage


@dataclass(frozen=True)
class Tries:
    """Of one prompt by one arm: samples, and how many of them were admitted."""

    samples: int
    admitted: int


@dataclass(frozen=True)
class ArmTook:
    """What an arm took. prompts: that it was given. proposing, sampling: token passes, and seconds of these stages;
    verifying: seconds. tries: by prompt. disk: bytes; memory: bytes, the highest peak of its stages (None: not
    known)."""

    prompts: int
    proposing: Compute
    sampling: Compute
    verifying: float
    tries: Mapping[str, Tries]
    disk: int
    memory: int | None


@dataclass(frozen=True, eq=False)
class Measured:
    """What some prompts took by ``config``. usable: how many prompts they stand for. lengths, rollouts: tokens of each
    prompt, and what was mined of it. sampling, verifying: seconds of mining. zero_hit: prompts; aimed: those of them
    with a wrong target. arms: by name. mined_disk, mined_memory: bytes; rest: bytes of what belongs to no arm. gpus:
    of a worker, which holds them through all stages."""

    config: RecoverConfig
    usable: int
    lengths: Mapping[str, int]
    rollouts: Mapping[str, Sequence[Glance]]
    sampling: float
    verifying: float
    zero_hit: Sequence[str]
    aimed: frozenset[str]
    arms: Mapping[str, ArmTook]
    mined_disk: int
    mined_memory: int | None
    rest: int
    gpus: int

    @property
    def fresh(self) -> float:
        """Tokens decoded for a rollout of a zero-hit prompt."""
        own = [r.decoded for name in self.zero_hit for r in self.rollouts[name]]
        return sum(own) / len(own)


@lru_cache(maxsize=256)  # each is asked for with every setting of the other stages
def mining(sample: Measured, rollouts: int, rounds: int, stop: int) -> tuple[Compute, int]:
    """What so many rollouts in so many rounds, up to ``stop`` correct ones, take of the measured prompts, and how many
    of these are then zero-hit.

    Fewer rollouts are the first of those that were drawn; one that was not drawn, since its prompt was solved, is taken
    to be as long as the prompt's others.
    """
    spent, zero_hit = Compute(), 0
    ends = [rollouts * number // rounds for number in range(1, rounds + 1)]
    for name, own in sample.rollouts.items():
        right = [r.verdict == "correct" for r in own]
        turns = next((n for n, end in enumerate(ends, 1) if sum(right[:end]) >= stop), rounds)
        drawn = own[: ends[turns - 1]]
        decoded = sum(r.decoded for r in drawn)
        missing = ends[turns - 1] - len(drawn)
        spent += Compute(turns * sample.lengths[name], decoded=decoded + round(missing * decoded / len(drawn)))
        zero_hit += all(r.verdict == "wrong" for r in drawn) and max(r.tokens for r in drawn) >= 2
    return spent, zero_hit


class Measuring(Alone):
    """This process alone, one part after another. By stage and arm: ``seconds``; ``sampling``, seconds of these in
    which samples were drawn; ``memory``, bytes at the peak of a part (without those whose peak is not known)."""

    def __init__(self) -> None:
        self.seconds, self.sampling = (
            defaultdict[tuple[str, str], float](float),
            defaultdict[tuple[str, str], float](float),
        )
        self.memory = Counter[str]()

    def run(self, job: Job, stage: Stage, parts: Sequence[Part], bar: Progress) -> None:
        for part in parts:
            arm = "" if part.arm is None else part.arm.name
            known, began, sampled = _peak_anew(job.policy.device), time.perf_counter(), job.sampling_seconds
            super().run(job, stage, [part], bar)
            self.seconds[stage.name, arm] += time.perf_counter() - began
            self.sampling[stage.name, arm] += job.sampling_seconds - sampled
            if known:
                self.memory[arm] = max(self.memory[arm], _peak(job.policy.device))


def measure(recovery: Recovery) -> Measured:
    """Run a recovery that has its prompts and nothing else from stage to stage, in this process, up to its verdicts."""
    recovery.scheduler = by = Measuring()
    with recovery.session():
        _warm(recovery)
        recovery.mine()
        recovery.revise()
        recovery.sample()
        recovery.verify()
    job = recovery.job
    arms = {arm.name: _arm(recovery, arm, by) for arm in recovery.all_arms()}
    rollouts = {name: own for parts in job.mined().values() for name, own in glances(job.run, parts).items()}
    whole = by.seconds[Mine.name, ""]
    sampling = by.sampling[Mine.name, ""]
    mined_disk = _bytes(job.run.path / Mine.folder)
    return Measured(
        config=recovery.config,
        usable=len(rollouts),
        lengths={prompt.id: len(prompt.ids) for prompt in recovery.prompts},
        rollouts=rollouts,
        sampling=sampling,
        verifying=whole - sampling,
        zero_hit=job.targets["prompt_id"].to_pylist(),
        aimed=frozenset(job.targets.filter(pc.is_valid(job.targets["wrong"]))["prompt_id"].to_pylist()),
        arms=arms,
        mined_disk=mined_disk,
        mined_memory=by.memory.get(""),
        rest=_bytes(job.run.path) - mined_disk - sum(arm.disk for arm in arms.values()),
        gpus=_gpus(recovery),
    )


def _arm(recovery: Recovery, arm: Arm, by: Measuring) -> ArmTook:
    parts = recovery.parts(arm)
    proposing, sampling = proposing_and_sampling(recovery.job, parts)
    samples, right = Counter[str](), Counter[str]()
    for _, sample, verdict in (row for part in parts for row in results(recovery.job, part)):
        samples[sample.prompt_id] += 1
        right[sample.prompt_id] += admitted(verdict)
    return ArmTook(
        prompts=sum(part.size for part in parts),
        proposing=replace(proposing, seconds=by.seconds[Propose.name, arm.name]),
        sampling=replace(sampling, seconds=by.seconds[Continue.name, arm.name]),
        verifying=by.seconds[Judge.name, arm.name],
        tries={name: Tries(count, right[name]) for name, count in samples.items()},
        disk=sum(_bytes(recovery.run.path / folder / arm.name) for folder in ORDER[1:]),
        memory=by.memory.get(arm.name),
    )


def _warm(recovery: Recovery) -> None:
    """What a process does once, however many prompts there are: workers of the verifier, buffers, compilation."""
    job, first = recovery.job, recovery.prompts[0]
    recovery.engine.generate([Request(first.ids, seed=0)], [job.config.sampling(1, left=1)])
    job.verifier.verify([(r"\frac{\sqrt{8}}{2}", r"\boxed{2^{1/2}}")])  # it takes a worker to tell


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _gpus(recovery: Recovery) -> int:
    if recovery.job.policy.device.type != "cuda":
        return 0
    vllm = recovery.config.vllm
    return 1 if isinstance(recovery.engine, HFEngine) else vllm.tensor_parallel * vllm.pipeline_parallel


_STATUS, _PEAKS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _peak_anew(device: torch.device) -> bool:
    """Begin to look for the peak of memory; False where the kernel does not let one, so that no peak is known."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        _PEAKS.write_text("5", encoding="ascii")
    except OSError:  # a sandbox may have no such file, or not let it be written
        return False
    return True


def _peak(device: torch.device) -> int:
    """Bytes of the device (of this process on a CPU) at the peak since the last look began."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text(encoding="ascii"))
    assert found is not None  # Linux has it for every process
    return int(found[1]) * 1024
