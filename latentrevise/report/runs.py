"""Reading a finished run: only the columns the report needs, since those of a long run do not fit into memory whole."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from latentrevise.data.atoms import read_atoms
from latentrevise.data.records import read_table
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

    @cached_property
    def prompts(self) -> dict[str, dict[str, Any]]:
        """prompt_id -> row with ``prompt`` and ``answer``, in the order of the input."""
        table = _read_table(self.files.prompts, ("prompt_id", "prompt", "answer"))
        return {row["prompt_id"]: row for row in table.to_pylist()}

    @cached_property
    def error_counts(self) -> Counter[str]:
        """reason code -> number of input rows set aside."""
        return Counter(str(row["reason"]) for row in self.files.read_errors())

    def has_arm(self, arm: str) -> bool:
        """Whether the rows of ``arm`` are there (metrics alone may be kept when a run is archived)."""
        return bool(self.files.parts("verdicts", arm))

    def verdicts(self, arm: str) -> list[dict[str, Any]]:
        """Verdict rows of ``arm``, ordered by prompt as in the input, then as written."""
        return self._in_order(self._read("verdicts", arm, VERDICT_COLUMNS).to_pylist())

    def _in_order(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        rank = {prompt_id: position for position, prompt_id in enumerate(self.prompts)}
        return sorted(rows, key=lambda row: rank.get(row["prompt_id"], len(rank)))

    def cases(self, arm: str) -> list[dict[str, Any]]:
        """Verdicts, samples and starts of ``arm``, joined: one row a continuation, ordered as ``verdicts``."""
        starts = {row["start_id"]: row for row in self._read("starts", arm, START_COLUMNS).to_pylist()}
        samples = {row["sample_id"]: row for row in self._read("samples", arm, SAMPLE_COLUMNS).to_pylist()}
        columns = (*VERDICT_COLUMNS, "extracted", "steps", "plain_logprobs")
        rows = self._in_order(self._read("verdicts", arm, columns).to_pylist())
        missing = [row["sample_id"] for row in rows if row["sample_id"] not in samples or row["start_id"] not in starts]
        if missing:
            raise RunError(
                f"{self.path}: {arm} has verdicts without their samples or starts ({missing[0]!r}); the run is damaged:"
                " recover into a new directory"
            )
        return [{**starts[row["start_id"]], **samples[row["sample_id"]], **row} for row in rows]

    def failed_rollouts(self, prompt_ids: set[str]) -> dict[str, list[dict[str, Any]]]:
        """prompt_id -> its rollouts that are not correct, for these prompts."""
        found: dict[str, list[dict[str, Any]]] = defaultdict(list)
        if self.files.parts("rollouts"):
            for row in self._read("rollouts", "", ROLLOUT_COLUMNS).to_pylist():
                if row["prompt_id"] in prompt_ids and row["verdict"] != "correct":
                    found[row["prompt_id"]].append(row)
        return found

    def traces(self, arm: str) -> list[dict[str, Any]]:
        """The optimisation traces of ``arm``'s starts; empty for a strategy that does not optimise but choose."""
        if not self.files.parts("starts", arm):
            return []
        texts = self._read("starts", arm, ("trace",)).column("trace").to_pylist()
        traces = [json.loads(text) for text in texts if text is not None]
        return [trace for trace in traces if "loss" in trace]

    def failed_lengths(self) -> list[int]:
        """Tokens of every rollout of the prompts all of whose rollouts are wrong."""
        return _list_lengths(self._failed("completion_ids"))

    def failed_texts(self) -> list[str]:
        """Texts of every rollout of the prompts all of whose rollouts are wrong."""
        return self._failed("completion").to_pylist()

    def _failed(self, column: str) -> pa.ChunkedArray:
        if not self.files.parts("rollouts"):
            return pa.chunked_array([], pa.list_(pa.int32()) if column == "completion_ids" else pa.string())
        table = self._read("rollouts", "", ("prompt_id", "verdict", column))
        other = table.filter(pc.field("verdict") != "wrong")["prompt_id"].combine_chunks()
        return table.filter(pc.invert(pc.is_in(table["prompt_id"], value_set=other)))[column]

    def trajectory_lengths(self, arm: str) -> dict[str, int]:
        """sample_id -> tokens after the prompt: what was fed as prefix, and the continuation."""
        starts = self._read("starts", arm, ("start_id", "plain_ids"))
        prefix = dict(zip(starts["start_id"].to_pylist(), _list_lengths(starts["plain_ids"]), strict=True))
        samples = self._read("samples", arm, ("sample_id", "start_id", "completion_ids"))
        rows = zip(
            samples["sample_id"].to_pylist(),
            samples["start_id"].to_pylist(),
            _list_lengths(samples["completion_ids"]),
            strict=True,
        )
        return {sample_id: prefix[start_id] + length for sample_id, start_id, length in rows}

    def mixtures(self, arm: str) -> dict[str, Atoms]:
        """start_id -> the token mixture of a revised start; plain starts have none."""
        found = {}
        for part in self.files.parts("starts", arm):
            for name, (ids, weights) in read_atoms(part.with_suffix(".safetensors")).items():
                found[name] = Atoms(ids.numpy(), weights.numpy())
        return found

    def _read(self, stage: str, arm: str, columns: Sequence[str] | None) -> pa.Table:
        parts = self.files.parts(stage, arm)
        if not parts:
            raise RunError(f"{self.path / stage / arm} has no parts; resume the run to complete it")
        return pa.concat_tables([_read_table(part, columns) for part in parts])


def _list_lengths(column: pa.ChunkedArray) -> list[int]:
    return pc.fill_null(pc.list_value_length(column), 0).to_pylist()


def _read_table(path: Path, columns: Sequence[str] | None) -> pa.Table:
    return read_table(path, columns, remedy="recover into a new directory")
