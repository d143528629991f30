"""``python -m benchmarks joint``: one run by one process, by two Ray workers, and by two processes that share it.

Each is the command, from its start to its end, on the bundled model of *rule* with the demo's settings, one thread a
process: what starting Ray, hiring workers and waiting at the end of a stage cost is in it. Every file's rows are
compared with those of one process.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks import harness
from benchmarks.chaos import FAMILY, content
from latentrevise.config import to_dict
from latentrevise.data.storage import write_jsonl
from latentrevise.demo import get_family, make_prompts, model_dir
from latentrevise.demo.run import demo_config

WORKERS = 2
WAYS: dict[str, Sequence[Sequence[str]]] = {  # the further words of each process's command
    "one process": ((),),
    f"--ray local --workers {WORKERS}": (("--ray", "local", "--workers", str(WORKERS)),),
    f"{WORKERS} processes, --shard": [("--shard", f"{i}/{WORKERS}") for i in range(WORKERS)],
}


def add_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--joint-prompts", type=int, default=192, help="prompts of the run; --rounds, too")


def seconds_of(place: Path, out: Path, words: Sequence[Sequence[str]]) -> float:
    """A run from the start of its commands until the last one has ended, gathered."""
    began = time.monotonic()
    given = ["--model", model_dir(FAMILY), "--prompts", place / "prompts.jsonl", "--config", place / "config.yaml"]
    base = [sys.executable, "-m", "latentrevise"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    told = [(out.parent / f"{out.name}-{i}.txt").open("w+") for i in range(len(words))]
    processes = [
        subprocess.Popen(
            list(map(str, [*base, "recover", *given, "--out", out, "--dtype", "float32", "--device", "cpu", *more])),
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        for more, file in zip(words, told, strict=True)
    ]
    for process, file in zip(processes, told, strict=True):
        if process.wait():
            file.seek(0)
            raise SystemExit(f"{' '.join(map(str, process.args))} ended with {process.returncode}:\n{file.read()}")
    if len(words) > 1:
        subprocess.run([*base, "collect", "--out", str(out)], check=True, capture_output=True, env=environment)
    return time.monotonic() - began


def main(options: argparse.Namespace) -> dict[str, Any]:
    heading = harness.heading("joint")
    place = Path(tempfile.mkdtemp(prefix="latentrevise-joint-"))
    family = get_family(FAMILY)
    write_jsonl(place / "prompts.jsonl", make_prompts(family, options.joint_prompts, split="report", seed=0))
    (place / "config.yaml").write_text(yaml.safe_dump(to_dict(demo_config(family)), sort_keys=False))
    rounds: list[dict[str, float]] = []
    expected: dict[str, Any] = {}
    for number in range(options.rounds):
        took = {}
        for index, (way, words) in enumerate(WAYS.items()):
            out = place / f"{number}-{index}"
            took[way] = seconds_of(place, out, words)
            found = content(out)
            expected = expected or found
            if found != expected:
                names = [name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)]
                raise SystemExit(f"{way}: other rows in {', '.join(sorted(names))}; the runs are kept in {place}")
        rounds.append(took)
        print(", ".join(f"{way}: {seconds:.0f} s" for way, seconds in took.items()), flush=True)
    shutil.rmtree(place)
    one = next(iter(WAYS))
    ratios = {way: [took[way] / took[one] for took in rounds] for way in WAYS}
    for way, own in ratios.items():
        print(f"{way}: {statistics.median(own):.2f} of one process ({min(own):.2f} to {max(own):.2f})")
    return heading | {
        "prompts": options.joint_prompts,
        "files": len(expected),
        "rounds": rounds,
        "of_one_process": {way: [statistics.median(own), min(own), max(own)] for way, own in ratios.items()},
    }
