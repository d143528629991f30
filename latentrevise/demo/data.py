"""Prompts to mine, kept apart from what the models were trained on and from each other's split."""

from __future__ import annotations

import hashlib
import random
from typing import Literal, get_args

from latentrevise.demo.family import Family
from latentrevise.errors import InputError

Split = Literal["train", "develop", "report"]


def split_of(prompt: str) -> Split:
    """The split a prompt belongs to, decided by its text alone: 80 % train, 10 % develop, 10 % report.

    Training draws only from ``train``; settings are chosen on ``develop``; figures come from ``report``.  No two splits
    can share a prompt, whatever the seeds.
    """
    bucket = hashlib.sha256(prompt.encode()).digest()[0] % 10
    return "develop" if bucket == 8 else "report" if bucket == 9 else "train"


def make_prompts(family: Family, n: int, *, split: Split = "report", seed: int = 0) -> list[dict[str, str]]:
    """``n`` different prompts of the harder, mined distribution: rows of ``id``, ``prompt`` and ``answer``.

    Raises InputError for an unknown split.
    """
    if n < 0:
        raise ValueError(f"n must not be negative, got {n}")
    if split not in get_args(Split):
        raise InputError(f"split {split!r}: choose one of {', '.join(get_args(Split))}")
    rng = random.Random(f"{family.name}/{split}/{seed}")
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < n:
        problem = family.sample_problem(rng, mining=True)
        prompt = family.prompt_text(problem)
        if split_of(prompt) == split and prompt not in rows:
            name = f"{family.name}-{split}-{seed}-{len(rows):05d}"
            rows[prompt] = {"id": name, "prompt": prompt, "answer": family.answer(problem)}
    return list(rows.values())
