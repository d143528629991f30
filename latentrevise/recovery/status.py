"""What a run is at, from its directory alone: for any terminal that sees it, while others work."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from latentrevise.recovery.leases import Leases, kernel
from latentrevise.recovery.rundir import RunDirectory
from latentrevise.recovery.stages import described, given_up

_RECENT = 30  # parts that the rate is taken from


@dataclass
class StageStatus:
    """A stage of a run. prompts, parts: done and planned. rate: prompts a second over its last parts; last: seconds
    since a part was finished; None where nothing is known."""

    name: str
    prompts: tuple[int, int]
    parts: tuple[int, int]
    rate: float | None
    last: float | None

    @property
    def eta(self) -> float | None:
        """Seconds until it is done, at its rate."""
        left = self.prompts[1] - self.prompts[0]
        return None if not self.rate else left / self.rate

    def __str__(self) -> str:
        (done, planned), (parts, of) = self.prompts, self.parts
        text = f"{self.name:9} {done:>9,} of {planned:,} prompts, {parts:,} of {of:,} parts"
        if self.rate is not None and done < planned:
            text += f"; {self.rate:,.3g} prompts/s, {_clock(self.eta or 0.0)} left"
        if self.last is not None and done < planned:
            text += f"; last part {_clock(self.last)} ago"
        return text


def status(path: str | os.PathLike[str]) -> str:
    """Stages that have begun, the holders of leases, parts set aside. Raises RunError where there is no run."""
    run = RunDirectory(path)
    header = run.read_header()
    lines = [f"{run.path}: {header['model']['path']}, begun {header['created']}"]
    lines += [str(stage) for stage in stages(run)]
    lines += [f"at work: {line}" for line in holders(run)]
    lines += [f"set aside: {described(note)}: {'; '.join(note['reasons'])}" for note in given_up(run)]
    if run.metrics.exists():
        lines.append(f"finished: {run.metrics}")
    return "\n".join(lines)


_GAUGES: dict[str, tuple[str, Callable[[StageStatus], float | None]]] = {
    "prompts_done": ("Prompts of a stage, once for each arm, that are done.", lambda stage: stage.prompts[0]),
    "prompts_planned": ("Prompts of a stage, once for each arm.", lambda stage: stage.prompts[1]),
    "parts_done": ("Parts of a stage that are done.", lambda stage: stage.parts[0]),
    "parts_planned": ("Parts of a stage.", lambda stage: stage.parts[1]),
    "prompts_per_second": ("Over the last parts of a stage.", lambda stage: stage.rate),
    "left_seconds": ("Until a stage is done, at its rate.", lambda stage: stage.eta),
    "last_part_age_seconds": ("Since a part of a stage was finished.", lambda stage: stage.last),
}


def open_metrics(path: str | os.PathLike[str]) -> str:
    """The numbers of ``status`` as OpenMetrics 1.0 text: gauges with the labels run and stage, what is not known left
    out; the leases that are held, and the parts that were set aside. Raises RunError where there is no run."""
    run = RunDirectory(path)
    run.read_header()
    begun, held, aside = stages(run), len(holders(run)), len(given_up(run))
    own = str(run.path).replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    found = {
        name: (told, [(f'run="{own}",stage="{stage.name}"', of(stage)) for stage in begun])
        for name, (told, of) in _GAUGES.items()
    }
    found["leases"] = ("Parts that a process holds.", [(f'run="{own}"', held)])
    found["parts_set_aside"] = ("Parts over which too many processes died.", [(f'run="{own}"', aside)])
    lines = []
    for name, (told, values) in found.items():
        lines += [f"# TYPE latentrevise_{name} gauge", f"# HELP latentrevise_{name} {told}"]
        lines += [f"latentrevise_{name}{{{labels}}} {value}" for labels, value in values if value is not None]
    return "\n".join([*lines, "# EOF"])


def stages(run: RunDirectory) -> list[StageStatus]:
    """The stages that were begun, in their order."""
    plans: dict[str, list[Path]] = {}
    for path in sorted((run.path / "plan").glob("*/*.json"), key=lambda path: path.stat().st_mtime_ns):
        plans.setdefault(run.read_plan(path)["stage"], []).append(path)
    return [_stage(run, name, own) for name, own in plans.items()]


def holders(run: RunDirectory) -> list[str]:
    """What each lease says of its holder; a silent one may be taken over soon."""
    found, leases = [], Leases(run.leases, float("inf"))
    for lease in leases.held():
        try:
            silent = time.time() - lease.path.stat().st_mtime
        except FileNotFoundError:
            continue
        here = lease.holder.get("kernel") == kernel()
        state = f"silent for {_clock(silent)}" if leases.alive(lease) else "dead"
        found.append(f"{lease} on {lease.name.strip('.')}, {state}{'' if here else ' (another machine)'}")
    return found


def _stage(run: RunDirectory, name: str, plans: list[Path]) -> StageStatus:
    finished: list[tuple[float, int]] = []  # when, how many prompts
    total, parts, aside = 0, 0, 0
    began = min(path.stat().st_mtime for path in plans)
    for path in plans:
        plan = run.read_plan(path)
        folder, arm, sizes = path.parent.name, plan["arm"], {int(i): size for i, size in plan["sizes"].items()}
        total, parts = total + sum(sizes.values()), parts + len(sizes)
        there = [(int(part.stem[5:]), part.stat().st_mtime) for part in run.parts(folder, arm)]
        finished += [(written, sizes[index]) for index, written in there if index in sizes]
        aside += sum(size for index, size in sizes.items() if run.aside(folder, index, arm).exists())
    finished.sort()
    timed = [part for part in finished if part[0] >= began]  # others were run ahead of the stage
    recent = timed[-_RECENT:]
    first = began if len(recent) == len(timed) else recent.pop(0)[0]
    span = recent[-1][0] - first if recent else 0.0
    rate = sum(size for _, size in recent) / span if span > 0 else None
    last = time.time() - finished[-1][0] if finished else None
    return StageStatus(name, (sum(size for _, size in finished), total - aside), (len(finished), parts), rate, last)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=max(round(seconds), 0)))
