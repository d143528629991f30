"""Who runs the parts of a stage: this process alone.

A part is a pure function of its prompts and the settings and its file is written whole (see ``stages``). So a
scheduler decides who computes a part and when, never what: it may give a part to anyone, and to two.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from tqdm.auto import tqdm

from latentrevise.recovery.job import Job
from latentrevise.recovery.rundir import RunDirectory
from latentrevise.recovery.stages import Part, Stage


class Scheduler(Protocol):
    """Who runs parts."""

    def session(self, run: RunDirectory) -> AbstractContextManager[None]:
        """The run held, against others, for as long as parts are run. Raises RunError where another holds it."""
        ...

    def run(self, job: Job, stage: Stage, parts: Sequence[Part], bar: tqdm) -> None:
        """Have these parts run, of which none was there a moment ago; return when each is. What a part raises is
        raised."""
        ...


class Alone:
    """One process, one part after another."""

    def session(self, run: RunDirectory) -> AbstractContextManager[None]:
        return run.locked()

    def run(self, job: Job, stage: Stage, parts: Sequence[Part], bar: tqdm) -> None:
        for part in parts:
            run_part(job, stage, part, bar)


def run_part(job: Job, stage: Stage, part: Part, bar: tqdm) -> None:
    """One part in this process, shown on the bar."""
    if part.arm is not None:
        bar.set_description(f"{stage.name} ({part.arm.name})")
    stage.run(job, part, bar)
    bar.update(part.size)
