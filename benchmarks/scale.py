"""``python -m benchmarks scale``: a million prompts through the scheduler of joint processes, on one machine.

The work stands in: a part takes as long as its tokens do at ``--rate``, a token measured or promised elsewhere, and
its rows are short. All else is a run's own: prompts are read, stages planned, parts claimed by leases, written by the
record writers, a finished run is taken up again and gathered. Workers are threads that share one plan, of which one
runs at a time; their time is simulated, but for what the scheduler does, which takes in it as long as it took here.
Each measurement has a process of its own, whose peak memory it gives. A run is begun, and gathered, once for each size.
"""

from __future__ import annotations

import argparse
import copy
import heapq
import multiprocessing
import random
import resource
import shutil
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks import harness
from latentrevise.data.records import Rollout, Sample, Start, Verdict, read_records
from latentrevise.data.storage import write_jsonl
from latentrevise.demo import model_dir
from latentrevise.model.loading import load_model
from latentrevise.recovery import pipeline, schedule, stages
from latentrevise.recovery.job import Job
from latentrevise.recovery.pipeline import Recovery
from latentrevise.recovery.progress import Progress
from latentrevise.recovery.schedule import Alone, Joint
from latentrevise.recovery.settings import RecoverConfig
from latentrevise.recovery.stages import Continue, Judge, Mine, Part, Propose

ZERO_HIT = 0.3  # of the prompts
TOKENS = 1024  # of a rollout, as far as its time goes
SPREAD = 0.2  # of the time that parts of one size take, as a share
JUDGED = 1000  # samples a second by a worker's verifier
CONFIG = RecoverConfig(rollouts=16, samples=4, strategies=("resample",), chat="never")


@dataclass
class Worker:
    """A simulated process. now: its time; scheduling, work, idle: seconds of it; parts: that it ran."""

    index: int
    now: float = 0.0
    scheduling: float = 0.0
    work: float = 0.0
    idle: float = 0.0
    parts: int = 0
    since: float = 0.0
    turn: threading.Event = field(default_factory=threading.Event)


class Clock:
    """Simulated time of threads. Only the one whose time is the earliest runs, until it waits."""

    def __init__(self) -> None:
        self._queue: list[tuple[float, int, Worker]] = []
        self._own = threading.local()
        self.failure: BaseException | None = None

    @property
    def me(self) -> Worker:
        return self._own.worker  # type: ignore[no-any-return]

    def run(self, works: Sequence[Callable[[], None]]) -> list[Worker]:
        """Every thread to its end. Raises what one raised."""
        workers = [Worker(index) for index in range(len(works))]
        threads = [
            threading.Thread(target=self._begin, args=(worker, work), daemon=True)
            for worker, work in zip(workers, works, strict=True)
        ]
        self._queue = [(0.0, worker.index, worker) for worker in workers]
        for thread in threads:
            thread.start()
        self._next()
        for thread in threads:
            thread.join()
        if self.failure is not None:
            raise self.failure
        return workers

    def _begin(self, worker: Worker, work: Callable[[], None]) -> None:
        self._own.worker = worker
        self._resume()
        try:
            work()
        except BaseException as error:
            self.failure = self.failure or error
        self.pause()
        self._next()

    def pause(self) -> None:
        """What was done since the last wait was scheduling."""
        seconds = time.thread_time() - self.me.since
        self.me.now, self.me.scheduling = self.me.now + seconds, self.me.scheduling + seconds

    def sleep(self, seconds: float) -> None:
        """In place of ``time.sleep`` in the scheduler."""
        self.pause()
        self.me.idle += seconds
        self._wait(seconds)

    @contextmanager
    def working(self, seconds: float) -> Iterator[None]:
        """So long in simulated time, and then what leaves a trace, which takes none."""
        self.pause()
        self.me.work, self.me.parts = self.me.work + seconds, self.me.parts + 1
        self._wait(seconds)
        yield
        self.me.since = time.thread_time()

    def _wait(self, seconds: float) -> None:
        heapq.heappush(self._queue, (self.me.now + seconds, self.me.index, self.me))
        self._next()
        self._resume()

    def _next(self) -> None:
        if self._queue:
            worker_now, _, worker = heapq.heappop(self._queue)
            worker.now = worker_now
            worker.turn.set()

    def _resume(self) -> None:
        self.me.turn.wait()
        self.me.turn.clear()
        self.me.since = time.thread_time()


def stand_ins(clock: Clock, rate: float) -> dict[str, type]:
    """In place of the stages: the same input, files and records, without a model."""

    def seconds(part: Part, units: float) -> float:
        draw = random.Random(f"{part.arm and part.arm.name} {part.index}")
        return units * draw.lognormvariate(0.0, SPREAD)

    class Mined(Mine):
        def run(self, job: Job, part: Part, bar: Progress) -> None:
            count = job.config.rollouts
            with clock.working(seconds(part, part.size * count * TOKENS / rate)):
                rows = [
                    Rollout(p.id, f"{p.id}/{j}", (5, 6, 7), "5 6", "0", verdict, "stop", (-1.0, -1.0, -1.0))
                    for p in (job.prompts[row] for row in part.rows)
                    for verdict in ["wrong" if random.Random(p.id).random() < ZERO_HIT else "correct"]
                    for j in range(count)
                ]
                stages._publish(job, self, part, rows, Rollout)

    class Proposed(Propose):
        def run(self, job: Job, part: Part, bar: Progress) -> None:
            arm = part.of()
            with clock.working(0.001 * part.size):
                rows = [
                    Start(f"{arm.name}/{p.id}/0", p.id, None, p.answer, (), (), False, False, arm.samples, 0, 0, 0, 0.0)
                    for p in job.zero_hit_at(part.rows)
                ]
                stages._publish(job, self, part, rows, Start, {})

    class Continued(Continue):
        def run(self, job: Job, part: Part, bar: Progress) -> None:
            with clock.working(seconds(part, part.size * part.of().samples * TOKENS / rate)):
                starts, _ = stages.read_starts(job.run, part)
                ids, logprobs = (5, 6, 7), (-1.0, -1.0, -1.0)
                rows = [
                    Sample(s.start_id, s.prompt_id, f"{s.start_id}/{j}", ids, "5 6", "stop", logprobs, TOKENS / rate)
                    for s in starts
                    for j in range(s.n)
                ]
                stages._publish(job, self, part, rows, Sample)

    class Judged(Judge):
        def run(self, job: Job, part: Part, bar: Progress) -> None:
            with clock.working(part.size * part.of().samples / JUDGED):
                path = stages.read_output(job.run, "samples", part, "continue")
                rows = [
                    Verdict(s.sample_id, s.start_id, s.prompt_id, "0", "wrong", False, False, None, [], None, None)
                    for s in read_records(path, Sample)
                ]
                stages._publish(job, self, part, rows, Verdict)

    return {"Mine": Mined, "Propose": Proposed, "Continue": Continued, "Judge": Judged}


def recovery(out: Path) -> Recovery:
    model, tokenizer = load_model(model_dir("rule"), dtype="float32", device="cpu")
    return Recovery(model, tokenizer, CONFIG, out, progress=False, scheduler=Alone())


def measured(what: Callable[[], Any]) -> dict[str, Any]:
    """Seconds, those of a processor, what the call told, and the peak memory of this process from its start."""
    began, cpu = time.perf_counter(), time.process_time()
    told = what() or {}
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu, "memory": memory, **told}


def begin(out: Path, prompts: Path) -> dict[str, Any]:
    """A new run: its prompts read, checked and written."""
    run = recovery(out)
    return measured(lambda: run.job.take_prompts(prompts))


def plan_again(out: Path, prompts: Path) -> dict[str, Any]:
    """The whole of a finished run planned by a new process, by the command that began it."""
    run = recovery(out)

    def work() -> None:
        with run.session():
            run.work(prompts)

    return measured(work)


def gather(out: Path) -> dict[str, Any]:
    """The results of a finished run, by ``latentrevise collect``."""
    run = recovery(out)

    def work() -> None:
        with run.session():
            run.collect()

    return measured(work)


def simulate(out: Path, count: int, rate: float) -> dict[str, Any]:
    """``count`` workers, from prompts to verdicts."""
    clock, first = Clock(), recovery(out)

    def process(index: int) -> Callable[[], None]:
        run = copy.copy(first)
        run.scheduler = Joint(index, count)

        def work() -> None:
            with run.session():
                run.work()

        return work

    def all_of_them() -> dict[str, Any]:
        workers = clock.run([process(index) for index in range(count)])
        makespan = max(worker.now for worker in workers)
        total = {name: sum(getattr(worker, name) for worker in workers) for name in ("scheduling", "work", "idle")}
        files = sum(path.is_file() for path in out.rglob("*"))
        size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        parts = sum(worker.parts for worker in workers)
        return {"makespan": makespan, **total, "parts": parts, "files": files, "bytes": size}

    asleep = types.SimpleNamespace(sleep=clock.sleep, monotonic=lambda: clock.me.now)
    with patch.multiple(pipeline, **stand_ins(clock, rate)), patch.object(schedule, "time", asleep):
        return measured(all_of_them)


def row(number: int) -> dict[str, str]:
    """A prompt of 47 tokens, and an answer."""
    draw = random.Random(number)
    prompt = " ; ".join(f"{draw.randrange(100)} ? = {draw.randrange(100)}" for _ in range(8))
    return {"id": f"prompt-{number}", "prompt": prompt, "answer": str(draw.randrange(100))}


def cells(
    place: Path, prompts: int, workers: Sequence[int], rate: float, alone: Callable[..., Any]
) -> Iterator[dict[str, Any]]:
    """Of one size, a measurement for each number of workers."""
    source, fresh, gathered = place / f"{prompts}.jsonl", place / f"{prompts}", None
    write_jsonl(source, map(row, range(prompts)))
    begun = alone(begin, fresh, source)
    for count in workers:
        out = place / f"{prompts}-{count}"
        shutil.copytree(fresh, out)
        ran = alone(simulate, out, count, rate)
        again = alone(plan_again, out, source)
        gathered = gathered or alone(gather, out)
        shutil.rmtree(out)
        yield {"prompts": prompts, "workers": count, "begin": begun, "run": ran, "resume": again, "collect": gathered}


def line(found: dict[str, Any]) -> str:
    run, gib, apart = found["run"], 2**30, [found[name] for name in ("begin", "resume", "collect")]
    memory = max(one["memory"] for one in (run, *apart)) / gib
    return (
        f"{found['prompts']:>9,} {found['workers']:>7} {run['parts']:>7,} {run['work'] / 3600:>8,.0f}"
        f" {run['scheduling'] / run['work']:>11.4%} {run['scheduling'] / run['parts'] * 1e3:>7.1f}"
        f" {run['idle'] / (found['workers'] * run['makespan']):>6.1%} {run['cpu']:>7.0f}"
        + "".join(f" {one['cpu']:>9.1f} ({one['seconds']:.0f})" for one in apart)
        + f" {memory:>7.2f} {run['files']:>8,} {run['bytes'] / gib:>7.2f}"
    )


HEAD = (
    f"{'prompts':>9} {'workers':>7} {'parts':>7} {'work, h':>8} {'scheduling':>11} {'ms/part':>7} {'idle':>6}"
    f" {'run':>7} {'begin':>13} {'resume':>13} {'collect':>13} {'memory':>7} {'files':>8} {'GiB':>7}"
)


def add_options(group: Any) -> None:
    group.add_argument("--size", type=int, nargs="+", default=[10_000], help="scale: prompts")
    group.add_argument("--workers", type=int, nargs="+", default=[1, 8, 64], help="scale: of each size")
    group.add_argument("--rate", type=float, default=2500.0, help="scale: tokens a second of a worker")


def main(options: argparse.Namespace) -> dict[str, Any]:
    report, commit = harness.Report.start("scale", torch.device("cpu")), harness.commit()
    place = Path(tempfile.mkdtemp(prefix="latentrevise-scale-", dir=options.out))
    context = multiprocessing.get_context("spawn")

    def alone(function: Callable[..., Any], *given: Any) -> Any:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(function, *given).result()

    print(f"{options.rate:g} tokens a second and worker, {TOKENS} a rollout, {ZERO_HIT:.0%} zero-hit")
    print("run, begin, resume, collect: seconds of a processor (of a clock); memory: most of any process, GiB")
    print(HEAD, flush=True)
    found: list[dict[str, Any]] = []
    try:
        for prompts in options.size:
            for one in cells(place, prompts, options.workers, options.rate, alone):
                found.append(one)
                print(line(one), flush=True)
    finally:
        shutil.rmtree(place)
    settings = {"rate": options.rate, "tokens": TOKENS, "zero_hit": ZERO_HIT, "spread": SPREAD, "judged": JUDGED}
    settings |= {name: getattr(CONFIG, name) for name in ("rollouts", "samples", "chunk", "lease_seconds")}
    kept = {name: value for name, value in asdict(report).items() if name not in ("floor", "rows", "absent", "failed")}
    return {**kept, "commit": commit, "settings": settings, "cells": found}
