"""Single cases: which ones are shown (the first of each kind, nothing is picked) and what is shown of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from latentrevise.report.runs import Atoms, FinishedRun

MAX_CHARACTERS = 6000
MAX_POSITIONS = 48
MAX_ATOMS = 5
MIN_WEIGHT = 0.005  # below this an atom's cell would be empty to the eye and its weight would print as .00


@dataclass(frozen=True)
class TokenTexts:
    """Token ids as text. Without a tokenizer the ids themselves are shown, and ``problem`` says why."""

    tokenizer: Any | None
    problem: str = ""

    @classmethod
    def load(cls, path: str) -> TokenTexts:
        """The tokenizer of the model directory ``path``; nothing is fetched and no remote code is run."""
        if not path or not Path(path).is_dir():
            return cls(None, f"the model directory {path!r} named in run.json is not on this machine")
        from transformers import AutoTokenizer  # takes seconds to import

        try:
            return cls(AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False))
        except Exception as error:  # a damaged tokenizer.json raises a bare Exception
            return cls(None, f"the tokenizer in {path} could not be loaded ({type(error).__name__}: {error})")

    def piece(self, token: int) -> str:
        """One token, its white space made visible."""
        if self.tokenizer is None:
            return f"#{token}"
        text = self.tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if not text or "\ufffd" in text:  # part of a multi-byte character
            text = self.tokenizer.convert_ids_to_tokens(token) or f"#{token}"
        return text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")

    def text(self, tokens: Sequence[int]) -> str:
        """A token sequence as text; as ids where there is no tokenizer."""
        if self.tokenizer is None:
            return " ".join(f"#{token}" for token in tokens)
        return self.tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)


@dataclass(frozen=True)
class Cell:
    """One cell of the heat map; ``weight`` None: a plain text cell."""

    text: str
    tooltip: str = ""
    weight: float | None = None
    original: bool = False


@dataclass(frozen=True)
class HeatMap:
    """A revised prefix as a table: one column a position, one row an atom, heaviest first."""

    positions: list[int]
    rows: list[tuple[str, list[Cell]]]
    note: str


@dataclass(frozen=True)
class Case:
    """One prompt, its failed rollout, the prefix that was fed and one continuation."""

    outcome: str
    sample_id: str
    prompt: str
    answer: str
    target: str
    failed: str
    failed_extracted: str | None
    prefix: str
    latent: bool
    heat_map: HeatMap | None
    continuation: str
    extracted: str | None
    steps: list[tuple[str, str]]  # text, "ok" | "bad" | "unchecked"
    guard: str | None
    mean_logprob: float | None
    plain_logprob: float | None


OUTCOMES = {
    "valid": "recovered, derivation valid",
    "invalid": "recovered, derivation not valid",
    "unchecked": "recovered, derivation not checkable",
    "missed": "not recovered",
}


def choose(verdicts: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The first verdict row of each outcome; "missed" is the first sample of the first prompt without any hit."""
    kinds: dict[str, dict[str, Any]] = {}
    hit_prompts = {row["prompt_id"] for row in verdicts if row["hits_target"]}
    for row in verdicts:
        if row["hits_target"]:
            kind = {True: "valid", False: "invalid", None: "unchecked"}[row["valid"]]
        elif row["prompt_id"] not in hit_prompts:
            kind = "missed"
        else:
            continue
        kinds.setdefault(kind, row)
    return {kind: kinds[kind] for kind in OUTCOMES if kind in kinds}


def cases_of(run: FinishedRun, arm: str, tokens: TokenTexts) -> list[Case]:
    """The cases of one arm; empty when the run directory holds no rows of it."""
    if not run.has_arm(arm):
        return []
    return [_case(run, arm, OUTCOMES[kind], row, tokens) for kind, row in choose(run.verdicts(arm)).items()]


def _case(run: FinishedRun, arm: str, outcome: str, row: dict[str, Any], tokens: TokenTexts) -> Case:
    verdict = run.verdict(arm, row["sample_id"])
    start = run.start(arm, row["start_id"])
    sample = run.sample(arm, row["sample_id"])
    prompt = run.prompts[row["prompt_id"]]
    failed = run.failed_rollout(row["prompt_id"], start["parent_sample_id"])
    mixture = run.mixture(arm, row["start_id"])
    plain = verdict.get("plain_logprobs")
    sampled = sample.get("sampling_logprobs")
    return Case(
        outcome=outcome,
        sample_id=row["sample_id"],
        prompt=shorten(prompt["prompt"]),
        answer=prompt["answer"],
        target=start["target"],
        failed=shorten(failed["completion"]) if failed else "",
        failed_extracted=failed["extracted"] if failed else None,
        prefix=shorten(tokens.text(start["plain_ids"])) if start["plain_ids"] else "",
        latent=bool(start["latent"]),
        heat_map=heat_map(mixture, start, tokens) if mixture is not None else None,
        continuation=shorten(sample["completion"]),
        extracted=verdict["extracted"],
        steps=[
            (step["text"], {True: "ok", False: "bad", None: "unchecked"}[step["ok"]])
            for step in json.loads(verdict["steps"] or "[]")
        ],
        guard=verdict["guard"],
        mean_logprob=float(np.mean(sampled)) if sampled else None,
        plain_logprob=float(np.mean(plain)) if plain else None,
    )


def shorten(text: str) -> str:
    """At most MAX_CHARACTERS of ``text``; says how many were left out."""
    if len(text) <= MAX_CHARACTERS:
        return text
    return f"{text[:MAX_CHARACTERS]}\n… ({len(text) - MAX_CHARACTERS} more characters, not shown)"


def heat_map(mixture: Atoms, start: dict[str, Any], tokens: TokenTexts) -> HeatMap:
    """The mixture ``[T, A]`` of a start as a table of at most MAX_POSITIONS columns.

    Of a longer prefix the positions are kept that moved furthest from their original token (least weight left on it).
    """
    ids, weights = np.asarray(mixture.ids), np.asarray(mixture.weights, dtype=np.float64)
    length = ids.shape[0]
    original = list(start["prefix_ids"])[:length]
    original += [-1] * (length - len(original))
    atoms = [_atoms(ids[t], weights[t]) for t in range(length)]
    kept = np.array([dict(atoms[t]).get(original[t], 0.0) for t in range(length)])
    positions = sorted(np.argsort(kept, kind="stable")[:MAX_POSITIONS].tolist())
    note = ""
    if length > MAX_POSITIONS:
        note = f"The {MAX_POSITIONS} of {length} positions that moved furthest from their original token are shown."

    columns = [atoms[t] for t in positions]
    fed = start["plain_ids"]
    rows = [("original", [_token_cell(original[t], tokens) for t in positions])]
    depth = min(MAX_ATOMS, max(len([weight for _, weight in column if weight >= MIN_WEIGHT]) for column in columns))
    for rank in range(depth):
        cells = []
        for t, column in zip(positions, columns, strict=True):
            if rank < len(column) and column[rank][1] >= MIN_WEIGHT:
                token, weight = column[rank]
                tooltip = f"position {t}: id {token}, weight {weight:.4f}"
                if token == original[t]:
                    tooltip += ", the original token"
                cells.append(Cell(tokens.piece(token), tooltip, weight, token == original[t]))
            else:
                cells.append(Cell(""))
        rows.append((f"atom {rank + 1}", cells))
    rest = [sum(weight for _, weight in column[depth:]) for column in columns]
    if max(rest) >= MIN_WEIGHT:
        rows.append(("others", [_rest_cell(weight) for weight in rest]))
    rows.append(("entropy", [_entropy_cell(column) for column in columns]))
    if not start["latent"]:
        rows.append(("fed", [_token_cell(fed[t] if t < len(fed) else -1, tokens) for t in positions]))
    return HeatMap(positions, rows, note)


def _atoms(ids: np.ndarray, weights: np.ndarray) -> list[tuple[int, float]]:
    """Atoms of one position, heaviest first, lowest id on ties; slots of the same token are added up."""
    total: dict[int, float] = {}
    for token, weight in zip(ids.tolist(), weights.tolist(), strict=True):
        if weight > 0:
            total[token] = total.get(token, 0.0) + weight
    return sorted(total.items(), key=lambda atom: (-atom[1], atom[0]))


def _token_cell(token: int, tokens: TokenTexts) -> Cell:
    return Cell(tokens.piece(token), f"id {token}") if token >= 0 else Cell("–")


def _rest_cell(weight: float) -> Cell:
    return Cell(f"{weight:.2f}" if weight >= MIN_WEIGHT else "", f"weight of the other atoms: {weight:.4f}")


def _entropy_cell(column: list[tuple[int, float]]) -> Cell:
    weights = np.array([weight for _, weight in column])
    entropy = float(-(weights * np.log(weights)).sum()) + 0.0
    return Cell(f"{max(entropy, 0.0):.2f}", "entropy of the mixture, nats")
