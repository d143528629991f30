"""The training study: what recovered rows do to the model that learns them, against other rows and other losses.

A *cell* is one family, one set of prompts, one training seed and one arm. Prompts to train on are of the ``train``
split, those that judge of ``report``; settings were chosen on ``develop``. Of the judging prompts, *hard* are those
that the start (the bundled model) solved in none of its samples, *solved* the others; the arm ``start`` is the
untouched model sampled anew, so that what it gains on the hard ones is the luck of the draw.

SFT: every arm learns as many rows in as many steps; half of them are ordinary correct rollouts, the other half its own:

    ordinary          more ordinary rollouts
    fresh-resampled   correct rollouts of zero-hit prompts, by plain resampling (16 samples a prompt)
    smuggled          right answers without a valid derivation: the full-hull ``latent``, guards off, invalid ones only
    latent-plausible  trajectories as they are shipped, guards on
    pivot             the same

    latent            the published recovery, guards off, valid or not: SFT as published
    self-hint, ...    what people would use instead (``--rivals``), guards off, valid or not

A source with fewer rows is repeated; the table says how many different ones there were. RLVR: see ``RLVR``; all arms
have the same prompts in the same order and as many rollouts, but for ``n=16``, and for an arm that is named after a
repair with ``=``: it spends what that repair cost, in token passes, on more rollouts of plain GRPO. Intervals: 95 %
bootstrap over judging prompts, each prompt's value a mean over the training seeds; ``p``: sign-flip test of the gains,
prompt by prompt. They say nothing about other models, and the runs stand beside them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import cycle, islice
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks import harness
from benchmarks.recovery import asked, publish, refuse_part
from benchmarks.training_plan import (
    ARMS,
    QUICK,
    RIVAL_RUN,
    RLVR,
    RLVR_RIVALS,
    RUNS,
    SFT,
    SFT_RIVALS,
    UNGUARDED,
    PrefixArm,
    Sizes,
    defined,
    plan,
)
from benchmarks.training_tables import brief, figure, pool, sign_flip, table, tables
from latentrevise.config import load_config
from latentrevise.data.boundary import Boundary
from latentrevise.data.formats import Row, prefix_rows, rollout_row, sft_rows
from latentrevise.data.prompts import load_prompts
from latentrevise.data.records import Prompt, Rollout, Trajectory, read_records, row_seed
from latentrevise.data.storage import write_json
from latentrevise.demo import get_family, make_prompts, model_dir
from latentrevise.demo.run import FAMILIES, demo_config
from latentrevise.errors import RunError
from latentrevise.model.loading import load_model
from latentrevise.recovery.evaluate import EvalConfig, Score, evaluate
from latentrevise.recovery.pipeline import Recovery
from latentrevise.recovery.rundir import RunDirectory
from latentrevise.recovery.settings import RecoverConfig
from latentrevise.train.distill import DistillSettings, train_distill
from latentrevise.train.repair import RepairSettings
from latentrevise.train.rlvr import RLVRSettings, train_rlvr
from latentrevise.train.settings import LoraSettings, begin
from latentrevise.train.sft import SFTSettings, ordinary_rollouts, rendered, train_sft

__all__ = [
    "QUICK",
    "RLVR",
    "SFT",
    "Cell",
    "Sizes",
    "brief",
    "main",
    "plan",
    "pool",
    "rows_of",
    "sign_flip",
    "table",
    "tables",
]
SFT_ARMS, RLVR_ARMS = SFT | SFT_RIVALS, RLVR | RLVR_RIVALS
TRAINER = {"logging_steps": 1, "save_strategy": "no", "gradient_checkpointing": False, "disable_tqdm": True}


@dataclass(frozen=True)
class Cell:
    """kind: ``start``, ``sft`` or ``rlvr``. prompts: seed of the prompts; order: of the training."""

    family: str
    kind: str
    arm: str
    prompts: int
    order: int

    @property
    def name(self) -> str:
        return f"{self.family}-p{self.prompts}-{self.kind}-{self.arm.replace(' ', '')}-{self.order}"

    def file(self, out: Path) -> Path:
        """What it came to."""
        return out / "cells" / f"{self.name}.json"

    def run(self, out: Path, name: str) -> RunDirectory:
        """One of the recoveries its rows come from."""
        return RunDirectory(out / f"{self.family}-p{self.prompts}" / name)


def mine(name: str, seed: int, out: Path, sizes: Sizes, rivals: bool = False) -> None:
    """The recoveries of a family's set of prompts, and which of the judging ones are hard; a worker's job."""
    torch.set_num_threads(1)
    family, place = get_family(name), out / f"{name}-p{seed}"
    model, tokenizer = load_model(model_dir(name), dtype="float32", device="cpu")
    prompts = make_prompts(family, sizes.mined, split="train", seed=seed)
    config = replace(demo_config(family, seed), audit=False, equal_compute=False)
    runs = RUNS | ({"rivals": RIVAL_RUN | asked(family)} if rivals else {})
    for run, changes in runs.items():
        Recovery(model, tokenizer, replace(config, **changes), place / run, progress=False).recover(prompts)
    if not (place / "hard.json").exists():
        scores = judge(model, tokenizer, name, seed, sizes, draw=0)
        write_json(place / "hard.json", [s.prompt_id for s in scores if s.correct == 0])


def judge(model: Any, tokenizer: Any, name: str, seed: int, sizes: Sizes, draw: int) -> list[Score]:
    """The judging prompts of that seed, sampled and checked. ``draw``: of the sampling."""
    family = get_family(name)
    prompts, _ = load_prompts(make_prompts(family, sizes.judged, split=sizes.split, seed=seed), tokenizer=tokenizer)
    config = EvalConfig(
        samples=sizes.samples,
        temperature=family.settings.temperature,
        max_new_tokens=family.settings.max_new_tokens,
        checker="latentrevise.demo:check",
        seed=draw,
    )
    return evaluate(model, tokenizer, prompts, config)[0]


def run(cell: Cell, out: Path, sizes: Sizes) -> str:
    """Train and judge a cell that is not there yet; a worker's job. Returns a line for the console."""
    torch.set_num_threads(1)
    place = out / "models" / cell.name
    made_by = defined(cell.kind, cell.arm)
    if cell.file(out).exists():
        known = json.loads(cell.file(out).read_text(encoding="utf-8"))
        if known.get("defined", made_by.get("defined")) != made_by.get("defined"):
            raise RunError(f"{cell.file(out)} is of another definition of that arm; delete it, or choose another --out")
        return f"{cell.name}: was there"
    began = time.perf_counter()
    model, tokenizer = load_model(model_dir(cell.family), dtype="float32", device="cpu")
    found: dict[str, Any] = {}
    if train := {"sft": fine_tune, "rlvr": reinforce}.get(cell.kind):
        place.mkdir(parents=True, exist_ok=True)
        with (place / "log.txt").open("w") as file, redirect_stdout(file), redirect_stderr(file):  # TRL and its bars
            found = train(cell, model, tokenizer, out, sizes)
        found["train_s"] = time.perf_counter() - began
    if found.get("different") != 0:  # an arm without a row trained nothing
        if found:
            model, tokenizer = load_model(place / "model", dtype="float32", device="cpu")
        scores = judge(model, tokenizer, cell.family, cell.prompts, sizes, draw=1 + cell.order)
        found["scores"] = {s.prompt_id: [s.samples, s.correct, s.valid] for s in scores}
    seconds = time.perf_counter() - began
    write_json(cell.file(out), {**asdict(cell), **made_by, **found, "seconds": seconds, "commit": harness.commit()})
    return f"{cell.name}: {seconds:.0f} s"


def rows_of(cell: Cell, tokenizer: Any, out: Path, sizes: Sizes) -> tuple[list[Row], dict[str, int]]:
    """The rows of an SFT arm, and how many of its own half are different, and known to be valid."""
    run, wanted = cell.run(out, "guarded"), sizes.rows * (2 if cell.arm == "ordinary" else 1)
    prompts = {p.id: p.ids for p in read_records(run.prompts, Prompt)}
    rollouts = ordinary_rollouts(read_records(run.path / "rollouts", Rollout), wanted, cell.order)
    ordinary = [rollout_row(prompts[r.prompt_id], r, tokenizer) for r in rollouts]
    if cell.arm == "ordinary":
        return [*islice(cycle(ordinary), wanted)], {"different": len(ordinary) // 2}
    source, strategy = SFT_ARMS[cell.arm]
    run = cell.run(out, source)
    found = [t for t in read_records(run.trajectories, Trajectory) if t.strategy == strategy]
    if cell.arm == "smuggled":
        found = [t for t in found if not t.valid]
    # One of each prompt before the second of any, as with ordinary rollouts.
    found = sorted(found, key=lambda t: (t.rank, row_seed(cell.order, "own", t.sample_id)))[: sizes.rows]
    own = sft_rows(rendered(found, "argmax", run), tokenizer)
    counts = {"different": len(own), "valid_rows": sum(t.valid is True for t in found)}
    return [*islice(cycle(ordinary), wanted), *islice(cycle(own), sizes.rows)], counts


def fine_tune(cell: Cell, model: Any, tokenizer: Any, out: Path, sizes: Sizes) -> dict[str, Any]:
    """Train an SFT arm."""
    return tuned(cell, model, tokenizer, out, sizes, rows_of(cell, tokenizer, out, sizes), LoraSettings())


def tuned(
    cell: Cell,
    model: Any,
    tokenizer: Any,
    out: Path,
    sizes: Sizes,
    learned: tuple[list[Row], dict[str, int]],
    lora: LoraSettings,
) -> dict[str, Any]:
    """Train on rows, of whose own half so many are different; without one there is no training."""
    rows, counts = learned
    if counts["different"]:
        arguments = {
            "max_steps": sizes.sft_steps,
            "warmup_steps": sizes.sft_steps // 8,
            "per_device_train_batch_size": sizes.sft_batch,
            "learning_rate": sizes.sft_rate,
        }
        settings = SFTSettings(lora=lora, trainer=TRAINER | arguments, seed=cell.order)
        train_sft(model, tokenizer, rows, out / "models" / cell.name, settings)
    return {**counts, "rows": len(rows), "tokens": sum(sum(row["completion_mask"]) for row in rows)}


def group_of(cell: Cell, out: Path, sizes: Sizes) -> int:
    """Rollouts a prompt."""
    arm = RLVR_ARMS[cell.arm]
    if not arm.equal_to:
        return round(arm.group * sizes.group)
    return paid(sizes.group, json.loads(replace(cell, arm=arm.equal_to).file(out).read_text(encoding="utf-8")))


def paid(group: int, cell: Mapping[str, Any]) -> int:
    """Rollouts a prompt for what the repair of a cell with groups of ``group`` cost. One that is paid for takes four
    passes a token: it is decoded, and trained on (1 forward, 2 for the backward pass)."""
    return round(group * (1 + cell["repair_passes"] / (4 * cell["sampled_tokens"])))


def reinforce(cell: Cell, model: Any, tokenizer: Any, out: Path, sizes: Sizes) -> dict[str, Any]:
    """Train an RLVR arm."""
    family, arm, group = get_family(cell.family), RLVR_ARMS[cell.arm], group_of(cell, out, sizes)
    config = demo_config(family)
    if arm.published:
        repair = replace(load_config(RLVRSettings, "paper-grpo").repair, answer_template=config.answer_template)
    else:
        own = {"guards": UNGUARDED} | asked(family) if cell.arm in RLVR_RIVALS else {}
        repair = repair_by(arm.repair, config, **own)
    arguments = {
        "max_steps": sizes.rl_steps,
        "warmup_steps": sizes.rl_steps // 8,
        "per_device_train_batch_size": sizes.rl_groups * group,
        "learning_rate": sizes.rl_rate,
        "num_generations": group,
        "max_completion_length": config.max_new_tokens,
        "temperature": config.temperature,
    }
    arguments |= dict(arm.trainer)
    prompts, place = read_records(cell.run(out, "guarded").prompts, Prompt), out / "models" / cell.name
    if isinstance(arm, PrefixArm):
        prompts = starts(cell, arm.starts, tokenizer, out, sizes)
        arguments["shuffle_dataset"] = False
    if not prompts:
        return {"different": 0}
    if arm.distill:
        if arm.distill == "opsd":  # a teacher for each rollout: it knows no groups
            del arguments["num_generations"]
        given = DistillSettings(method=arm.distill, trainer=TRAINER | arguments, seed=cell.order)
        train_distill(model, tokenizer, prompts, place, given)
        return {"group": group}
    settings = RLVRSettings(
        repair=repair, loss=arm.loss, dynamic_sampling=arm.dynamic, trainer=TRAINER | arguments, seed=cell.order
    )
    return {**reinforced(model, tokenizer, prompts, place, settings), "group": group}


def repair_by(strategy: str, config: RecoverConfig, **changes: Any) -> RepairSettings:
    """A trainer's repair by the settings of a recovery, but for what is changed."""
    shared = ("prefix_fraction", "prefix_boundary", "answer_template", "guards", "step_checker")
    kept = {name: getattr(config, name) for name in shared}
    return RepairSettings(strategy=strategy, rendering="argmax", **kept | changes)


def reinforced(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], place: Path, settings: RLVRSettings
) -> dict[str, Any]:
    """Train by RLVR. Returns the share of zero-hit groups at each step, and what was recovered at which cost."""
    trained = train_rlvr(model, tokenizer, prompts, place, settings)
    steps = [entry for entry in trained.state.log_history if "zero_hit/frac_groups" in entry]
    return {
        "zero_hit": [entry["zero_hit/frac_groups"] for entry in steps],
        "recovered_rows": fmean(entry["recovered/frac_rows"] for entry in steps),
        "repair_s": sum(entry["time/revise_s"] for entry in steps),
        "repair_passes": sum(entry["repair/passes"] for entry in steps),
        "sampled_tokens": sum(entry["sampled/tokens"] for entry in steps),
    }


def starts(cell: Cell, strategy: str, tokenizer: Any, out: Path, sizes: Sizes) -> list[Prompt]:
    """A prompt for each group of the training, the longest starts first; none where there is no trajectory.

    Fewer starts than groups come several times in a row; of more, some of each stage are left out.
    """
    found = [t for t in read_records(cell.run(out, "guarded").trajectories, Trajectory) if t.strategy == strategy]
    config = demo_config(get_family(cell.family))
    rows = prefix_rows(found, tokenizer, Boundary.of(config.prefix_boundary, tokenizer), config.pattern())
    groups = sizes.rl_steps * sizes.rl_groups
    chosen = [rows[i * len(rows) // groups] for i in range(groups)] if rows else []
    return [
        Prompt(f"{row['prompt_id']}/{row['kept']}", row["prompt"], tuple(row["prompt_ids"]), row["answer"])
        for row in chosen
    ]


def main(options: argparse.Namespace) -> dict[str, Any]:
    """``python -m benchmarks training``: see ``--help`` for the options it reads."""
    refuse_part(options)
    quick, out, sizes = options.quick, options.out, QUICK if options.quick else Sizes()
    sizes = replace(sizes, mined=options.mined or sizes.mined)
    chosen = options.families or (["rule"] if quick else list(FAMILIES))
    seeds = options.seeds or ([0] if quick else [0, 1])
    orders = options.models or ([0] if quick else [0, 1, 2])
    begin(out, "training study", sizes, plan())
    cells = [
        Cell(family, kind, arm, seed, order)
        for seed in seeds
        for order in orders
        for family in chosen
        for kind, arms in ARMS.items()
        for arm in arms
    ]
    asked_for = [cell for cell in cells if bool(defined(cell.kind, cell.arm)) == options.rivals]
    if options.jobs != 0:
        with ProcessPoolExecutor(options.jobs or os.cpu_count(), multiprocessing.get_context("spawn")) as workers:
            for seed in seeds:  # one after another, so that an unfinished study has whole seeds
                mined = partial(mine, seed=seed, out=out, sizes=sizes, rivals=options.rivals)
                list(workers.map(mined, chosen))
                own = [cell for cell in asked_for if cell.prompts == seed]
                later = [cell for cell in own if cell.kind == "rlvr" and RLVR_ARMS[cell.arm].equal_to]
                count = 0
                for wave in ([cell for cell in own if cell not in later], later):  # what a repair cost is known then
                    for finished in as_completed([workers.submit(run, cell, out, sizes) for cell in wave]):
                        count += 1
                        print(f"{finished.result()} ({count} of {len(own)} of seed {seed})", flush=True)
    found = [json.loads(c.file(out).read_text(encoding="utf-8")) for c in cells if c.file(out).exists()]
    study = {
        family: pool(
            [c for c in found if c["family"] == family],
            {p for path in out.glob(f"{family}-p*/hard.json") for p in json.loads(path.read_text(encoding="utf-8"))},
        )
        for family in chosen
    }
    document = {
        "name": "training",
        "command": harness.command_line(sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d"),
        "device": f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "latentrevise")},
        "sizes": asdict(sizes),
        "prompt_seeds": seeds,
        "training_seeds": orders,
        "cells": {"done": len(found), "of": len(cells), "seconds": sum(c["seconds"] for c in found)},
        "commits": Counter(c.get("commit", harness.NOT_RECORDED) for c in found),
        "families": study,
    }
    print(tables(document))
    figure(study, out / "training.png")
    write_json(out / "training.json", document)
    if options.publish:
        root = Path(__file__).parent.parent
        figure(study, root / "docs/figures/training.png")
        write_json(root / "benchmarks/results/training.json", document)
        publish(brief(document), root / "docs/training.md", "training")
    return document
