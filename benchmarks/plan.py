"""``python -m benchmarks plan``: what ``latentrevise plan`` says of the bundled families, over what they then take.

The plan runs ``--sample`` prompts of a family, the run all ``--mined``; of each stage and strategy the ratio of
prompts, token passes and seconds. Passes are the same on any machine; seconds are what this one had to spare.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from latentrevise.demo import get_family, make_prompts, model_dir
from latentrevise.demo.run import demo_config
from latentrevise.model.loading import load_model
from latentrevise.recovery.estimate import Cost, costs_of, estimate
from latentrevise.recovery.pipeline import Recovery

FAMILIES, PROMPTS, SEED = ("rule", "chain", "pair"), 72, 11
SMALL = {"rollouts": 8, "samples": 4, "equal_compute_cap": 64}  # of the demo's settings
BAR = 1.3


def ratio(planned: float | None, taken: float | None) -> float | None:
    return None if not planned or not taken else planned / taken


def compared(planned: list[Cost], taken: list[Cost]) -> list[dict[str, Any]]:
    names = ("prompts", "passes", "seconds")
    return [
        {
            "name": run.name,
            **{f"planned_{name}": getattr(plan, name) for name in names},
            **{f"taken_{name}": getattr(run, name) for name in names},
            **{name: ratio(getattr(plan, name), getattr(run, name)) for name in names},
        }
        for plan, run in zip(planned, taken, strict=True)
    ]


def of_family(name: str, place: Path, count: int, sample: int, strategies: tuple[str, ...]) -> dict[str, Any]:
    family = get_family(name)
    config = dataclasses.replace(demo_config(family), strategies=strategies, **SMALL)
    rows = make_prompts(family, count, split="develop", seed=SEED)
    model = load_model(model_dir(name), dtype="float32", device="cpu")
    found = estimate(Recovery(*model, config, place / f"{name}-plan", progress=False), rows, sample)
    run = Recovery(*model, config, place / f"{name}-run", progress=False)
    with run.session():
        run.job.take_prompts(rows)
        taken = costs_of(run)
    share, low, high = found.zero_hit
    print(f"{name}: planned on {sample} of {count} prompts; zero-hit {share:.0%} [{low:.0%}, {high:.0%}]")
    lines = compared(found.costs, taken)
    for line in lines:
        shown = ("" if line[key] is None else f"{line[key]:.2f}" for key in ("prompts", "passes", "seconds"))
        print(f"  {line['name']:24}" + "".join(f"{text:>9}" for text in shown), flush=True)
    return {"family": name, "prompts": count, "sample": sample, "zero_hit": found.zero_hit, "lines": lines}


def add_options(group: Any) -> None:
    group.add_argument("--sample", type=int, default=36, help="plan: prompts that are measured")


def main(options: argparse.Namespace) -> dict[str, Any]:
    report, commit = harness.Report.start("plan", torch.device("cpu")), harness.commit()
    strategies = tuple(options.strategies or ("latent", "pivot", "resample"))
    print(f"{'planned over taken':26}{'prompts':>9}{'passes':>9}{'seconds':>9}")
    with tempfile.TemporaryDirectory(prefix="latentrevise-plan-") as place:
        families = [
            of_family(name, Path(place), options.mined or PROMPTS, options.sample, strategies)
            for name in options.families or FAMILIES
        ]
    off = [
        f"{family['family']} {line['name']}"
        for family in families
        for line in family["lines"]
        if line["passes"] is not None and not 1 / BAR <= line["passes"] <= BAR
    ]
    print(f"passes beyond {BAR}: {', '.join(off) or 'none'}")
    kept = {name: getattr(report, name) for name in ("name", "command", "date", "device", "threads", "load_average")}
    return {**kept, "commit": commit, "families": families, "beyond": off}
