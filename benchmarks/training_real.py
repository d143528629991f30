"""The training study on real text: LoRA on the model of 135M, with what the study of word problems recovered.

Rows are those of its finished runs (``--runs``; by default of ``python -m benchmarks recovery --families gsm``), and no
setting was chosen on what judges: other problems of four and of five steps. *Hard* are those that the start solved in
none of its samples, *solved* the others; the arm ``start`` is the untouched model sampled anew.

SFT: every arm learns as many rows in as many steps, half of them ordinary correct rollouts, the other half its own,
repeated where there are fewer:

    ordinary         more ordinary rollouts
    fresh-resampled  right answers of zero-hit prompts among the 64 rollouts of the equal-compute control
    latent           the published recovery, guards off
    step-checked     as it is shipped, guards on
    branch-checked   the same
    reference        the zero-hit prompts' own solutions: what the best recovery could give

RLVR: GRPO on the runs' prompts, repaired by ``branch-checked``, against GRPO with as many more rollouts as that cost.
Intervals and ``p``: see ``benchmarks.training``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.recovery import publish
from benchmarks.recovery_strata import finished
from benchmarks.training import TRAINER, Cell, paid, reinforced, repair_by, tuned
from benchmarks.training_plan import Sizes
from benchmarks.training_tables import pool, tables
from latentrevise.data.formats import Row, rollout_row, sft_row
from latentrevise.data.prompts import load_prompts
from latentrevise.data.records import Prompt, Rollout, Sample, Start, Verdict, read_records, row_seed
from latentrevise.data.storage import write_json
from latentrevise.demo import real
from latentrevise.demo.wordproblems import NAME, parse, word_problems
from latentrevise.errors import ConfigError
from latentrevise.model.loading import load_model
from latentrevise.recovery.evaluate import EvalConfig, Score, evaluate
from latentrevise.recovery.metrics import POOL
from latentrevise.recovery.rundir import RunDirectory
from latentrevise.train.rlvr import RLVRSettings
from latentrevise.train.settings import LoraSettings, begin
from latentrevise.train.sft import ordinary_rollouts

REPAIR = "branch-checked"
GUARDED = ("step-checked", "branch-checked")
OWN = {"fresh-resampled": POOL, "latent": "latent"} | {name: name for name in GUARDED}
ARMS = {
    "start": ("start",),
    "sft": ("ordinary", *OWN, "reference"),
    "rlvr": (f"grpo = {REPAIR}", f"grpo + {REPAIR}"),
}
SIZES = Sizes(
    rows=64, sft_steps=32, sft_batch=8, sft_rate=5e-4, rl_steps=6, rl_groups=4, rl_rate=2e-4, judged=128, samples=8
)
QUICK = replace(SIZES, rows=4, sft_steps=1, sft_batch=4, rl_steps=1, rl_groups=1, group=2, judged=4, samples=8)
LORA = LoraSettings(rank=8, alpha=16)
JUDGING = 100  # seed of the problems


@dataclass(frozen=True)
class Pool:
    """The runs whose rows are learned, together."""

    places: tuple[Path, ...]

    @cached_property
    def runs(self) -> list[RunDirectory]:
        return [RunDirectory(place) for place in self.places]

    @cached_property
    def prompts(self) -> dict[str, Prompt]:
        return {p.id: p for run in self.runs for p in read_records(run.prompts, Prompt)}

    def records(self, folder: str, arm: str, cls: type) -> list[Any]:
        return [row for run in self.runs for part in run.parts(folder, arm) for row in read_records(part, cls)]

    def ordinary(self, count: int, seed: int, tokenizer: Any) -> list[Row]:
        rollouts = [r for run in self.runs for r in read_records(run.path / "rollouts", Rollout)]
        return [
            rollout_row(self.prompts[r.prompt_id].ids, r, tokenizer) for r in ordinary_rollouts(rollouts, count, seed)
        ]

    def recovered(self, arm: str, count: int, seed: int, tokenizer: Any, guarded: bool) -> tuple[list[Row], int]:
        """Right samples of zero-hit prompts, one of each before the second of any; how many are valid derivations."""
        starts = {s.start_id: s for s in self.records("starts", arm, Start)}
        samples = {s.sample_id: s for s in self.records("samples", arm, Sample)}
        right = [
            v
            for v in self.records("verdicts", arm, Verdict)
            if v.verdict == "correct" and not (guarded and v.guard is not None)
        ]
        right.sort(key=lambda v: row_seed(seed, "own", v.sample_id))
        seen, places = Counter[str](), {}
        for verdict in right:
            places[verdict.sample_id] = seen[verdict.prompt_id]
            seen[verdict.prompt_id] += 1
        right = sorted(right, key=lambda v: places[v.sample_id])[:count]
        rows = []
        for verdict in right:
            sample, start = samples[verdict.sample_id], starts[verdict.start_id]
            completion, ended = (*start.plain_ids, *sample.completion_ids), sample.finish_reason == "stop"
            rows.append(sft_row(self.prompts[verdict.prompt_id].ids, completion, tokenizer, ended=ended))
        return rows, sum(verdict.valid is True for verdict in right)

    def reference(self, count: int, seed: int, tokenizer: Any) -> list[Row]:
        """The solutions of zero-hit prompts."""
        names = sorted({v.prompt_id for v in self.records("verdicts", POOL, Verdict)})
        names.sort(key=lambda name: row_seed(seed, "own", name))
        return [
            sft_row(
                self.prompts[name].ids,
                tokenizer.encode(parse(self.prompts[name].text).solution, add_special_tokens=False),
                tokenizer,
                ended=True,
            )
            for name in names[:count]
        ]


def rows_of(cell: Cell, source: Pool, tokenizer: Any, sizes: Sizes) -> tuple[list[Row], dict[str, int]]:
    """The rows of an SFT arm, and how many of its own half are different, and known to be valid."""
    count = sizes.rows
    if cell.arm == "ordinary":
        rows = source.ordinary(2 * count, cell.order, tokenizer)
        return [*islice(cycle(rows), 2 * count)], {"different": len(rows) // 2}
    if cell.arm == "reference":
        own = source.reference(count, cell.order, tokenizer)
        valid = len(own)
    else:
        own, valid = source.recovered(OWN[cell.arm], count, cell.order, tokenizer, cell.arm in GUARDED)
    ordinary = source.ordinary(count, cell.order, tokenizer)
    counts = {"different": len(own), "valid_rows": valid}
    return [*islice(cycle(ordinary), count), *islice(cycle(own), count)], counts


def judge(model: Any, tokenizer: Any, sizes: Sizes, known: Sequence[str], draw: int) -> list[Score]:
    """Problems of five and of four steps, in equal parts, none of the ``known`` ones, sampled and checked."""
    half = sizes.judged // 2
    rows = [
        row
        for steps in (real.STEPS, real.STEPS - 1)
        for row in islice(
            (r for r in word_problems(2 * half, steps, split=sizes.split, seed=JUDGING) if r["prompt"] not in known),
            half,
        )
    ]
    config = EvalConfig(
        samples=sizes.samples,
        max_new_tokens=real.real_config().max_new_tokens,
        checker="latentrevise.demo.wordproblems:check",
        seed=draw,
    )
    return evaluate(model, tokenizer, load_prompts(rows, tokenizer=tokenizer)[0], config)[0]


def fine_tune(cell: Cell, model: Any, tokenizer: Any, out: Path, source: Pool, sizes: Sizes) -> dict[str, Any]:
    return tuned(cell, model, tokenizer, out, sizes, rows_of(cell, source, tokenizer, sizes), LORA)


def reinforce(cell: Cell, model: Any, tokenizer: Any, out: Path, source: Pool, sizes: Sizes) -> dict[str, Any]:
    config, group = real.real_config(), sizes.group
    repair = repair_by(REPAIR, config)
    if "=" in cell.arm:
        other = replace(cell, arm=f"grpo + {REPAIR}").file(out)
        group, repair = paid(group, json.loads(other.read_text(encoding="utf-8"))), replace(repair, strategy="none")
    arguments = {
        "max_steps": sizes.rl_steps,
        "warmup_steps": 1,
        "per_device_train_batch_size": group,  # all groups of a step at once would not fit 24 GiB
        "gradient_accumulation_steps": sizes.rl_groups,
        "learning_rate": sizes.rl_rate,
        "num_generations": group,
        "max_completion_length": config.max_new_tokens,
        "temperature": config.temperature,
    }
    settings = RLVRSettings(repair=repair, lora=LORA, trainer=TRAINER | arguments, seed=cell.order)
    prompts = list(source.prompts.values())
    found = reinforced(model, tokenizer, prompts, out / "models" / cell.name, settings)
    return {**found, "group": group}


def run(cell: Cell, out: Path, source: Pool, sizes: Sizes) -> str:
    """Train and judge a cell that is not there yet; a worker's job. Returns a line for the console."""
    torch.set_num_threads(1)
    if cell.file(out).exists():
        return f"{cell.name}: was there"
    began, place, base = time.perf_counter(), out / "models" / cell.name, real.taught_model(out / "models" / NAME)
    found: dict[str, Any] = {}
    if train := {"sft": fine_tune, "rlvr": reinforce}.get(cell.kind):
        place.mkdir(parents=True, exist_ok=True)
        model, tokenizer = load_model(base, dtype="bfloat16", device="cpu")  # the adapter: float32
        with (place / "log.txt").open("w") as file, redirect_stdout(file), redirect_stderr(file):  # TRL and its bars
            found = train(cell, model, tokenizer, out, source, sizes)
        found["train_s"] = time.perf_counter() - began
    if found.get("different") != 0:  # an arm without a row trained nothing
        model, tokenizer = load_model(place / "model" if found else base, dtype="bfloat16", device="cpu")
        scores = judge(model, tokenizer, sizes, [p.text for p in source.prompts.values()], draw=1 + cell.order)
        found["scores"] = {s.prompt_id: [s.samples, s.correct, s.valid] for s in scores}
    seconds = time.perf_counter() - began
    write_json(cell.file(out), {**asdict(cell), **found, "seconds": seconds, "commit": harness.commit()})
    return f"{cell.name}: {seconds:.0f} s"


def hard_of(out: Path, source: Pool, sizes: Sizes) -> set[str]:
    """The judging problems that the start solves in none of its samples; sampled once."""
    file = out / "hard.json"
    if not file.exists():
        model, tokenizer = load_model(real.taught_model(out / "models" / NAME), dtype="bfloat16", device="cpu")
        scores = judge(model, tokenizer, sizes, [p.text for p in source.prompts.values()], draw=0)
        write_json(file, [s.prompt_id for s in scores if s.correct == 0])
    return set(json.loads(file.read_text(encoding="utf-8")))


def main(options: argparse.Namespace) -> dict[str, Any]:
    """``python -m benchmarks training_real``: see ``--help`` for the options it reads."""
    out, sizes = options.out, QUICK if options.quick else SIZES
    there = sorted(path.parent for path in Path("gsm-study").glob(f"{NAME}-m*-p*/metrics.json"))
    places = tuple(finished(options.runs or there))
    if not places:
        raise ConfigError(
            "no finished run: name them with --runs, or make them by python -m benchmarks recovery --families gsm"
        )
    if options.publish and (options.quick or options.strategies):
        raise ConfigError("--publish puts a whole study into the documents; leave out --quick and --strategies, or it")
    source, orders = Pool(places), options.models or ([0] if options.quick else [0, 1])
    begin(out, "training study on real text", sizes, [ARMS, sorted(source.prompts)])
    hard = hard_of(out, source, sizes)
    asked = options.strategies or [arm for arms in ARMS.values() for arm in arms]
    waves = [
        [Cell(NAME, kind, arm, 0, order) for order in orders for kind, arm in arms if arm in asked]
        for arms in (
            [("start", "start"), *(("sft", arm) for arm in ARMS["sft"])],
            [("rlvr", ARMS["rlvr"][1])],
            [("rlvr", ARMS["rlvr"][0])],  # what the repair cost is known then
        )
    ]
    with ProcessPoolExecutor(options.jobs or os.cpu_count(), multiprocessing.get_context("spawn")) as workers:
        for wave in waves:
            for done in as_completed([workers.submit(run, cell, out, source, sizes) for cell in wave]):
                print(done.result(), flush=True)
    cells = [Cell(NAME, kind, arm, 0, order) for kind, arms in ARMS.items() for arm in arms for order in orders]
    found = [json.loads(cell.file(out).read_text(encoding="utf-8")) for cell in cells if cell.file(out).exists()]
    document = {
        "name": "training-real",
        "command": " ".join(["python -m benchmarks training_real --runs", *(place.name for place in places)]),
        "date": time.strftime("%Y-%m-%d"),
        "device": f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft", "latentrevise")},
        "sizes": asdict(sizes),
        "lora": asdict(LORA),
        "runs": [place.name for place in places],
        "training_seeds": orders,
        "cells": {"done": len(found), "of": len(cells), "seconds": sum(cell["seconds"] for cell in found)},
        "commits": Counter(cell["commit"] for cell in found),
        "families": {NAME: pool(found, hard, ARMS)},
    }
    print(tables(document))
    write_json(out / "training-real.json", document)
    if options.publish:
        root = Path(__file__).parent.parent
        write_json(root / "benchmarks/results/training-real.json", document)
        publish(tables(document), root / "docs/training.md", "training-real")
    return document
