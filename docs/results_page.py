"""All rows of the studies, made from their results whenever the site is built (a hook of mkdocs)."""

from __future__ import annotations

import json
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from benchmarks import checkers, guards, iterates, recovery_tables, training_tables

PAGE = "results.md"
RESULTS = Path(__file__).parent.parent / "benchmarks/results"
STUDIES = {
    "gsm": ("Recovery on real text", recovery_tables.tables),
    "gsm-scored": ("Recovery on real text, forks by the answer", recovery_tables.tables),
    "gsm6": ("Recovery on real text, six steps", recovery_tables.tables),
    "gsm7": ("Recovery on real text, seven steps", recovery_tables.tables),
    "gsm8": ("Recovery on real text, eight steps", recovery_tables.tables),
    "gsm-before": ("Recovery on real text, before", recovery_tables.tables),
    "gsm-earlier": ("Recovery on real text, earlier prompts", recovery_tables.tables),
    "gsm-rivals": ("Recovery on real text, every strategy", recovery_tables.tables),
    "gsm-others": ("Recovery on real text, more strategies", recovery_tables.tables),
    "gsm-mass": ("Recovery on real text, forks by mass", recovery_tables.tables),
    "gsm-variants": ("Ablations on real text", recovery_tables.tables),
    "recovery": ("Recovery", recovery_tables.tables),
    "iterates": ("Step by step", iterates.table),
    "rivals": ("What people would use instead", recovery_tables.tables),
    "variants": ("Harder families", recovery_tables.tables),
    "training": ("Training", training_tables.tables),
    "training-real": ("Training on real text", training_tables.tables),
    "guards": ("Guards", guards.tables),
    "checkers": ("Checkers of derivations", checkers.table),
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    files.append(File.generated(config, PAGE, content=page()))
    return files


def page() -> str:
    lines = ["# All rows", ""]
    lines += [
        "The studies of [recovery](recovery.md), [training](training.md), [guards](audits.md#guards) and",
        "[checkers](verifier.md#derivations-of-arithmetic-word-problems), whole.",
        "Those pages say what the columns mean.",
    ]
    for study, (title, tables) in STUDIES.items():
        document = json.loads((RESULTS / f"{study}.json").read_text(encoding="utf-8"))
        lines += ["", f"## {title}", "", f"`benchmarks/results/{study}.json`", "", tables(document)]
    return "\n".join(lines) + "\n"
