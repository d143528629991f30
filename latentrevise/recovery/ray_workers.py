"""Parts run by Ray actors, on this machine or on a cluster: the extra ``ray``.

The driver is the process that holds the run: it plans the parts, hands each to an idle worker, and goes on when its
file is there. A worker is an actor with a policy, an engine and a verifier of its own; it reads and writes the run
directory, which all machines must see.
"""

from __future__ import annotations

import logging
import os
import statistics
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from latentrevise.errors import ConfigError, RunError
from latentrevise.recovery.job import Job
from latentrevise.recovery.progress import Progress
from latentrevise.recovery.rundir import RunDirectory
from latentrevise.recovery.schedule import run_part, terminable
from latentrevise.recovery.settings import RecoverConfig
from latentrevise.recovery.stages import Ahead, Part, Stage, give_up, output, settled

log = logging.getLogger(__name__)
Load = Callable[[], tuple[Any, Any, Any]]
"""Makes model, tokenizer and engine in a worker."""

_WAIT_SECONDS = 1.0  # for the next part to end, before stragglers are looked for
_PATIENCE_SECONDS = 60.0  # for a first worker before it is told what is waited for, and for a file to be seen
_STRAGGLES = 3.0  # times the median of its stage


class Worker:
    """What a Ray actor does. made: model and tokenizer, or what loads them and an engine. threads: of torch."""

    def __init__(self, made: Any, config: RecoverConfig, out: str, threads: int) -> None:
        self.made, self.config, self.out, self.threads = made, config, out, threads

    def ready(self) -> None:
        """Load what it works with; what is wrong there is raised in the driver."""
        import torch

        torch.set_num_threads(self.threads)
        model, tokenizer, engine = self.made() if callable(self.made) else (*self.made, None)
        self.job = Job(model, tokenizer, self.config, self.out, engine)

    def run(self, stage: Stage, part: Part) -> None:
        run_part(self.job, stage, part, Progress())


_Key = tuple[str, str, int]


@dataclass
class _Task:
    """A part that a worker is at, since when."""

    stage: Stage
    part: Part
    since: float = field(default_factory=time.monotonic)

    @property
    def key(self) -> _Key:
        return _key(self.stage, self.part)


class RayWorkers:
    """``count`` workers of a Ray cluster.

    address: ``local`` starts one on this machine, ``auto`` finds the one this machine belongs to, anything else is its
    address; where this process has joined one already, that is used. load: makes a worker's model, tokenizer and
    engine; without it each worker gets the driver's model and tokenizer, and samples by transformers.
    A worker that dies is replaced and its part is run again; a part over which ``deaths`` of them died is set aside. A
    part that takes three times as long as the others is given to an idle worker too: the first file stays.
    """

    finishes = True

    def __init__(self, address: str, count: int, load: Load | None = None) -> None:
        if count < 1:
            raise ConfigError(f"{count} Ray workers: it must be at least 1")
        try:
            import ray
        except ImportError as error:
            raise ConfigError(
                f"Ray is not installed ({error}); pip install 'latentrevise[ray]', or use --shard without it"
            ) from error
        self.ray: Any = ray
        self.address, self.count, self.load = address, count, load
        self._idle: list[Any] = []
        self._busy: dict[Any, tuple[Any, _Task | None]] = {}
        self._deaths: dict[_Key, list[str]] = defaultdict(list)
        self._failed_starts, self._ready_at = 0, 0.0
        self._made: Any = None

    @contextmanager
    def session(self, run: RunDirectory) -> Iterator[None]:
        with run.locked():
            joined = self.ray.is_initialized()
            if not joined:
                self._join()
            try:
                with terminable():  # behind Ray's own handler, which aborts
                    yield
            finally:
                for worker in [*self._idle, *(worker for worker, _ in self._busy.values())]:
                    self.ray.kill(worker)
                self._idle, self._busy, self._made = [], {}, None
                self._deaths.clear()
                if not joined:
                    self.ray.shutdown()

    def run(self, job: Job, stage: Stage, parts: Sequence[Part], bar: Progress, ahead: Ahead | None = None) -> None:
        open_parts, begun = {_key(stage, part): part for part in parts}, self._begun()  # ahead of this stage
        waiting = deque(part for key, part in open_parts.items() if key not in begun)
        took: list[float] = []
        self._ready_at = time.monotonic()
        while open_parts:
            self._hire(job)
            while waiting and self._idle:
                self._give(_Task(stage, waiting.popleft()))
            if self._idle and took:
                self._give_again(open_parts, statistics.median(took))
            if self._idle and ahead is not None:
                self._give_ahead(job.run, ahead)
            for task, death in self._ended():
                if death is None:
                    self._await_file(job.run, task.stage, task.part)
                elif not settled(job.run, task.stage, task.part) and not self._too_many(job, task, death):
                    if task.key in open_parts:
                        waiting.appendleft(task.part)
                    continue
                if task.key in open_parts:  # else it was ahead, or a straggler's twin was faster
                    took += [time.monotonic() - task.since] if death is None else []
                    bar.end(open_parts.pop(task.key).size)
            self._tell_of_none(job.config)

    def _begun(self) -> Counter[_Key]:
        """What workers are at, and how many."""
        return Counter(task.key for _, task in self._busy.values() if task is not None)

    def _too_many(self, job: Job, task: _Task, death: str) -> bool:
        """Whether this death over a part was one too many; the part is then set aside."""
        deaths = self._deaths[task.key]
        deaths.append(death)
        log.warning("a worker died over part %d in %s: %s", task.part.index, task.stage.name, death)
        if len(deaths) >= job.config.deaths:
            give_up(job, task.stage, task.part, deaths)
        return len(deaths) >= job.config.deaths

    def _await_file(self, run: RunDirectory, stage: Stage, part: Part) -> None:
        """Network file systems take a while to show a machine what another wrote. Raises RunError where it never
        comes."""
        until = time.monotonic() + _PATIENCE_SECONDS
        while not settled(run, stage, part):
            if time.monotonic() > until:
                raise RunError(
                    f"a Ray worker wrote {output(run, stage, part)}, and it is not here; give a --out that all machines"
                    " of the cluster see under the same path"
                )
            time.sleep(_WAIT_SECONDS)

    def _tell_of_none(self, config: RecoverConfig) -> None:
        """Say what is waited for where no worker has been ready for long."""
        now = time.monotonic()
        if self._idle or any(task is not None for _, task in self._busy.values()):
            self._ready_at = now
        elif now - self._ready_at > _PATIENCE_SECONDS:
            self._ready_at = now
            wanted, have = self._resources(config), self.ray.cluster_resources()
            told = "no Ray worker is ready: each loads a model and needs %s, the cluster has %s"
            log.warning(told, wanted, {name: have.get(name, 0) for name in wanted})

    # Workers

    def _join(self) -> None:
        quiet = {"log_to_driver": False, "logging_level": logging.WARNING}
        try:
            if self.address == "local":
                os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported home
                os.environ.setdefault("RAY_worker_niceness", "0")  # else they give way to all else on the machine
                cpus = max(self.count, os.cpu_count() or 1)
                self.ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
            else:
                self.ray.init(address=self.address, **quiet)
        except Exception as error:  # Ray raises this class itself when a node does not start in time
            raise RunError(
                f"no Ray cluster at {self.address!r} ({' '.join(str(error).split())[:300]}); start one with `ray start"
                " --head` and name it, try --ray local, or share the work without Ray by --shard"
            ) from error

    def _resources(self, config: RecoverConfig) -> dict[str, float]:
        gpu = {"GPU": 1.0} if self.ray.cluster_resources().get("GPU") else {}
        return {"CPU": 1.0, **gpu, **config.ray.resources}

    def _hire(self, job: Job) -> None:
        """New workers in the place of those that died."""
        while len(self._idle) + len(self._busy) < self.count:
            if self._made is None:
                self._made = self.load or self.ray.put((job.model, job.tokenizer))
            wanted = self._resources(job.config)
            cpus, gpus = wanted.pop("CPU"), wanted.pop("GPU", 0)
            hired = self.ray.remote(Worker).options(num_cpus=cpus, num_gpus=gpus, resources=wanted, max_restarts=0)
            worker = hired.remote(self._made, job.config, str(job.run.path.absolute()), max(1, int(cpus)))
            self._busy[worker.ready.remote()] = (worker, None)

    def _give(self, task: _Task) -> None:
        worker = self._idle.pop()
        self._busy[worker.run.remote(task.stage, task.part)] = (worker, task)

    def _give_again(self, open_parts: Mapping[_Key, Part], median: float) -> None:
        """Parts that straggle to idle workers too, each once more."""
        begun = self._begun()
        for task in [task for _, task in self._busy.values() if task is not None]:
            straggles = begun[task.key] == 1 and time.monotonic() - task.since > _STRAGGLES * median
            if self._idle and straggles and task.key in open_parts:
                self._give(_Task(task.stage, task.part))

    def _give_ahead(self, run: RunDirectory, ahead: Ahead) -> None:
        """Parts of a later stage to idle workers."""
        begun = self._begun()
        for part in ahead.ready(run):
            if self._idle and _key(ahead.stage, part) not in begun:
                self._give(_Task(ahead.stage, part))

    def _ended(self) -> Iterator[tuple[_Task, str | None]]:
        """Tasks that ended, with the reason where their worker died. Raises what a part raised."""
        from ray.exceptions import RayError, RayTaskError

        ended, _ = self.ray.wait(list(self._busy), num_returns=1, timeout=_WAIT_SECONDS)
        for reference in ended:
            worker, task = self._busy.pop(reference)
            death = None
            try:
                self.ray.get(reference)
                self._idle.append(worker)
            except RayTaskError as error:
                self._idle.append(worker)
                raise error.cause from error
            except RayError as error:
                death = " ".join(str(error).split())[:500]
                self.ray.kill(worker)  # it may only be out of reach
            if task is not None:
                yield task, death
            elif death is None:
                self._failed_starts = 0
            else:
                self._failed_starts += 1
                if self._failed_starts >= 3:
                    raise RunError(f"three Ray workers in a row died before their first part: {death}")


def _key(stage: Stage, part: Part) -> _Key:
    return (stage.name, "" if part.arm is None else part.arm.name, part.index)
