"""What each step of the published revision brings: the paper's Figure 3, with derivations checked and a control.

For every zero-hit prompt continuations are sampled from the iterate after 0, 1, ... steps of the published method
(``ReviseConfig()``; 0 is the plain failed prefix at the same cut), all else alike. The harmonic steps do not depend on
K, so the iterate after k steps is what K = k returns. The same toward a random wrong answer, at every fifth step.

Reported a step: prompts with a right answer, with a valid derivation, with the wrong answer aimed at; tokens of a
continuation; share of continuations with a reflection marker. Intervals are 95 % Wilson intervals over prompts.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.recovery import Unit, commits_of, note_commit, recovery_of, refuse_part, train
from latentrevise.data.storage import atomic_write, write_json
from latentrevise.recovery.collect import results
from latentrevise.recovery.guards import MARKERS, markers, wilson
from latentrevise.recovery.metrics import WRONG
from latentrevise.recovery.mined import decoded_tokens
from latentrevise.recovery.outcome import Result
from latentrevise.recovery.pipeline import Recovery
from latentrevise.recovery.progress import Progress
from latentrevise.recovery.stages import Arm, Continue, Judge, Propose, output
from latentrevise.strategies import Latent, Strategy
from latentrevise.strategies.resample import ResamplePrefix

FAMILIES, MODELS, SEEDS, MINED = ("rule", "chain", "pair"), (0, 1), (0, 1, 2), 32
STEPS, AIMED_WRONG = 20, 5  # the last step; every how many the wrong target is tried
PUBLISHED = {4: 0.0, 5: 0.31, 9: 0.31, 10: 0.41, 15: 0.50, 18: 0.50, 20: 0.35}  # pass@8, 1.5B model (Figure 3)


def strategy(k: int, recovery: Recovery) -> Strategy:
    """Continue from the iterate after k steps."""
    config = recovery.config
    if k == 0:
        return ResamplePrefix("iterate-0", config.rho)
    revise = replace(config.latent, steps=k)
    return Latent(f"iterate-{k}", revise, forks=config.forks, rho=config.rho, text="inner-product")


def run(unit: Unit, out: Path) -> dict[str, Any]:
    """Run or take up one unit; a worker's job. Returns the zero-hit prompts and, a step, what its samples came to."""
    torch.set_num_threads(1)
    note_commit(unit, out, ("latent",))
    recovery, prompts = recovery_of(unit, out, ("latent",))
    found: dict[str, list[Result]] = {}
    with recovery.session():
        recovery.mine(prompts)
        for k in range(STEPS + 1):
            for wrong in (False, True) if k % AIMED_WRONG == 0 else (False,):
                own = strategy(k, recovery)
                arm = Arm(own.name + WRONG * wrong, own, wrong, recovery.config.samples)
                parts = recovery.parts(arm)
                for part in parts:
                    for stage in (Propose(), Continue(), Judge()):
                        if not output(recovery.run, stage, part).exists():
                            stage.run(recovery.job, part, Progress())
                found[arm.name] = [row for part in parts for row in results(recovery.job, part)]
    cases = recovery.cases()
    return {
        "zero_hit": len(cases),
        "aimed_wrong": sum(case.wrong is not None for case in cases),
        "steps": [_step(found[f"iterate-{k}"], found.get(f"iterate-{k}{WRONG}")) for k in range(STEPS + 1)],
    }


def _step(rows: Sequence[Result], wrong: Sequence[Result] | None) -> dict[str, Any]:
    """Counts of prompts, and sums over samples, of one step."""
    texts = [sample.completion for _, sample, _ in rows]
    any_marker = sum(any(markers([text])[name] for name in MARKERS) for text in texts)
    return {
        "right": len({v.prompt_id for _, _, v in rows if v.verdict == "correct"}),
        "valid": len({v.prompt_id for _, _, v in rows if v.verdict == "correct" and v.valid}),
        "wrong": None if wrong is None else len({v.prompt_id for _, _, v in wrong if v.hits_wrong}),
        "samples": len(rows),
        "tokens": sum(decoded_tokens(len(s.completion_ids), s.finish_reason) for _, s, _ in rows),
        "markers": any_marker,
    }


def pool(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The units of one family as one list of steps."""
    zero_hit, aimed = (sum(unit[key] for unit in found) for key in ("zero_hit", "aimed_wrong"))
    steps = []
    for k in range(STEPS + 1):
        own = [unit["steps"][k] for unit in found]
        samples = max(sum(step["samples"] for step in own), 1)
        steps.append(
            {
                "k": k,
                "right": wilson(sum(step["right"] for step in own), zero_hit),
                "valid": wilson(sum(step["valid"] for step in own), zero_hit),
                "wrong": None if own[0]["wrong"] is None else wilson(sum(step["wrong"] for step in own), aimed),
                "tokens": sum(step["tokens"] for step in own) / samples,
                "markers": sum(step["markers"] for step in own) / samples,
            }
        )
    return {"zero_hit": zero_hit, "steps": steps}


def table(document: dict[str, Any]) -> str:
    """A Markdown table of every step, per cent of zero-hit prompts of each family."""

    def percent(rate: Sequence[float] | None) -> str:
        return "-" if rate is None else f"{100 * rate[0]:.0f}"

    families = document["families"]
    heads = [f"{name} ({pooled['zero_hit']})" for name, pooled in families.items()]
    lines = ["Right answers [95 %]; valid derivations; wrong targets. Per cent.", ""]
    lines += [f"| steps | {' | '.join(heads)} | paper: right |", "|---" * (2 + len(families)) + "|"]
    for k in range(min(len(pooled["steps"]) for pooled in families.values())):
        cells = []
        for pooled in families.values():
            step = pooled["steps"][k]
            p, low, high = (100 * value for value in step["right"])
            cells.append(f"{p:.0f} [{low:.0f}, {high:.0f}]; {percent(step['valid'])}; {percent(step['wrong'])}")
        paper = f"{100 * PUBLISHED[k]:.0f}" if k in PUBLISHED else "-"
        lines.append(f"| {k} | {' | '.join(cells)} | {paper} |")
    return "\n".join([*lines, "", harness.provenance("runs", document["commits"])])


def figure(families: dict[str, dict[str, Any]], path: Path) -> None:
    """Right answers, valid derivations and wrong targets over the steps, a panel a family."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from latentrevise.report.drawing import CYCLE, MUTED, RC, RIGHT
    from latentrevise.report.drawing import WRONG as AIMED

    with mpl.rc_context(RC):
        drawing = Figure(figsize=(4.4 * len(families), 3.8), layout="constrained")
        panels = drawing.subplots(1, len(families), squeeze=False, sharey=True)[0]
        for axes, (family, pooled) in zip(panels, families.items(), strict=True):
            steps = pooled["steps"]
            for key, colour, label in (
                ("right", RIGHT, "right answer"),
                ("valid", CYCLE[2], "valid derivation"),
                ("wrong", AIMED, "wrong answer aimed at"),
            ):
                points = [(step["k"], *(100 * value for value in step[key])) for step in steps if step[key] is not None]
                at, rate, low, high = zip(*points, strict=True)
                axes.plot(at, rate, color=colour, marker="o", markersize=3, label=label)
                axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.plot(
                list(PUBLISHED), [100 * v for v in PUBLISHED.values()], "x", color=MUTED, label="paper, 1.5B, right"
            )
            axes.set(title=f"{family}: {pooled['zero_hit']} zero-hit prompts", xlabel="steps", ylim=(-2, None))
            axes.set_xticks(range(0, STEPS + 1, AIMED_WRONG))
        panels[0].set_ylabel("prompts, %")
        panels[-1].legend(loc="center left", bbox_to_anchor=(0, 0.6))
        with atomic_write(path) as temporary:
            drawing.savefig(temporary, format="png", dpi=160, facecolor="white", metadata={"Software": None})


def main(options: argparse.Namespace) -> dict[str, Any]:
    """``python -m benchmarks iterates``: see ``--help`` for the options it reads."""
    refuse_part(options)
    began = time.perf_counter()
    families, models, seeds = options.families or FAMILIES, options.models or MODELS, options.seeds or SEEDS
    units = [Unit(f, m, s, options.mined or MINED) for s in seeds for f in families for m in models]
    out: Path = options.out
    jobs = min(options.jobs or os.cpu_count() or 1, len(units))
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as workers:
        list(workers.map(partial(train, cache=out / "models"), [(f, m) for f in families for m in models]))
        found = []
        for unit, result in zip(units, workers.map(partial(run, out=out), units), strict=True):
            found.append((unit, result))
            print(f"{unit.name}: {result['zero_hit']} zero-hit ({len(found)} of {len(units)})", flush=True)
    document = {
        "name": "iterates",
        "command": harness.command_line(sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d"),
        "device": f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("torch", "transformers", "latentrevise")},
        "units": [asdict(unit) for unit in units],
        "commits": Counter(" and ".join(commits_of(unit, out)) for unit in units),
        "seconds_of_this_call": time.perf_counter() - began,
        "families": {family: pool([result for unit, result in found if unit.family == family]) for family in families},
    }
    print(table(document))
    figure(document["families"], out / "iterates.png")
    write_json(out / "iterates.json", document)
    if options.publish:
        root = Path(__file__).parent.parent
        figure(document["families"], root / "docs/figures/iterates.png")
        write_json(root / "benchmarks/results/iterates.json", document)
    return document
