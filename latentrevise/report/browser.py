"""Every zero-hit prompt (of many, MOST) with what each strategy made of it: the data of the page's browser of cases.

One sample stands for a prompt and a strategy: the first with a valid derivation, else the first with the right answer,
else the first. Nothing is picked by hand. The data travels in the page as compressed JSON; where that would be large,
texts are cut in the middle and heat maps to the positions that moved most, and the page says so.
"""

from __future__ import annotations

import base64
import gzip
import heapq
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from latentrevise.data.storage import stable_hash
from latentrevise.report.runs import Atoms, FinishedRun
from latentrevise.report.tokens import TokenTexts

BUDGET = 1_400_000  # characters of compressed cases in one page, all runs together
# What is tried until it fits: characters of a text, positions of a heat map.
LIMITS = ((6000, 48), (3000, 24), (1500, 16), (700, 8), (300, 4), (120, 0))
MOST = 1000  # prompts of a run in one page
ATOMS = 5
MIN_WEIGHT = 0.005  # an atom below this would print as .00
ORDER = ("valid", "unchecked", "invalid", "missed")


@dataclass(frozen=True)
class Browser:
    """What the page embeds: base64 of gzipped JSON, how many prompts it holds, and what was shortened."""

    data: str
    prompts: int
    note: str


def browsers(runs: Sequence[FinishedRun], tokens: Sequence[TokenTexts], arms: Sequence[Sequence[str]]) -> list[Browser]:
    """The cases of every run, under one limit for all of them.

    arms: the strategies that each run's table lists. Raises RunError for a damaged run directory.
    """
    found = [_Cases(run, text, own) for run, text, own in zip(runs, tokens, arms, strict=True)]
    packed: list[str] = []
    for characters, positions in LIMITS:
        packed = [_pack(cases.table(characters, positions)) for cases in found]
        if sum(map(len, packed)) <= BUDGET:
            break
    note = "" if all(cases.all for cases in found) else f"Of each run {MOST} prompts are shown, drawn at random."
    if (characters, positions) != LIMITS[0]:
        note += (
            f" To keep this page small, texts are cut to {characters} characters, heat maps to {positions} positions."
        )
    return [Browser(data, len(cases.prompts), note.strip()) for data, cases in zip(packed, found, strict=True)]


def _pack(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


@dataclass(frozen=True)
class _Picked:
    """The sample that stands for a prompt and a strategy; how many there are, reached their target, were admitted."""

    kind: str
    of: int
    hits: int
    admitted: int
    row: dict[str, Any]
    mixture: Atoms | None

    @classmethod
    def among(cls, samples: list[dict[str, Any]], mixtures: dict[str, Atoms]) -> _Picked:
        kinds = [outcome(row) for row in samples]
        kind = min(kinds, key=ORDER.index)
        row = samples[kinds.index(kind)]
        admitted = sum(sample["verdict"] == "correct" and sample["guard"] is None for sample in samples)
        hits = sum(bool(sample["hits_target"]) for sample in samples)
        return cls(kind, len(samples), hits, admitted, row, mixtures.get(row["start_id"]))


class _Cases:
    """The chosen rows of one run, read once."""

    def __init__(self, run: FinishedRun, tokens: TokenTexts, arms: Sequence[str]) -> None:
        self.run, self.tokens = run, tokens
        self.arms = [arm for arm in arms if run.has_arm(arm)]
        names, self.all = _names(run, self.arms)
        self.picked: dict[str, dict[str, _Picked]] = defaultdict(dict)
        for arm in self.arms:
            for rows, mixtures in run.cases(arm, names):
                own: dict[str, list[dict[str, Any]]] = defaultdict(list)
                for row in rows:
                    own[row["prompt_id"]].append(row)
                for name, samples in own.items():
                    self.picked[name][arm] = _Picked.among(samples, mixtures)
        self.prompts = run.prompts(names)
        self.rollouts = run.failed_rollouts(names)

    def table(self, characters: int, positions: int) -> dict[str, Any]:
        pieces: dict[str, int] = {}
        by_prompt = {
            name: {arm: self._entry(picked, pieces, characters, positions) for arm, picked in own.items()}
            for name, own in self.picked.items()
        }
        prompts = []
        for prompt in self.prompts:
            name = prompt["prompt_id"]
            parents = {entry["parent"] for entry in by_prompt[name].values()}
            failed = [row for row in self.rollouts.get(name, []) if row["sample_id"] in parents]
            failed = failed or self.rollouts.get(name, [])[:1]
            prompts.append(
                {
                    "id": name,
                    "prompt": _cut(prompt["prompt"], characters),
                    "answer": prompt["answer"],
                    "failed": {
                        row["sample_id"]: [_cut(row["completion"], characters), row["extracted"]] for row in failed
                    },
                    "arms": by_prompt[name],
                }
            )
        return {"arms": self.arms, "pieces": list(pieces), "prompts": prompts}

    def _entry(self, picked: _Picked, pieces: dict[str, int], characters: int, positions: int) -> dict[str, Any]:
        row, mixture = picked.row, picked.mixture if positions else None
        sampled, plain = row["sampling_logprobs"], row["plain_logprobs"]
        return {
            "outcome": picked.kind,
            "hits": picked.hits,
            "of": picked.of,
            "admitted": picked.admitted,
            "guard": row["guard"],
            "sample": row["sample_id"],
            "parent": row["parent_sample_id"],
            "target": row["target"],
            "latent": bool(row["latent"]),
            "prefix": _cut(self.tokens.text(row["plain_ids"]), characters) if row["plain_ids"] else "",
            "text": _cut(row["completion"], characters),
            "extracted": row["extracted"],
            "steps": [[step["text"], step["ok"]] for step in json.loads(row["steps"] or "[]")],
            "logprob": round(float(np.mean(sampled)), 3) if sampled else None,
            "plain": round(float(np.mean(plain)), 3) if plain else None,
            "heat": None if mixture is None else _heat(mixture, row, self.tokens, pieces, positions),
        }


def _names(run: FinishedRun, arms: Sequence[str]) -> tuple[set[str], bool]:
    """The prompts that are shown: all, or MOST by hash; and whether it is all."""
    names: set[str] = set()
    whole = True
    for arm in arms:
        for own in run.names(arm):
            names |= own
            if len(names) > MOST:
                names, whole = set(heapq.nsmallest(MOST, names, key=stable_hash)), False
    return names, whole


def outcome(row: dict[str, Any]) -> str:
    """What became of one continuation: one of ``ORDER``."""
    if not row["hits_target"]:
        return "missed"
    return {True: "valid", False: "invalid", None: "unchecked"}[row["valid"]]


def _cut(text: str, limit: int) -> str:
    """At most about ``limit`` characters: the middle goes, and how much of it is said."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half} characters …]\n{text[-half:]}"


def _heat(
    mixture: Any, start: dict[str, Any], tokens: TokenTexts, pieces: dict[str, int], limit: int
) -> dict[str, Any]:
    """The mixture ``[T, A]`` of a start, at most ``limit`` positions: those with the least weight left on their
    original token. Texts are places in the list of pieces, atoms ``[text, weight, 1 for the original token]``."""

    def place(token: int) -> int:
        return pieces.setdefault(tokens.piece(token) if token >= 0 else "–", len(pieces))

    ids, weights = np.asarray(mixture.ids), np.asarray(mixture.weights, dtype=np.float64)
    length = ids.shape[0]
    original = [*list(start["prefix_ids"])[:length]]
    original += [-1] * (length - len(original))
    atoms = [merged_atoms(ids[t], weights[t]) for t in range(length)]
    kept = np.array([dict(atoms[t]).get(original[t], 0.0) for t in range(length)])
    shown = sorted(np.argsort(kept, kind="stable")[:limit].tolist())
    fed = start["plain_ids"]
    columns = []
    for t in shown:
        visible = [(token, weight) for token, weight in atoms[t] if weight >= MIN_WEIGHT][:ATOMS]
        spread = np.array([weight for _, weight in atoms[t]])
        columns.append(
            {
                "at": t,
                "original": place(original[t]),
                "atoms": [[place(i), round(w, 4), int(i == original[t])] for i, w in visible],
                "entropy": round(max(float(-(spread * np.log(spread)).sum()), 0.0), 2),
                "fed": place(fed[t]) if not start["latent"] and t < len(fed) else None,
            }
        )
    return {"of": length, "columns": columns}


def merged_atoms(ids: np.ndarray, weights: np.ndarray) -> list[tuple[int, float]]:
    """Atoms of one position, heaviest first, lowest id on ties; slots of the same token are added up."""
    total: dict[int, float] = {}
    for token, weight in zip(ids.tolist(), weights.tolist(), strict=True):
        if weight > 0:
            total[token] = total.get(token, 0.0) + weight
    return sorted(total.items(), key=lambda atom: (-atom[1], atom[0]))
