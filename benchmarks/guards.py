"""The leak guards on finished runs of the recovery study: of the samples with the right answer, what they keep and let
through, each alone and together.

Thresholds are chosen on the first half of a family's sets of prompts (of three, one) and measured on the others; where
those hold fewer than ten valid samples, on all and the same (and the table says so). What guards read in the texts is
read again, so that runs from before those guards serve as well. A combination is found greedily: of all guards and
thresholds the one that lowers contamination most while so much of the valid is kept, until none does. Samples of one
prompt are not independent, so the intervals are too narrow. Families whose runs are not named stay as they were.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks import harness
from benchmarks.recovery_strata import finished
from latentrevise.checkers.loading import load
from latentrevise.data.boundary import Boundary
from latentrevise.data.records import Prompt, Sample, Start, Verdict, original_prefix, read_records
from latentrevise.data.storage import write_json
from latentrevise.errors import InputError
from latentrevise.recovery.guards import GUARDS, GuardConfig, auc, guard, guard_curves, wilson
from latentrevise.recovery.provenance import text_signals
from latentrevise.recovery.rundir import RunDirectory
from latentrevise.recovery.verdicts import before_answer
from latentrevise.verify.patterns import BOXED, AnswerPattern

Judged = tuple[Mapping[str, float], bool]  # signals, and whether the derivation is valid

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/guards.json"
FLOORS = (0.95, 0.9, 0.8, 0.7)  # shares of the valid samples that a combination must keep
WHOLE = {"false-step": 1.0, "unused-fact": 1.0}  # every step holds, every number is used: nothing is chosen
_FEWEST = 10
_MOST = 4  # guards in a combination


def samples_of(run: Path) -> list[Judged]:
    """Every sample of a strategy that has the right answer, with all its signals."""
    directory = RunDirectory(run)
    header = json.loads(directory.header.read_text(encoding="utf-8"))
    pattern = AnswerPattern(header["config"].get("answer_pattern", BOXED))
    tokenizer = AutoTokenizer.from_pretrained(header["model"]["path"])
    boundary = Boundary.of(header["config"]["prefix_boundary"], tokenizer)
    checker = None if (name := header["config"].get("step_checker")) is None else load(name, "step_checker")
    prompts = {prompt.id: prompt.text for prompt in read_records(directory.prompts, Prompt)}
    found = []
    for arm in sorted(path.name for path in (run / "verdicts").iterdir() if "@" not in path.name):
        starts = {s.start_id: s for part in directory.parts("starts", arm) for s in read_records(part, Start)}
        samples = {s.sample_id: s for part in directory.parts("samples", arm) for s in read_records(part, Sample)}
        verdicts = [v for part in directory.parts("verdicts", arm) for v in read_records(part, Verdict)]
        for verdict in (v for v in verdicts if v.verdict == "correct"):
            start, sample = starts[verdict.start_id], samples[verdict.sample_id]
            prefix = start.plain_ids
            if header["config"]["rendering"] == "original":
                prefix = original_prefix(start.prefix_ids, prefix)
            end = before_answer(tokenizer, sample.completion_ids, sample.completion, pattern)
            ids = (*prefix, *sample.completion_ids[:end])
            text = text_signals(prompts[verdict.prompt_id], ids, tokenizer, boundary, checker)
            signals = (verdict.signals or {}) | text
            found.append((signals, bool(verdict.valid)))
    return found


def rates(samples: Sequence[Judged], thresholds: Mapping[str, float]) -> dict[str, Any]:
    """What these thresholds (by guard) do: ``kept`` of the valid, ``let_through`` of the invalid, ``contamination``
    (invalid among the admitted), each ``[rate, low, high]``."""
    admitted = [valid for found, valid in samples if not _objects(found, thresholds)]
    valid = sum(valid for _, valid in samples)
    return {
        "thresholds": dict(thresholds),
        "kept": wilson(sum(admitted), valid),
        "let_through": wilson(len(admitted) - sum(admitted), len(samples) - valid),
        "contamination": wilson(len(admitted) - sum(admitted), len(admitted)),
    }


def _objects(found: Mapping[str, float], thresholds: Mapping[str, float]) -> bool:
    return any(
        GUARDS[code].signal in found and GUARDS[code].rejects(found[GUARDS[code].signal], threshold)
        for code, threshold in thresholds.items()
    )


def combination(samples: Sequence[Judged], floor: float, codes: Sequence[str] = tuple(GUARDS)) -> dict[str, float]:
    """The thresholds of the guards that a greedy search takes, keeping at least ``floor`` of the valid samples."""
    taken: dict[str, float] = {}
    options = {code: own for code, own in guard_curves(samples).items() if code in codes}
    best = rates(samples, taken)["contamination"][0]
    while len(taken) < _MOST:
        tried = [
            (measured["contamination"][0], -measured["kept"][0], code, point["threshold"])
            for code, points in options.items()
            if code not in taken
            for point in points
            if (measured := rates(samples, {**taken, code: point["threshold"]}))["kept"][0] >= floor
        ]
        if not tried or min(tried)[0] >= best:
            break
        best, _, code, threshold = min(tried)
        taken[code] = threshold
    return taken


def measure(chosen_on: Sequence[Judged], others: Sequence[Judged]) -> dict[str, Any]:
    """The guards of a family, chosen on the first samples, measured on the second; on all where those are too few, and
    where nothing is chosen (WHOLE)."""
    whole = rates([*chosen_on, *others], WHOLE)
    in_sample = sum(valid for _, valid in others) < _FEWEST
    if in_sample:
        chosen_on = others = [*chosen_on, *others]
    usual = [(not guard(found, GuardConfig()), valid) for found, valid in others]
    kept, admitted = sum(a and v for a, v in usual), sum(a for a, _ in usual)
    valid = sum(v for _, v in others)
    defaults = {
        "kept": wilson(kept, valid),
        "let_through": wilson(admitted - kept, len(others) - valid),
        "contamination": wilson(admitted - kept, admitted),
    }
    split: dict[str, tuple[list[float], list[float]]] = {}
    for found, good in others:
        for name, value in found.items():
            split.setdefault(name, ([], []))[not good].append(value)
    return {
        "valid": valid,
        "invalid": len(others) - valid,
        "chosen_on": len(chosen_on),
        "in_sample": in_sample,
        "none": rates(others, {}),
        "defaults": defaults,
        "whole": whole,
        "alone": {code: rates(others, combination(chosen_on, 0.7, (code,))) for code in guard_curves(chosen_on)},
        "together": {str(floor): rates(others, combination(chosen_on, floor)) for floor in FLOORS},
        "auc": {name: auc(*pair) for name, pair in split.items() if all(pair)},
    }


def main(options: argparse.Namespace) -> dict[str, Any]:
    """``python -m benchmarks guards --runs DIR ...``."""
    families: dict[str, dict[int, list[Path]]] = {}
    for run in finished(options.runs or ()):
        family, seed = run.name.partition("-m")[0], run.name.rpartition("-p")[2]
        families.setdefault(family, {}).setdefault(int(seed), []).append(run)
    if not families:
        raise InputError("guards: name the run directories of a finished recovery study with --runs")
    found = {}
    for family, sets in sorted(families.items()):
        judged = {seed: [sample for run in runs for sample in samples_of(run)] for seed, runs in sets.items()}
        seeds = sorted(judged)
        first = max(1, len(seeds) // 2)
        chosen_on, others = ([s for seed in own for s in judged[seed]] for own in (seeds[:first], seeds[first:]))
        runs = sorted(run.name for own in sets.values() for run in own)
        found[family] = measure(chosen_on, others) | {"runs": runs, "commit": harness.commit()}
    before = json.loads(RESULTS.read_text(encoding="utf-8"))["families"] if RESULTS.is_file() else {}
    document = {"name": "guards", "families": dict(sorted((before | found).items()))}
    print(tables(document))
    if options.publish:
        write_json(RESULTS, document)
    return document


def tables(document: dict[str, Any]) -> str:
    """Two Markdown tables: what guards keep and let through, and how each signal ranks valid over invalid."""
    lines = ["| family (valid, invalid) | guards | valid kept % | invalid let through % | invalid among admitted % |"]
    lines.append("|---" * 5 + "|")
    keys = ("kept", "let_through", "contamination")
    for family, found in document["families"].items():
        lines.append(_row(_head(family, found), "the defaults", found["defaults"], keys))
        alone = [one for one in found["alone"].values() if one["thresholds"]]
        best = min(alone, key=lambda one: one["contamination"][0] / max(one["kept"][0], 1e-9))
        lines.append(_row("", f"{_thresholds(best)} alone", best, keys))
        seen: set[str] = set()
        for floor in (FLOORS[0], FLOORS[-1]):
            one = found["together"][str(floor)]
            if (text := _thresholds(one)) not in seen:
                lines.append(_row("", f"{text} (for {100 * floor:.0f} % kept)", one, keys))
            seen.add(text)
        if "whole" in found:  # not in files of before
            lines.append(_row("", f"{_thresholds(found['whole'])} (on all sets)", found["whole"], keys))
    names = ("used", "founded", "true", "plain", "step", "answer", "derivation", "length")
    lines += ["", "The AUC of each signal there, valid over invalid:", "", f"| family | {' | '.join(names)} |"]
    lines.append("|---" * (1 + len(names)) + "|")
    for family, found in document["families"].items():
        cells = [f"{found['auc'][name]:.2f}" if name in found["auc"] else "-" for name in names]
        lines.append(f"| {family} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _head(family: str, found: dict[str, Any]) -> str:
    return f"{family} ({found['valid']}, {found['invalid']}{', chosen on the same' if found['in_sample'] else ''})"


def _thresholds(found: dict[str, Any]) -> str:
    return " ".join(f"`{code}` {value:.3g}" for code, value in found["thresholds"].items()) or "none"


def _row(name: str, told: str, found: dict[str, Any], keys: Sequence[str]) -> str:
    cells = ["{:.1f} [{:.0f}, {:.0f}]".format(*(100 * v for v in found[key])) for key in keys]
    return f"| {name} | {told} | {' | '.join(cells)} |"
