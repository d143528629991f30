"""Reading a finished run part by part, and only the columns the report needs: a long run does not fit into memory."""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from latentrevise.data.atoms import read_atoms
from latentrevise.data.parquet import TableFile, read_table
from latentrevise.data.storage import read_signed
from latentrevise.errors import RunError
from latentrevise.recovery.rundir import RunDirectory

ROLLOUT_COLUMNS = ("prompt_id", "sample_id", "completion", "extracted", "verdict")
START_COLUMNS = ("start_id", "parent_sample_id", "target", "prefix_ids", "plain_ids", "latent")
SAMPLE_COLUMNS = ("sample_id", "completion", "sampling_logprobs")
VERDICT_COLUMNS = ("sample_id", "start_id", "prompt_id", "verdict", "hits_target", "valid", "guard")


@dataclass(frozen=True)
class Atoms:
    """The mixture of one revised prefix: ``ids [T, A]`` int32 and ``weights [T, A]`` float32, rows on the simplex."""

    ids: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True)
class FinishedRun:
    """A run that has its metrics. ``info`` is run.json, ``metrics`` is metrics.json; tables are read when asked for."""

    files: RunDirectory
    info: dict[str, Any]
    metrics: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> FinishedRun:
        """Open the run directory ``path``; RunError if there is no finished run in it."""
        files = RunDirectory(path)
        info = files.read_header()
        if not files.metrics.is_file():
            raise RunError(
                f"{path} holds an unfinished run (there is no metrics.json); finish it with `latentrevise recover`"
            )
        metrics = read_signed(files.metrics, "delete it and resume the run")
        if not isinstance(metrics.get("arms"), dict):
            raise RunError(
                f"{files.metrics} has no arms, so it isn't the metrics of a run; delete it and resume the run"
            )
        return cls(files, info, metrics)

    @property
    def path(self) -> Path:
        return self.files.path

    @property
    def family(self) -> str:
        """The name shown for this run: its label, or its directory's name where it has none."""
        return self.metrics.get("family") or self.path.resolve().name

    @cached_property
    def gate(self) -> dict[str, Any] | None:
        """The implicit-value gate, where it was measured."""
        return self.files.read_gate() if self.files.gate.is_file() else None

    def prompts(self, wanted: set[str]) -> list[dict[str, Any]]:
        """``prompt_id``, ``prompt`` and ``answer`` of these prompts, in the order of the input."""
        columns = ("prompt_id", "prompt", "answer")
        with TableFile(self.files.prompts, _REMEDY) as file:
            return [row for table in file.groups(columns) for row in _of(table, wanted).to_pylist()]

    @cached_property
    def error_counts(self) -> Counter[str]:
        """reason code -> number of input rows set aside."""
        return Counter(str(row["reason"]) for row in self.files.read_errors())

    def has_arm(self, arm: str) -> bool:
        """Whether the rows of ``arm`` are there (metrics alone may be kept when a run is archived)."""
        return bool(self.files.parts("verdicts", arm))

    def names(self, arm: str) -> Iterator[set[str]]:
        """The prompts of each part of ``arm``."""
        for table in self._parts("verdicts", arm, ("prompt_id",)):
            yield set(table["prompt_id"].to_pylist())

    def cases(self, arm: str, wanted: set[str]) -> Iterator[tuple[list[dict[str, Any]], dict[str, Atoms]]]:
        """Verdicts, samples and starts of these prompts, joined, one row a continuation, in the order of the input; and
        the token mixtures of revised starts. Part by part; every prompt's are in one."""
        columns = (*VERDICT_COLUMNS, "extracted", "steps", "plain_logprobs")
        for part in self.files.parts("verdicts", arm):
            rows = _of(_read_table(part, columns), wanted).to_pylist()
            if not rows:
                continue
            starts = {row["start_id"]: row for row in self._beside("starts", part, START_COLUMNS).to_pylist()}
            samples = {row["sample_id"]: row for row in self._beside("samples", part, SAMPLE_COLUMNS).to_pylist()}
            missing = [r["sample_id"] for r in rows if r["sample_id"] not in samples or r["start_id"] not in starts]
            if missing:
                raise RunError(
                    f"{self.path}: {arm} has verdicts without their samples or starts ({missing[0]!r}); the run is"
                    " damaged: recover into a new directory"
                )
            joined = [{**starts[row["start_id"]], **samples[row["sample_id"]], **row} for row in rows]
            atoms, _ = read_atoms(self.files.path / "starts" / arm / f"{part.stem}.safetensors")
            yield joined, {name: Atoms(ids.numpy(), weights.numpy()) for name, (ids, weights) in atoms.items()}

    def failed_rollouts(self, prompt_ids: set[str]) -> dict[str, list[dict[str, Any]]]:
        """prompt_id -> its rollouts that are not correct, for these prompts."""
        found: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for table in self._parts("rollouts", "", ROLLOUT_COLUMNS):
            for row in _of(table, prompt_ids).to_pylist():
                if row["verdict"] != "correct":
                    found[row["prompt_id"]].append(row)
        return found

    def traces(self, arm: str, most: int = 10_000) -> list[dict[str, Any]]:
        """The optimisation traces of ``arm``'s starts, of ``most`` drawn at random where there are more; empty for a
        strategy that does not optimise but choose."""
        kept, count, draw = list[dict[str, Any]](), 0, random.Random(0)
        for table in self._parts("starts", arm, ("trace",)):
            for text in table["trace"].drop_null().to_pylist():
                if "loss" not in (trace := json.loads(text)):
                    continue
                count += 1
                if len(kept) < most:
                    kept.append(trace)
                elif (place := draw.randrange(count)) < most:
                    kept[place] = trace
        return kept

    def failed_lengths(self) -> Counter[int]:
        """How many rollouts have so many tokens, of the prompts all of whose rollouts are wrong."""
        found: Counter[int] = Counter()
        for column in self._failed("completion_ids"):
            found.update(_list_lengths(column))
        return found

    def failed_texts(self) -> Iterator[str]:
        """Texts of every rollout of the prompts all of whose rollouts are wrong."""
        for column in self._failed("completion"):
            yield from column.to_pylist()

    def _failed(self, column: str) -> Iterator[pa.ChunkedArray]:
        for table in self._parts("rollouts", "", ("prompt_id", "verdict", column)):
            other = table.filter(pc.field("verdict") != "wrong")["prompt_id"].combine_chunks()
            yield table.filter(pc.invert(pc.is_in(table["prompt_id"], value_set=other)))[column]

    def hit_lengths(self, arm: str) -> dict[bool | None, Counter[int]]:
        """Of the continuations that reached their target, by ``valid``: how many have so many tokens after the prompt,
        what was fed as prefix included."""
        found: dict[bool | None, Counter[int]] = defaultdict(Counter)
        for part in self.files.parts("verdicts", arm):
            starts = self._beside("starts", part, ("start_id", "plain_ids"))
            prefix = dict(zip(starts["start_id"].to_pylist(), _list_lengths(starts["plain_ids"]), strict=True))
            samples = self._beside("samples", part, ("sample_id", "start_id", "completion_ids"))
            ids, of = samples["sample_id"].to_pylist(), samples["start_id"].to_pylist()
            rows = zip(ids, of, _list_lengths(samples["completion_ids"]), strict=True)
            lengths = {sample: prefix[start] + length for sample, start, length in rows}
            for row in _read_table(part, ("sample_id", "hits_target", "valid")).to_pylist():
                if row["hits_target"]:
                    found[row["valid"]][lengths[row["sample_id"]]] += 1
        return found

    def _parts(self, stage: str, arm: str, columns: Sequence[str]) -> Iterator[pa.Table]:
        return (_read_table(part, columns) for part in self.files.parts(stage, arm))

    def _beside(self, stage: str, part: Path, columns: Sequence[str]) -> pa.Table:
        """What another stage wrote of the same part."""
        path = self.path / stage / part.parent.name / part.name
        if not path.exists():
            raise RunError(f"{path.parent} has no parts like {part}; resume the run to complete it")
        return _read_table(path, columns)


def _list_lengths(column: pa.ChunkedArray) -> list[int]:
    return pc.fill_null(pc.list_value_length(column), 0).to_pylist()


def _of(table: pa.Table, prompts: set[str]) -> pa.Table:
    return table.filter(pc.is_in(table["prompt_id"], value_set=pa.array(prompts, pa.string())))


_REMEDY = "restore it, or recover into a new directory"


def _read_table(path: Path, columns: Sequence[str]) -> pa.Table:
    return read_table(path, columns)
