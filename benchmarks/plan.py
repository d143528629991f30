"""``python -m benchmarks plan``: what ``latentrevise plan`` says of the bundled families, over what they then take.

The plan runs ``--sample`` prompts of a family, the run all ``--mined``; of each stage and strategy the ratio of
prompts, token passes and seconds. Then settings are proposed for parts (SHARES) of the passes that were planned, from
the same sample, and run: what they take over their budget. Passes are the same on any machine; seconds are what this
one had to spare.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from latentrevise.config import unlike
from latentrevise.demo import get_family, make_prompts, model_dir
from latentrevise.demo.run import demo_config
from latentrevise.model.loading import load_model
from latentrevise.recovery.budget import propose
from latentrevise.recovery.estimate import Cost, Estimate, expected, sampled
from latentrevise.recovery.measure import ArmTook, Measured, measure, mining
from latentrevise.recovery.pipeline import Recovery
from latentrevise.recovery.settings import RecoverConfig

FAMILIES, PROMPTS, SEED = ("rule", "chain", "pair"), 192, 11
SMALL = {"rollouts": 8, "samples": 4, "equal_compute_cap": 64}  # of the demo's settings
BAR = 1.3
SHARES = (0.5, 0.15)


def by_passes(sample: Measured) -> Measured:
    """The same, with a second for each token pass and none for anything else: an hour is then 3,600 passes, on any
    machine."""

    def arm(own: ArmTook) -> ArmTook:
        proposing, sampling = (dataclasses.replace(c, seconds=float(c.passes)) for c in (own.proposing, own.sampling))
        return dataclasses.replace(own, proposing=proposing, sampling=sampling, verifying=0.0)

    own = sample.config
    spent, _ = mining(sample, own.rollouts, own.mine.rounds, own.mine.stop_after_correct)
    arms = {name: arm(took) for name, took in sample.arms.items()}
    return dataclasses.replace(sample, sampling=float(spent.passes), verifying=0.0, arms=arms)


def ratio(planned: float, taken: float) -> float | None:
    return planned / taken if planned and taken else None


def compared(planned: Sequence[Cost], taken: Sequence[Cost]) -> list[dict[str, Any]]:
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


def taken(model: tuple[Any, Any], config: RecoverConfig, rows: Sequence[Any], out: Path) -> Estimate:
    """What a run took."""
    run = Recovery(*model, config, out, progress=False)
    run.job.take_prompts(rows)
    return expected(measure(run), config)


def of_family(name: str, place: Path, count: int, size: int, strategies: tuple[str, ...]) -> dict[str, Any]:
    family = get_family(name)
    config = dataclasses.replace(demo_config(family), strategies=strategies, **SMALL)
    rows = make_prompts(family, count, split="develop", seed=SEED)
    model = load_model(model_dir(name), dtype="float32", device="cpu")
    sample, _ = sampled(Recovery(*model, config, place / f"{name}-plan", progress=False), rows, size)
    found = expected(sample, config)
    share, low, high = found.zero_hit
    print(f"{name}: planned on {size} of {count} prompts; zero-hit {share:.0%} [{low:.0%}, {high:.0%}]")
    lines = compared(found.costs, taken(model, config, rows, place / f"{name}-run").costs)
    for line in lines:
        shown = ("" if line[key] is None else f"{line[key]:.2f}" for key in ("prompts", "passes", "seconds"))
        print(f"  {line['name']:24}" + "".join(f"{text:>9}" for text in shown), flush=True)
    proposals = []
    for part in SHARES:
        budget = part * found.passes
        fitting = propose(by_passes(sample), budget / 3600)
        took = taken(model, fitting.found.config, rows, place / f"{name}-{part}").passes
        changes = unlike(fitting.found.config, config)
        proposals.append(
            {
                "share": part,
                "fits": fitting.fits,
                "budget": budget,
                "planned": fitting.found.passes,
                "taken": took,
                "over": took / budget,
                "changes": changes,
            }
        )
        print(f"  {part:.0%} of the passes: took {took / budget:.2f} of them, {changes}", flush=True)
    return {
        "family": name,
        "prompts": count,
        "sample": size,
        "zero_hit": found.zero_hit,
        "lines": lines,
        "proposals": proposals,
    }


def add_options(group: Any) -> None:
    group.add_argument("--sample", type=int, default=64, help="plan: prompts that are measured")


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
    over = [
        f"{family['family']} {proposal['share']:.0%}"
        for family in families
        for proposal in family["proposals"]
        if not proposal["fits"] or proposal["over"] > BAR
    ]
    print(f"passes beyond {BAR}: {', '.join(off) or 'none'}; proposals over {BAR}: {', '.join(over) or 'none'}")
    kept = {name: getattr(report, name) for name in ("name", "command", "date", "device", "threads", "load_average")}
    return {**kept, "commit": commit, "families": families, "beyond": off, "over": over}
