"""``python -m benchmarks chaos``: joint processes over one run, killed at random; the rows of an undisturbed one.

Rounds of a small recovery on a bundled model. In each, ``--jobs`` processes work on one new run by leases
(``--shard``), and every ``--every`` seconds on average one of them is killed (kill -9), told to end (SIGTERM), or
stopped for longer than a lease lives and then let go on, with a new one in the place of each that ended. When a process
comes to the end of the run it is collected and every file is compared with the undisturbed run's. Then nothing may be
left: no lease, no temporary file, no held lock, no process of theirs.

Workers are forked from a parent that has imported torch, which takes longer than a part.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import functools
import multiprocessing.connection
import os
import random
import shutil
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import harness
from latentrevise.data.atoms import read_atoms
from latentrevise.data.records import Prompt, Rollout, Sample, Start, Trajectory, Verdict, read_records
from latentrevise.demo import get_family, make_prompts, model_dir
from latentrevise.demo.run import demo_config
from latentrevise.model.loading import load_model
from latentrevise.recovery.pipeline import Recovery
from latentrevise.recovery.schedule import Alone, Joint, Scheduler
from latentrevise.recovery.settings import RecoverConfig, RoundsConfig
from latentrevise.recovery.targets import Target

FAMILY, PROMPTS, SEED = "rule", 24, 4
SIGNALS = {"kills": signal.SIGKILL, "terminations": signal.SIGTERM, "stalls": signal.SIGSTOP}
_MARK = "LATENTREVISE_CHAOS"  # in the environment of all processes of a run of this benchmark
_KINDS = {
    "prompts": Prompt,
    "rollouts": Rollout,
    "targets": Target,
    "starts": Start,
    "samples": Sample,
    "verdicts": Verdict,
    "trajectories": Trajectory,
}


@dataclasses.dataclass
class Round:
    """What happened in one round, and what was wrong afterwards."""

    kills: int
    terminations: int
    stalls: int
    seconds: float
    wrong: list[str]


def settings(lease_seconds: float = 2.0) -> RecoverConfig:
    """The demo's, small, in rounds. Any number may die over a part: here it is never the part's fault."""
    small = {"rollouts": 3, "samples": 2, "revised_rollouts": 2, "chunk": 3, "equal_compute_cap": 6}
    strategies = ("latent", "pivot", "resample-prefix")
    own = {"strategies": strategies, "deaths": 10**9, "lease_seconds": lease_seconds}
    own["continuations"] = RoundsConfig(rounds=2)
    return dataclasses.replace(demo_config(get_family(FAMILY)), **small, **own)


@functools.cache
def policy() -> tuple[Any, Any]:
    """The bundled model and its tokenizer; of a forked worker those of its parent."""
    return load_model(model_dir(FAMILY), dtype="float32", device="cpu")


def recovery(out: Path, config: RecoverConfig, scheduler: Scheduler) -> Recovery:
    return Recovery(*policy(), config, out, progress=False, scheduler=scheduler)


def prompts(count: int) -> list[dict[str, Any]]:
    return make_prompts(get_family(FAMILY), count, split="develop", seed=SEED)


def work(out: Path, index: int, count: int, size: int) -> None:
    """One of ``count`` joint processes, to the end of a run over ``size`` prompts."""
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a killed process would leave to the last one
    run = recovery(out, settings(), Joint(index, count))
    with run.session():
        run.work(prompts(size))


def content(out: Path) -> dict[str, Any]:
    """Everything a run computes, by file, without what a clock wrote."""
    found: dict[str, Any] = {}
    for path in sorted(out.rglob("*.parquet")):
        name = str(path.relative_to(out))
        kind = _KINDS[name.split("/")[0].removesuffix(".parquet")]
        rows = [dataclasses.asdict(row) for row in read_records(path, kind)]
        found[name] = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    for path in sorted(out.rglob("*.safetensors")):
        pairs, moved = read_atoms(path)
        atoms = {name: (ids.tolist(), weights.tolist()) for name, (ids, weights) in pairs.items()}
        offsets = {name: offset.tolist() for name, offset in moved.items()}
        found[str(path.relative_to(out))] = (atoms, offsets)
    return found


class Workers:
    """Joint processes over one run, each replaced when it ends before the run does."""

    def __init__(self, context: ForkServerContext, out: Path, count: int, size: int = PROMPTS) -> None:
        self.context, self.out, self.count, self.size = context, out, count, size
        self.living = [self._new(index) for index in range(count)]

    def _new(self, index: int) -> ForkServerProcess:
        process = self.context.Process(target=work, args=(self.out, index, self.count, self.size))
        process.start()
        return process

    def strike(self, draw: random.Random) -> str:
        """One of them killed, ended or stopped; another in its place where it is gone."""
        kind = draw.choices(tuple(SIGNALS), (8, 1, 1))[0]
        return self.hit(draw.randrange(self.count), kind)

    def hit(self, index: int, kind: str) -> str:
        """The kind of strike; ``late`` where it met a process that was done."""
        victim = self.living[index]
        assert victim.pid is not None
        number = SIGNALS[kind]
        with contextlib.suppress(ProcessLookupError):  # it is done, and the fork server has taken note of it
            os.kill(victim.pid, number)
            if kind == "stalls":
                time.sleep(1.5 * settings().lease_seconds)
                os.kill(victim.pid, signal.SIGCONT)
                return kind
        victim.join()
        if victim.exitcode == 0:  # it had come to the end
            return "late"
        if victim.exitcode not in (-number, 128 + number):
            raise SystemExit(f"a worker ended by itself with exit code {victim.exitcode}; its traceback is above")
        self.living[index] = self._new(index)
        return kind

    def wait(self, seconds: float) -> bool:
        """Whether one came to the end of the run within so many seconds. Raises where one failed by itself."""
        multiprocessing.connection.wait([process.sentinel for process in self.living], seconds)
        codes = [process.exitcode for process in self.living]
        if failed := [code for code in codes if code not in (0, None)]:
            raise SystemExit(f"a worker ended by itself with exit code {failed[0]}; its traceback is above")
        return 0 in codes

    def end(self) -> None:
        for process in self.living:
            process.join()
            if process.exitcode != 0:
                raise SystemExit(f"a worker ended with exit code {process.exitcode}; its traceback is above")


def one_round(context: ForkServerContext, out: Path, count: int, every: float, draw: random.Random) -> Counter[str]:
    """A run to its end under strikes: how many there were of each kind."""
    strikes: Counter[str] = Counter()
    workers = Workers(context, out, count)
    while not workers.wait(draw.expovariate(1 / every)):
        strikes[workers.strike(draw)] += 1
    workers.end()
    recovery(out, settings(), Alone()).recover()
    return strikes


def differences(out: Path, expected: Mapping[str, Any], before: set[int]) -> list[str]:
    """What is wrong with a finished run: files that are missing, strange or different, and whatever was left."""
    found = content(out)
    wrong = [f"{name}: {'missing' if name not in found else 'strange'}" for name in expected.keys() ^ found.keys()]
    wrong += [f"{name}: other rows" for name in expected.keys() & found.keys() if expected[name] != found[name]]
    strange = [path for path in out.rglob(".*") if path.name != ".lock"]
    wrong += [f"{path.relative_to(out)}: left behind" for path in [*strange, *out.rglob("*.lease"), *out.glob("aside")]]
    with (out / ".lock").open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            wrong.append(".lock: held")
    until = time.monotonic() + 10  # a verifier's process ends when it reads that its parent is gone
    while (left := marked() - before) and time.monotonic() < until:
        time.sleep(0.1)
    return wrong + [f"process {pid}: left behind" for pid in left]


def marked() -> set[int]:
    """The living processes that carry this benchmark's mark."""
    mark, found = f"{_MARK}={os.environ[_MARK]}".encode(), set()
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone, or another user's
            if mark in (place / "environ").read_bytes().split(b"\0"):
                found.add(int(place.name))
    return found


@contextlib.contextmanager
def warm() -> Iterator[ForkServerContext]:
    """What makes workers: by forking a process that has imported all they need."""
    os.environ[_MARK] = str(os.getpid())
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.chaos_parent"])
    first = context.Process(target=int)
    first.start()
    first.join()
    try:
        yield context
    finally:
        del os.environ[_MARK]


def add_options(group: Any) -> None:
    group.add_argument("--kills", type=int, default=100, help="kill -9, in as many rounds as they take")
    group.add_argument("--every", type=float, default=1.0, help="seconds between two strikes, on average")


def main(options: argparse.Namespace) -> dict[str, Any]:
    """``python -m benchmarks chaos --kills N``. The result says how many there were and what was wrong."""
    report, draw = harness.Report.start("chaos", torch.device("cpu")), random.Random(0)
    place, count, rounds = Path(tempfile.mkdtemp(prefix="latentrevise-chaos-")), options.jobs or 2, []
    expected = undisturbed(place / "undisturbed")
    with warm() as context:
        before = marked()
        while sum(r.kills for r in rounds) < options.kills:
            out, began = place / str(len(rounds)), time.monotonic()
            strikes = one_round(context, out, count, options.every, draw)
            wrong = differences(out, expected, before)
            rounds.append(Round(*(strikes[kind] for kind in SIGNALS), time.monotonic() - began, wrong))
            print(rounds[-1], flush=True)
            if not wrong:
                shutil.rmtree(out)
    total = {name: sum(getattr(r, name) for r in rounds) for name in SIGNALS}
    wrong = [told for r in rounds for told in r.wrong]
    print(f"{len(rounds)} rounds of {count} processes: {total}; wrong: {wrong or 'nothing'}")
    if wrong:
        raise SystemExit(f"the runs are kept in {place}")
    shutil.rmtree(place)
    return report.to_json() | {"rounds": [dataclasses.asdict(r) for r in rounds], **total}


def undisturbed(out: Path, size: int = PROMPTS) -> dict[str, Any]:
    """The rows of one process that nobody disturbs."""
    recovery(out, settings(), Alone()).recover(prompts(size))
    return content(out)
