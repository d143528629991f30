"""What a run is at, from its directory alone: for any terminal that sees it, while others work."""

from __future__ import annotations

import os
import time
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
    recent = finished[-_RECENT:]
    first = began if len(recent) == len(finished) else recent.pop(0)[0]
    span = recent[-1][0] - first if recent else 0.0
    rate = sum(size for _, size in recent) / span if span > 0 else None
    last = time.time() - finished[-1][0] if finished else None
    return StageStatus(name, (sum(size for _, size in finished), total - aside), (len(finished), parts), rate, last)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=max(round(seconds), 0)))
