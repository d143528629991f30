"""Who runs the parts of a stage: this process alone, or together with others over one run directory.

A part is a pure function of its prompts and the settings and its file is written whole (see ``stages``). So a
scheduler decides who computes a part and when, never what: it may give a part to anyone, and to two.
"""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from latentrevise.errors import ConfigError
from latentrevise.recovery.job import Job
from latentrevise.recovery.leases import BEATS, Leases
from latentrevise.recovery.progress import Progress
from latentrevise.recovery.rundir import RunDirectory
from latentrevise.recovery.stages import Ahead, Part, Stage, give_up, settled

_LOOKS = 60  # at the parts of others in the time after which silence means death; each at most two seconds apart
_ENDED = 128 + signal.SIGTERM  # as shells tell it


class Scheduler(Protocol):
    """Who runs parts. finishes: whether it is also the one that gathers the results."""

    finishes: bool

    def session(self, run: RunDirectory) -> AbstractContextManager[None]:
        """The run held, against others, for as long as parts are run. Raises RunError where another holds it."""
        ...

    def run(self, job: Job, stage: Stage, parts: Sequence[Part], bar: Progress, ahead: Ahead | None = None) -> None:
        """Have these parts run, of which none was there a moment ago; return when each is, or is set aside. What a
        part raises is raised. ahead: what may be run in place of waiting; nothing waits for it."""
        ...


class Alone:
    """One process, one part after another."""

    finishes = True

    def session(self, run: RunDirectory) -> AbstractContextManager[None]:
        return run.locked()

    def run(self, job: Job, stage: Stage, parts: Sequence[Part], bar: Progress, ahead: Ahead | None = None) -> None:
        for part in parts:  # it never waits
            run_part(job, stage, part, bar)
            bar.end(part.size)


class Joint:
    """One of any number of processes that work on one run together, on any machines that see its directory.

    Each takes parts by leases, and at the end of a stage runs what it can ahead, or waits for the parts of others; they
    may come and go at any time.
    index, count: this process's place among those that are expected: it only orders which parts it tries first.
    """

    finishes = False

    def __init__(self, index: int, count: int) -> None:
        if not 0 <= index < count:
            raise ConfigError(f"shard {index}/{count}: it counts from 0, so give 0/{count} to {count - 1}/{count}")
        self.index, self.count = index, count
        self._ended = False

    @contextmanager
    def session(self, run: RunDirectory) -> Iterator[None]:
        with run.locked(shared=True), terminable(self._end):
            yield

    def run(self, job: Job, stage: Stage, parts: Sequence[Part], bar: Progress, ahead: Ahead | None = None) -> None:
        leases = Leases(job.run.leases, job.config.lease_seconds)
        waiting, claimed = self._preferred(parts), -math.inf
        spare = deque[Part]()
        while waiting:
            if self._ended:
                sys.exit(_ENDED)
            # Leases are looked at as often as they are touched: more would ask much of a file server, for each process
            # that waits looks at each part that another is at.
            claiming = time.monotonic() - claimed >= job.config.lease_seconds / BEATS
            if claiming:
                claimed = time.monotonic()
                spare = deque(self._preferred(ahead.ready(job.run)) if ahead else ())
            left = [part for part in waiting if not self._done(job, stage, part, leases, bar, claiming)]
            waited = len(left) == len(waiting)
            if waited and not (ahead and self._one_of(job, ahead.stage, spare, leases)):
                time.sleep(min(max(job.config.lease_seconds / _LOOKS, 0.1), 2.0))
            waiting = left

    def _one_of(self, job: Job, stage: Stage, parts: deque[Part], leases: Leases) -> bool:
        """Whether one of these parts was to be had; it was run, and it and those before it are looked at no more."""
        while parts:
            if self._done(job, stage, parts.popleft(), leases, Progress(), claiming=True):
                return True
        return False

    def _done(self, job: Job, stage: Stage, part: Part, leases: Leases, bar: Progress, claiming: bool) -> bool:
        """Whether a part is there or set aside; where it is not, after running it if ``claiming`` and nobody else
        does."""
        if not settled(job.run, stage, part):
            if not claiming:
                return False
            with leases.claim(f"{stage.name}.{'' if part.arm is None else part.arm.name}.{part.index:05d}") as dead:
                if dead is None:
                    return False
                if not settled(job.run, stage, part):  # by who gave the lease back a moment ago
                    if len(dead) >= job.config.deaths:
                        give_up(job, stage, part, [f"{holder} died over it" for holder in dead])
                    else:
                        run_part(job, stage, part, bar)
        bar.end(part.size)
        return True

    def _end(self) -> None:
        self._ended = True

    def _preferred(self, parts: Sequence[Part]) -> list[Part]:
        """Its own share first, then the others', each from its end: where their owners come last."""
        turned = [parts[(self.index + i) % self.count :: self.count] for i in range(self.count)]
        return [*turned[0], *(part for share in turned[1:] for part in reversed(share))]


def run_part(job: Job, stage: Stage, part: Part, bar: Progress) -> None:
    """One part in this process, shown on the bar."""
    job.enter(stage.name)
    bar.begin(stage.name if part.arm is None else part.arm.name, part.size)
    stage.run(job, part, bar)


@contextmanager
def terminable(told: Callable[[], None] = lambda: None) -> Iterator[None]:
    """SIGTERM (a queue that takes the machine back) ends the process by an exception, so that what it holds is given
    back; ``told`` is called first, for where the exception meets code that ignores all."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return

    def end(*_: object) -> None:
        told()
        sys.exit(_ENDED)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
