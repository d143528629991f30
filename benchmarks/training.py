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

A source with fewer rows is repeated; the table says how many different ones there were. RLVR: plain GRPO, GRPO with
zero-hit groups repaired by two strategies, and three losses that learn from failures, all with the same prompts in the
same order and as many rollouts; the first training seed alone. Intervals: 95 % bootstrap over judging prompts, each
prompt's value a mean over the training seeds; they say nothing about other models, and the runs stand beside them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import cycle, islice
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from benchmarks import harness
from benchmarks.recovery import publish, refuse_part
from latentrevise.data.exports import Row, rollout_row, sft_rows
from latentrevise.data.prompts import load_prompts
from latentrevise.data.records import Prompt, Rollout, Trajectory, atomic_write, read_records, row_seed, write_json
from latentrevise.demo import get_family, make_prompts, model_dir
from latentrevise.demo.data import Split
from latentrevise.demo.run import FAMILIES, demo_config
from latentrevise.model.loading import load_model
from latentrevise.recovery.evaluate import EvalConfig, Score, evaluate
from latentrevise.recovery.guards import GuardConfig, bootstrap_mean, pass_at_k
from latentrevise.recovery.pipeline import Recovery
from latentrevise.recovery.rundir import RunDirectory
from latentrevise.train.repair import RepairSettings
from latentrevise.train.rlvr import RLVRSettings, train_rlvr
from latentrevise.train.settings import begin
from latentrevise.train.sft import SFTSettings, ordinary_rollouts, rendered, train_sft

UNGUARDED = GuardConfig(
    leak_weight=None, min_derivation_tokens=None, min_tokens=None, min_plain_logprob=None, told=False, max_mention=None
)
RUNS: dict[str, dict[str, Any]] = {
    "guarded": {"strategies": ("latent-plausible", "pivot")},
    "unguarded": {"strategies": ("latent", "resample"), "samples": 16, "guards": UNGUARDED},
}
SFT = {  # arm: the run and the strategy that its own half comes from
    "ordinary": ("guarded", ""),
    "fresh-resampled": ("unguarded", "resample"),
    "smuggled": ("unguarded", "latent"),
    "latent-plausible": ("guarded", "latent-plausible"),
    "pivot": ("guarded", "pivot"),
}
RLVR = {  # arm: the strategy that repairs, the loss
    "grpo": ("none", "trl"),
    "grpo + pivot": ("pivot", "trl"),
    "grpo + latent-plausible": ("latent-plausible", "trl"),
    "nsr": ("none", "nsr"),
    "w_reinforce": ("none", "w_reinforce"),
    "topr": ("none", "topr"),
}
ARMS = {"start": ("start",), "sft": tuple(SFT), "rlvr": tuple(RLVR)}
METRICS: dict[str, Callable[[int, int, int], float]] = {  # of samples, correct, valid
    "valid@1": lambda n, correct, valid: valid / n,
    "pass@1": lambda n, correct, valid: correct / n,
    "pass@8": lambda n, correct, valid: pass_at_k(n, correct, 8),
}

COSTS = ("different", "valid_rows", "tokens", "recovered_rows", "repair_s", "train_s")
TRAINER = {"logging_steps": 1, "save_strategy": "no", "gradient_checkpointing": False, "disable_tqdm": True}


@dataclass(frozen=True)
class Sizes:
    """What a cell spends.

    mined: prompts to train on, zero-hit or not. rows: an SFT arm's own rows, and ordinary ones besides. sft_steps,
    sft_batch (rows), sft_rate: of its training. rl_steps, rl_groups (prompts a step), group (rollouts a prompt),
    rl_rate. judged: prompts that judge, of ``split``; samples: of each.
    """

    mined: int = 320
    rows: int = 96
    sft_steps: int = 48
    sft_batch: int = 16
    sft_rate: float = 3e-4
    rl_steps: int = 24
    rl_groups: int = 8
    group: int = 8
    rl_rate: float = 3e-4
    judged: int = 192
    samples: int = 16
    split: Split = "report"


QUICK = Sizes(mined=32, rows=8, sft_steps=2, sft_batch=8, rl_steps=2, rl_groups=2, judged=24, samples=8)


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
        return f"{self.family}-p{self.prompts}-{self.kind}-{self.arm.replace(' + ', '+')}-{self.order}"

    def file(self, out: Path) -> Path:
        """What it came to."""
        return out / "cells" / f"{self.name}.json"

    def run(self, out: Path, name: str) -> RunDirectory:
        """One of the recoveries its rows come from."""
        return RunDirectory(out / f"{self.family}-p{self.prompts}" / name)


def mine(name: str, seed: int, out: Path, sizes: Sizes) -> None:
    """The recoveries of a family's set of prompts, and which of the judging ones are hard; a worker's job."""
    torch.set_num_threads(1)
    family, place = get_family(name), out / f"{name}-p{seed}"
    model, tokenizer = load_model(model_dir(name), dtype="float32", device="cpu")
    prompts = make_prompts(family, sizes.mined, split="train", seed=seed)
    config = replace(demo_config(family, seed), audit=False, equal_compute=False)
    for run, changes in RUNS.items():
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
    if cell.file(out).exists():
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
    write_json(cell.file(out), {**asdict(cell), **found, "seconds": seconds, "commit": harness.commit()})
    return f"{cell.name}: {seconds:.0f} s"


def rows_of(cell: Cell, tokenizer: Any, out: Path, sizes: Sizes) -> tuple[list[Row], dict[str, int]]:
    """The rows of an SFT arm, and how many of its own half are different, and known to be valid."""
    run, wanted = cell.run(out, "guarded"), sizes.rows * (2 if cell.arm == "ordinary" else 1)
    prompts = {p.id: p.ids for p in read_records(run.prompts, Prompt)}
    rollouts = ordinary_rollouts(read_records(run.path / "rollouts", Rollout), wanted, cell.order)
    ordinary = [rollout_row(prompts[r.prompt_id], r, tokenizer) for r in rollouts]
    if cell.arm == "ordinary":
        return [*islice(cycle(ordinary), wanted)], {"different": len(ordinary) // 2}
    source, strategy = SFT[cell.arm]
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
    """Train an SFT arm; without a row of its own it is not trained."""
    rows, counts = rows_of(cell, tokenizer, out, sizes)
    if counts["different"]:
        arguments = {
            "max_steps": sizes.sft_steps,
            "warmup_steps": sizes.sft_steps // 8,
            "per_device_train_batch_size": sizes.sft_batch,
            "learning_rate": sizes.sft_rate,
        }
        settings = SFTSettings(trainer=TRAINER | arguments, seed=cell.order)
        train_sft(model, tokenizer, rows, out / "models" / cell.name, settings)
    return {**counts, "rows": len(rows), "tokens": sum(sum(row["completion_mask"]) for row in rows)}


def reinforce(cell: Cell, model: Any, tokenizer: Any, out: Path, sizes: Sizes) -> dict[str, Any]:
    """Train an RLVR arm."""
    config, (strategy, loss) = demo_config(get_family(cell.family)), RLVR[cell.arm]
    repair = RepairSettings(
        strategy=strategy,
        prefix_fraction=config.prefix_fraction,
        prefix_boundary=config.prefix_boundary,
        answer_template=config.answer_template,
        rendering="argmax",
        guards=config.guards,
    )
    arguments = {
        "max_steps": sizes.rl_steps,
        "warmup_steps": sizes.rl_steps // 8,
        "per_device_train_batch_size": sizes.rl_groups * sizes.group,
        "learning_rate": sizes.rl_rate,
        "num_generations": sizes.group,
        "max_completion_length": config.max_new_tokens,
        "temperature": config.temperature,
    }
    settings = RLVRSettings(repair=repair, loss=loss, trainer=TRAINER | arguments, seed=cell.order)
    prompts = read_records(cell.run(out, "guarded").prompts, Prompt)
    trained = train_rlvr(model, tokenizer, prompts, out / "models" / cell.name, settings)
    steps = [entry for entry in trained.state.log_history if "zero_hit/frac_groups" in entry]
    return {
        "zero_hit": [entry["zero_hit/frac_groups"] for entry in steps],
        "recovered_rows": fmean(entry["recovered/frac_rows"] for entry in steps),
        "repair_s": sum(entry["time/revise_s"] for entry in steps),
    }


def rates(cells: Sequence[Mapping[str, Any]], hard: set[str]) -> dict[str, dict[str, float]]:
    """``hard pass@1`` and so on -> prompt -> the mean over the cells that judged it."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        for prompt, counts in cell.get("scores", {}).items():
            for metric, value in METRICS.items():
                found[f"{'hard' if prompt in hard else 'solved'} {metric}"][prompt].append(value(*counts))
    return {key: {prompt: fmean(values) for prompt, values in own.items()} for key, own in found.items()}


def pool(cells: Sequence[Mapping[str, Any]], hard: set[str]) -> dict[str, Any]:
    """The cells of one family as one table, a row an arm; gains are over the first arm of the same training, prompt by
    prompt."""
    arms: dict[str, dict[str, Any]] = {}
    for kind, (first, *_) in ARMS.items():
        base = rates([c for c in cells if (c["kind"], c["arm"]) == (kind, first)], hard)
        for arm in ARMS[kind]:
            own = [c for c in cells if (c["kind"], c["arm"]) == (kind, arm)]
            found = rates(own, hard)
            for key in [key for key in found if key in base and arm != first]:
                found[f"{key} gain"] = {p: v - base[key][p] for p, v in found[key].items() if p in base[key]}
            arms[arm] = {
                "kind": kind,
                "rates": {key: bootstrap_mean(list(of.values())) for key, of in found.items() if of},
                "runs": [fmean(rates([c], hard)["hard valid@1"].values()) for c in own if "scores" in c],
                "means": {key: fmean(c[key] for c in own) for key in COSTS if own and all(key in c for c in own)},
                "zero_hit": [fmean(step) for step in zip(*(c.get("zero_hit", ()) for c in own), strict=True)],
            }
    judged = {prompt for c in cells for prompt in c.get("scores", ())}
    return {"hard": len(judged & hard), "solved": len(judged - hard), "arms": arms}


def table(family: str, pooled: dict[str, Any], sizes: Sizes) -> str:
    """A Markdown table, per cent."""

    def rate(row: dict[str, Any], key: str) -> str:
        found = row["rates"].get(key)
        return "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * v for v in found)) if found else "-"

    def had(row: dict[str, Any]) -> str:
        means = row["means"]
        if row["zero_hit"]:
            shares = quarters(row["zero_hit"])
            return f"zero-hit {shares[0]:.0f} → {shares[-1]:.0f}"
        if "different" not in means:
            return "-"
        valid = f" ({means['valid_rows']:g} valid)" if "valid_rows" in means else ""
        return f"{means['different']:g} of {sizes.rows} rows{valid}"

    keys = [f"{part} {metric}" for part in ("hard", "solved") for metric in METRICS]
    lines = [
        f"**{family}** ({pooled['hard']} hard and {pooled['solved']} solved prompts)",
        "",
        f"| arm | its data | {keys[0]} | gain | by run | {' | '.join(keys[1:])} |",
        "|" + "---|" * (len(keys) + 4),
    ]
    for arm, row in pooled["arms"].items():
        runs = " / ".join(f"{100 * v:.1f}" for v in row["runs"])
        first, gain, *others = (rate(row, key) for key in (keys[0], f"{keys[0]} gain", *keys[1:]))
        lines.append(f"| {row['kind']} `{arm}` | {had(row)} | {first} | {gain} | {runs} | {' | '.join(others)} |")
    return "\n".join(lines)


def tables(document: Mapping[str, Any]) -> str:
    """What the study's document says, as it stands in docs/: a table a family, and from which code the cells come."""
    commits = document.get("commits", {harness.NOT_RECORDED: document["cells"]["done"]})
    sizes = Sizes(**document["sizes"])
    found = [table(family, pooled, sizes) for family, pooled in document["families"].items()]
    return "\n\n".join([*found, harness.provenance("cells", commits)])


def quarters(shares: Sequence[float]) -> list[float]:
    """Of the steps: the mean of each quarter, per cent. One step has few groups."""
    return [100 * float(part.mean()) for part in np.array_split(np.array(shares), min(4, len(shares)))]


def figure(study: dict[str, dict[str, Any]], path: Path) -> None:
    """A row a family: rates on hard and on solved prompts with intervals, and the zero-hit groups over training."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    from latentrevise.report.figures import CYCLE, INK, MARKERS, MUTED, RC, RIGHT, WRONG

    with mpl.rc_context(RC):
        drawing = Figure(figsize=(15, 4.6 * len(study)), layout="constrained")
        panels = drawing.subplots(len(study), 3, squeeze=False)
        for (family, pooled), (*rated, trained) in zip(study.items(), panels, strict=True):
            arms = pooled["arms"]
            for axes, part in zip(rated, ("hard", "solved"), strict=True):
                for metric, colour, shift in (("pass@1", WRONG, -0.15), ("valid@1", RIGHT, 0.15)):
                    known = [(y, row["rates"].get(f"{part} {metric}")) for y, row in enumerate(arms.values())]
                    found = [[y + shift, *(100 * v for v in rate)] for y, rate in known if rate]
                    y, p, low, high = np.array(found).reshape(-1, 4).T
                    axes.hlines(y, low, high, color=colour, linewidth=1.3)
                    axes.plot(p, y, "o", color=colour, markersize=5, label=metric)
                for place in (0.5, 0.5 + len(SFT)):
                    axes.axhline(place, color=MUTED, linewidth=0.6)
                labels = [arm if row["kind"] == "start" else f"{row['kind']} {arm}" for arm, row in arms.items()]
                axes.set_yticks(range(len(arms)), labels)
                axes.set(ylim=(len(arms) - 0.5, -0.5), xlabel="%", title=f"{family}: {pooled[part]} {part} prompts")
            for arm, colour, marker in zip(RLVR, (INK, *CYCLE), MARKERS, strict=False):
                if shares := arms[arm]["zero_hit"]:
                    means = quarters(shares)
                    trained.plot(range(1, len(means) + 1), means, color=colour, marker=marker, label=arm)
            trained.set(xlabel="quarter of the steps", ylabel="%", title=f"{family}: zero-hit groups while training")
            trained.xaxis.set_major_locator(MaxNLocator(integer=True))
        drawing.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper left", ncols=2)
        drawing.legend(*panels[0, 2].get_legend_handles_labels(), loc="outside upper right", ncols=6)
        with atomic_write(path) as temporary:
            drawing.savefig(temporary, format="png", dpi=130, facecolor="white", metadata={"Software": None})


def main(options: argparse.Namespace) -> dict[str, Any]:
    """``python -m benchmarks training``: see ``--help`` for the options it reads."""
    refuse_part(options)
    quick, out, sizes = options.quick, options.out, QUICK if options.quick else Sizes()
    sizes = replace(sizes, mined=options.mined or sizes.mined)
    chosen = options.families or (["rule"] if quick else list(FAMILIES))
    seeds = options.seeds or ([0] if quick else [0, 1])
    orders = options.models or ([0] if quick else [0, 1])
    begin(out, "training study", sizes, [SFT, RLVR])
    cells = [
        Cell(family, kind, arm, seed, order)
        for seed in seeds
        for order in orders
        for family in chosen
        for kind, arms in ARMS.items()
        if kind != "rlvr" or order == orders[0]
        for arm in arms
    ]
    if options.jobs != 0:
        with ProcessPoolExecutor(options.jobs or os.cpu_count(), multiprocessing.get_context("spawn")) as workers:
            for seed in seeds:  # one after another, so that an unfinished study has whole seeds
                list(workers.map(partial(mine, out=out, sizes=sizes), chosen, [seed] * len(chosen)))
                runs = [workers.submit(run, cell, out, sizes) for cell in cells if cell.prompts == seed]
                for count, finished in enumerate(as_completed(runs), 1):
                    print(f"{finished.result()} ({count} of {len(runs)} of seed {seed})", flush=True)
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
        publish(tables(document), root / "docs/training.md", "training")
    return document
