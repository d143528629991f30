"""``latentrevise demo``: the ordinary recovery, run on the two bundled families, and their comparison.

Nothing here is special to the demo but the prompts, the models and the settings that go with them: what it does for a
family is ``latentrevise recover`` with the prompts file and the settings file that it leaves in the family's folder.
"""

from __future__ import annotations

import time
from pathlib import Path

import typer
import yaml
from rich.console import Console

from latentrevise.config import to_dict
from latentrevise.data.storage import atomic_write, write_jsonl
from latentrevise.demo import Family, get_family, make_prompts, model_dir
from latentrevise.model.loading import load_model
from latentrevise.recovery.guards import GuardConfig
from latentrevise.recovery.pipeline import Recovered, Recovery
from latentrevise.recovery.settings import RecoverConfig
from latentrevise.report import console_table, write_report

FAMILIES = ("rule", "chain")  # the one built for the method, and its control

# Chosen on development prompts; docs/audits.md has what they keep and what they let through.
GUARDS = {"rule": GuardConfig(min_derivation_tokens=18, min_plain_logprob=-0.16)}


def demo_config(family: Family, seed: int = 0) -> RecoverConfig:
    """The settings of a family's run: the defaults, and what its texts call for."""
    chosen = family.settings
    return RecoverConfig(
        label=family.name,
        answer_template=chosen.answer_template,
        prefix_boundary=chosen.step_boundary,
        prefix_fraction=chosen.prefix_fraction,
        temperature=chosen.temperature,
        max_new_tokens=chosen.max_new_tokens,
        checker="latentrevise.demo:check",
        guards=GUARDS.get(family.name, GuardConfig()),
        seed=seed,
    )


def run_family(family: Family, out: Path, *, prompts: int, seed: int, progress: bool) -> Recovered:
    """Mine, revise, continue and verify one family in ``out/run``; prompts and settings are left beside it."""
    config = demo_config(family, seed)
    write_jsonl(out / "prompts.jsonl", make_prompts(family, prompts, split="report", seed=seed))
    with atomic_write(out / "config.yaml") as temporary:
        temporary.write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")
    # Stored in bfloat16, computed in float32: few laptops have bfloat16 arithmetic, and the models are tiny.
    model, tokenizer = load_model(model_dir(family.name), dtype="float32", device="cpu")
    return Recovery(model, tokenizer, config, out / "run", progress=progress).recover(out / "prompts.jsonl")


def run_demo(out: Path, *, prompts: int, seed: int, progress: bool) -> Path:
    """Both families, their tables, one report. Returns the report's path."""
    began, console, runs = time.perf_counter(), Console(), []
    for family in map(get_family, FAMILIES):
        console.print(f"[bold]{family.name}[/bold]: {family.about}")
        recovered = run_family(family, out / family.name, prompts=prompts, seed=seed, progress=progress)
        console.print(console_table(recovered.metrics))
        runs.append(recovered.out)
    page = write_report(runs, out / "report")
    typer.echo(f"report: {page} ({time.perf_counter() - began:.0f} s)")
    return page
