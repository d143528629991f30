"""The recovery study: every strategy, every checkable task family, several models and several sets of prompts.

A *unit* is one family, one trained model and one set of prompts: an ordinary ``latentrevise recover`` run with the
derivation checker, the wrong-target audit and the equal-compute control, in its own folder under ``--out``; an
interrupted study takes its units up where they stopped. Prompts are of the ``report`` split, on which no setting was
chosen. Model 0 of a family is the bundled one, the others are trained by the same recipe from other seeds.

Counts are pooled over the units of a family. Intervals are 95 % Wilson intervals over the pooled prompts and say
nothing about other models; the spread over models stands beside them. *Equal compute* is plain resampling given what
the strategy cost in that unit (token passes: forward 1, backward 2, decoded 1, cached 0), by the unbiased pass@k from a
pool of rollouts. *Selectivity* is the rate of reaching the gold answer over the rate of reaching a random wrong answer
that the same procedure was given (without reading an answer: that its samples reached it by chance).
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
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.recovery_plans import GSM, PLANS
from benchmarks.recovery_strata import draw_further, gains, strata
from benchmarks.recovery_tables import PICTURED, SHOWN, brief, figure, guard_figure, shown_families, summary, tables
from latentrevise.data.records import Verdict, read_records
from latentrevise.data.storage import atomic_write, write_json
from latentrevise.demo import Family, get_family, make_prompts, real, wordproblems
from latentrevise.demo.joint import JointFamily
from latentrevise.demo.run import demo_config
from latentrevise.demo.train import model_for
from latentrevise.errors import ConfigError
from latentrevise.model.loading import load_model
from latentrevise.recovery.guards import GUARDS, guard_trade_off, wilson
from latentrevise.recovery.pipeline import Recovery
from latentrevise.recovery.rundir import RunDirectory
from latentrevise.strategies.dart import DartConfig
from latentrevise.strategies.evocot import EvoCoTConfig
from latentrevise.strategies.explain import ExplainConfig
from latentrevise.strategies.intervene import InterveneConfig
from latentrevise.strategies.pair import PairConfig
from latentrevise.strategies.retry import RetryConfig
from latentrevise.strategies.self_hint import SelfHintConfig

TOLD = "{prompt} = {answer} ; {prompt}"


@dataclass(frozen=True)
class Unit:
    """One run. model: the training seed; seed: of prompts and sampling; prompts: mined, not all are zero-hit."""

    family: str
    model: int
    seed: int
    prompts: int

    @property
    def name(self) -> str:
        return f"{self.family}-m{self.model}-p{self.seed}"

    def commits(self, out: Path) -> Path:
        """The file with the commits that its run was made by."""
        return out / f"{self.name}.commits.json"


def train(job: tuple[str, int], cache: Path) -> None:
    """Train a model that is not there yet; a worker's job."""
    torch.set_num_threads(1)
    if job[0] in GSM:
        real.taught_model(cache / wordproblems.NAME)
    else:
        model_for(*job, cache)


def run(
    unit: Unit, out: Path, strategies: tuple[str, ...], dtype: str, further: int
) -> tuple[Unit, dict[str, Any], float]:
    """Run or take up one unit; a worker's job. Returns its metrics and the seconds this call took."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    note_commit(unit, out, strategies)
    recovery, prompts = recovery_of(unit, out, strategies, dtype)
    metrics = recovery.recover(prompts).metrics
    if further:
        draw_further(recovery, prompts, further)
    return unit, metrics, time.perf_counter() - began


def recovery_of(
    unit: Unit, out: Path, strategies: tuple[str, ...], dtype: str = "float32"
) -> tuple[Recovery, list[dict[str, Any]]]:
    """A unit's run, and its prompts with their reference solutions."""
    if unit.family in GSM:
        steps = GSM[unit.family]
        model, tokenizer = load_model(real.taught_model(out / "models" / wordproblems.NAME), dtype=dtype, device="cpu")
        base = real.real_config(unit.seed)
        config = replace(
            base,
            max_new_tokens=base.max_new_tokens * steps // real.STEPS,
            strategies=strategies,
            label=unit.name,
            equal_compute_cap=128 if "self-hint" in strategies else 64,  # what the dearest strategy spends
        )
        prompts = wordproblems.word_problems(unit.prompts, steps, seed=unit.seed)
        return Recovery(model, tokenizer, config, out / unit.name, progress=False), prompts
    family = get_family(unit.family)
    config = replace(
        demo_config(family, unit.seed),
        strategies=strategies,
        label=unit.name,
        **asked(family),
        dart=DartConfig(cap=48),
        pair=_pairs(family),
    )
    model, tokenizer = load_model(model_for(unit.family, unit.model, out / "models"), dtype=dtype, device="cpu")
    prompts = [
        row | {"solution": " ".join(family.solution(family.parse(row["prompt"])))}
        for row in make_prompts(family, unit.prompts, split="report", seed=unit.seed)
    ]
    return Recovery(model, tokenizer, config, out / unit.name, progress=False), prompts


def asked(family: Family) -> dict[str, Any]:
    """Settings of the strategies that ask in words, by a worked example's form: the models read words of their task
    alone. And the checker of steps."""
    return {
        "explain": ExplainConfig(template=TOLD),
        "self_hint": SelfHintConfig(
            rationale="", hint=TOLD, solve="{hint} {prompt}", stop=(family.settings.step_boundary,)
        ),
        "retry": RetryConfig(shown="{prompt} {attempt} {prompt}", told="{prompt} {attempt} wait ,"),
        "intervene": InterveneConfig(correct=TOLD),
        "evocot": EvoCoTConfig(template=TOLD),
        "step_checker": "benchmarks.step_checkers:check_step",
    }


def note_commit(unit: Unit, out: Path, strategies: Sequence[str]) -> None:
    """Note what code makes a unit's rows: all commits under which it was taken up before it was finished, or given
    more strategies."""
    run = RunDirectory(out / unit.name)
    begun = run.header.exists()
    known = commits_of(unit, out) if begun else []
    grows = begun and run.read_header()["config"]["strategies"] != list(strategies)
    if (grows or not run.metrics.exists()) and harness.commit() not in known:
        write_json(unit.commits(out), [*known, harness.commit()])


def commits_of(unit: Unit, out: Path) -> list[str]:
    path = unit.commits(out)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else [harness.NOT_RECORDED]


def _pairs(family: Family) -> PairConfig:
    """As many decisions, and values of each, as the task has."""
    default = PairConfig()
    if not isinstance(family, JointFamily):
        return default
    values = max(default.max_values, *map(len, family.names))
    return replace(default, decisions=len(family.names), max_values=values)


def pool(found: Sequence[tuple[Unit, dict[str, Any]]], strategies: Sequence[str]) -> dict[str, Any]:
    """The units of one family as one table: a row a strategy, and the curve of plain resampling."""
    zero_hit = sum(m["zero_hit"] for _, m in found)
    rows = {name: _row([(u, m, m["arms"][name]) for u, m in found], zero_hit) for name in strategies}
    curves = [m["control_curve"] for _, m in found]
    points = min(map(len, curves))
    curve = [
        {
            "passes": _mean(found, [c[i]["tokens"] for c in curves]),
            "valid": _mean(found, [c[i]["valid_rate"][0] for c in curves]),
            "answer": _mean(found, [c[i]["recovered_rate"][0] for c in curves]),
        }
        for i in range(points)
        if len({c[i]["samples"] for c in curves}) == 1
    ]
    return {
        "mined": sum(u.prompts for u, _ in found),
        "zero_hit": zero_hit,
        "units": [u.name for u, _ in found],
        "strategies": rows,
        "resampling": curve,
    }


def _mean(found: Sequence[tuple[Unit, dict[str, Any]]], values: Sequence[float]) -> float:
    """Mean over prompts of a figure that each unit gives once."""
    weights = [m["zero_hit"] for _, m in found]
    return sum(w * v for w, v in zip(weights, values, strict=True)) / max(sum(weights), 1)


def _row(arms: Sequence[tuple[Unit, dict[str, Any], dict[str, Any]]], zero_hit: int) -> dict[str, Any]:
    def total(key: str) -> int:
        return sum(arm[key] or 0 for _, _, arm in arms)

    def over_prompts(value: Callable[[dict[str, Any]], float]) -> float:
        return _mean([(u, m) for u, m, _ in arms], [value(arm) for _, _, arm in arms])

    def resampling(key: str) -> dict[str, Any]:
        valid, answer = (over_prompts(lambda arm, r=rate: arm[key][r][0]) for rate in ("valid_rate", "recovered_rate"))
        return {
            "answer": wilson(answer * zero_hit, zero_hit),
            "valid": wilson(valid * zero_hit, zero_hit),
            "short_of_rollouts": sum(arm[key]["wanted"] > arm[key]["samples"] for _, _, arm in arms),
        }

    equal_compute = resampling("control")
    aimed = sum(m["zero_hit"] for _, m, arm in arms if arm["wrong_target_rate"] is not None)
    wrong = sum(m["zero_hit"] * arm["wrong_target_rate"][0] for _, m, arm in arms if arm["wrong_target_rate"])
    answer, valid = wilson(total("recovered"), zero_hit), wilson(total("valid"), zero_hit)
    by_model: dict[int, list[int]] = {}
    for unit, metrics, arm in arms:
        counts = by_model.setdefault(unit.model, [0, 0])
        counts[0] += arm["valid"] or 0
        counts[1] += metrics["zero_hit"]
    return {
        "answer": answer,
        "valid": valid,
        "valid_by_model": {model: hit / max(of, 1) for model, (hit, of) in by_model.items()},
        "wrong_target": wilson(wrong, aimed) if aimed else None,
        "selectivity": answer[0] / (wrong / aimed) if aimed and wrong else None,
        "passes": over_prompts(lambda arm: arm["compute"]["per_prompt"]),
        "seconds": sum(arm["seconds"] for _, _, arm in arms) / max(zero_hit, 1),
        "equal_compute": equal_compute,
        "equal_seconds": resampling("control_seconds"),
        "ratio": valid[0] / equal_compute["valid"][0] if equal_compute["valid"][0] else None,
        "admitted": total("admitted"),
        "admitted_valid": total("admitted_valid"),
    }


def guards(units: Sequence[Unit], out: Path) -> list[dict[str, Any]]:
    """The guards' trade-off, chosen on the first set of prompts and measured on the others; empty with a single set.

    Of each point: the thresholds, and on the other sets ``kept`` (of the valid samples) and ``contamination`` (invalid
    among the admitted), both with the interval as if samples were independent.
    """
    first = min(unit.seed for unit in units)
    chosen_on = [s for unit in units if unit.seed == first for s in _judged(out / unit.name)]
    others = [s for unit in units if unit.seed != first for s in _judged(out / unit.name)]
    points = []
    for point in guard_trade_off(chosen_on) if others else ():
        limits = [(GUARDS[code], threshold) for code, threshold in point["thresholds"].items()]
        admitted = [
            valid
            for found, valid in others
            if not any(g.signal in found and g.rejects(found[g.signal], threshold) for g, threshold in limits)
        ]
        points.append(
            {
                "thresholds": point["thresholds"],
                "kept": wilson(sum(admitted), sum(valid for _, valid in others)),
                "contamination": wilson(len(admitted) - sum(admitted), len(admitted)),
            }
        )
    return points


def _judged(run_directory: Path) -> list[tuple[dict[str, float], bool]]:
    """Signals and validity of every sample of a strategy that has the right answer."""
    directory = RunDirectory(run_directory)
    arms = [path.name for path in sorted((run_directory / "verdicts").iterdir()) if "@" not in path.name]
    verdicts = [v for arm in arms for part in directory.parts("verdicts", arm) for v in read_records(part, Verdict)]
    return [(v.signals or {}, bool(v.valid)) for v in verdicts if v.verdict == "correct"]


def real_text(options: argparse.Namespace) -> str | None:
    """The family of a study on a real language model, which has plans of its own."""
    (family, *others) = options.families or [None]
    return family if family in GSM and not others else None


def study_of(options: argparse.Namespace) -> str:
    """Which plan the options ask for."""
    asked = [name for name in ("quick", "variants", "rivals") if getattr(options, name)]
    if len(asked) > 1:
        raise ConfigError(f"{' and '.join(asked)} are studies of their own; ask for one")
    family = real_text(options)
    if not family:
        return asked[0] if asked else "recovery"
    named = "-".join([family, *asked])
    if named not in PLANS:
        raise ConfigError(f"{family} has no study --{asked[0]}; leave it out")
    return named


def refuse_part(options: argparse.Namespace) -> None:
    """Raise ConfigError where ``--publish`` would put less than a whole study into the documents."""
    parts = ("quick", "families", "models", "seeds", "mined", "strategies")
    changed = [key for key in parts if getattr(options, key) and not (key == "families" and real_text(options))]
    if options.publish and changed:
        raise ConfigError(f"--publish puts a whole study into the documents; leave out --{', --'.join(changed)}, or it")


def publish(text: str, document: Path, study: str = "recovery") -> None:
    """Replace what stands between the study's markers in a document."""
    begin, end = f"<!-- {study} study: begin -->", f"<!-- {study} study: end -->"
    page = document.read_text(encoding="utf-8")
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"{document} needs the lines {begin!r} and {end!r} once each, around the study's table")
    head, rest = page.split(begin)
    with atomic_write(document) as temporary:
        temporary.write_text(f"{head}{begin}\n{text}\n{end}{rest.split(end)[1]}", encoding="utf-8")


def main(options: argparse.Namespace) -> dict[str, Any]:
    """``python -m benchmarks recovery``: see ``--help`` for the options it reads."""
    began = time.perf_counter()
    name = study_of(options)
    (dtype,) = options.dtype or ["float32"]
    plan = PLANS[name]
    refuse_part(options)
    chosen, models, seeds = (
        options.families or plan.families,
        options.models or plan.models,
        options.seeds or plan.seeds,
    )
    strategies = tuple(options.strategies or plan.strategies)
    further = 0 if options.strategies else plan.further  # they say something of the prompts, not of some strategies
    units = [
        Unit(family, model, seed, options.mined or plan.mined)
        for seed in seeds
        for family in chosen
        for model in models
    ]
    out: Path = options.out
    jobs = options.jobs or os.cpu_count() or 1
    found: dict[str, list[tuple[Unit, dict[str, Any]]]] = {family: [] for family in chosen}
    with ProcessPoolExecutor(min(jobs, len(units)), multiprocessing.get_context("spawn")) as workers:
        list(workers.map(partial(train, cache=out / "models"), [(f, m) for f in chosen for m in models]))
        runs = [workers.submit(run, unit, out, strategies, dtype, further) for unit in units]
        for count, finished in enumerate(as_completed(runs), 1):
            unit, metrics, seconds = finished.result()
            found[unit.family].append((unit, metrics))
            print(f"{unit.name}: {metrics['zero_hit']} zero-hit, {seconds:.0f} s ({count} of {len(units)})", flush=True)
    order = {unit: i for i, unit in enumerate(units)}
    study = {
        family: pool(sorted(own, key=lambda item: order[item[0]]), strategies)
        | {"guards": guards([unit for unit, _ in own], out)}
        | {"strata": strata([out / unit.name for unit, _ in own], strategies)}
        | {"gains": gains([out / unit.name for unit, _ in own], strategies)}
        for family, own in found.items()
        if sum(m["zero_hit"] for _, m in own)
    }
    document = {
        "name": name,
        "command": harness.command_line(sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d"),
        "device": f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("torch", "transformers", "latentrevise")},
        "dtype": dtype,
        "units": [asdict(unit) for unit in units],
        "commits": Counter(" and ".join(commits_of(unit, out)) for unit in units),
        "settings": json.loads((out / units[0].name / "run.json").read_text())["config"],
        "seconds_of_this_call": time.perf_counter() - began,  # fewer than in all where runs were taken up
        "families": study,
    }
    print(tables(document))
    figure(study, out / "recovery.png")
    if len(seeds) > 1:
        guard_figure(study, out / "guards.png")
    write_json(out / "recovery.json", document)
    if options.publish:
        root = Path(__file__).parent.parent
        write_json(root / f"benchmarks/results/{name}.json", document)
        if name in PICTURED:
            figure(study, root / f"docs/figures/{name}.png")
        if name in SHOWN:
            publish(brief(document), root / "docs/recovery.md", name)
            publish(summary(shown_families(root / "benchmarks/results")), root / "README.md")
        if name == "recovery" and len(seeds) > 1:
            guard_figure(study, root / "docs/figures/guards.png")
    return document
