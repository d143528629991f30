"""Records: what is written is what is read, and a writer that dies leaves nothing half-written behind."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass, fields

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from latentrevise.data.atoms import read_atoms, write_atoms
from latentrevise.data.records import (
    Prompt,
    Rollout,
    RowError,
    Sample,
    Start,
    Trajectory,
    Verdict,
    read_records,
    row_seed,
    schema,
    write_records,
)
from latentrevise.data.storage import atomic_write, stable_hash, write_json, write_jsonl
from latentrevise.errors import InputError, LatentReviseError, RunError


def trajectory(**changes):
    row = {
        "prompt_id": "p1",
        "sample_id": "p1/latent/0/3",
        "start_id": "p1/latent/0",
        "parent_sample_id": "p1/7",
        "strategy": "latent",
        "prompt": "1 + 1 = ?",
        "prompt_ids": (1, 2, 3),
        "prefix_ids": (4, 5),
        "plain_prefix_ids": (4, 6),
        "prefix_rendering": "argmax",
        "completion_ids": (7, 8),
        "completion": "\\boxed{2} – ü",
        "answer": "2",
        "extracted_answer": "2",
        "verdict": "correct",
        "valid": None,
        "reward": 1.0,
        "finish_reason": "stop",
        "model": "tiny",
        "seed": 2**62 + 1,
        "temperature": 0.7,
        "top_p": 1.0,
        "steps": [{"text": "1 + 1 = 2", "ok": True}],
        "trace": {"loss": [1.5, 0.25], "chosen": 1},
        "sampling_logprobs": (-0.5, -1.25),
        "plain_logprobs": None,
        "backend": "reference",
        "config_hash": "abc",
    }
    return Trajectory(**(row | changes))


ROWS = [
    Prompt("p1", "1 + 1 = ?", (1, 2, 3), "2", {"level": 5, "tags": ["a", "ß"]}),
    Rollout("p1", "p1/0", (), "", None, "unknown", "length", ()),
    Start("s", "p1", None, "2", (), (4,), True, False, 8, 100, 200, 0, 0.5, None),
    Start("s", "p1", "p1/0", "2", (4,), (5,), False, True, 1, 100, 200, 7, 0.5, {"gap": [0.5]}),
    Sample("s", "p1", "s/0", (5,), "five", "stop", (-0.75,), 0.25),
    Verdict("s/0", "s", "p1", "5", "wrong", False, True, None, [{"text": "x", "ok": False}], "too-short", (-2.0,)),
    trajectory(),
    trajectory(valid=True, parent_sample_id=None, trace=None, plain_logprobs=()),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: type(row).__name__)
def test_parquet_gives_back_what_was_written(tmp_path, row):
    write_records(tmp_path / "rows.parquet", [row, row])
    assert read_records(tmp_path / "rows.parquet", type(row)) == [row, row]


def test_column_names_and_types_are_those_of_the_run_directory():
    columns = {f.name: f.type for f in schema(Prompt)}
    assert list(columns) == ["prompt_id", "prompt", "prompt_ids", "answer", "meta", "messages"]
    assert columns["prompt_ids"] == pa.list_(pa.int32())
    assert columns["meta"] == pa.string()
    assert schema(Rollout).field("sampling_logprobs").type == pa.list_(pa.float32())
    assert schema(Trajectory).names == [f.name for f in fields(Trajectory)]
    assert schema(Trajectory).field("valid").nullable
    assert not schema(Trajectory).field("verdict").nullable


def test_a_field_without_a_column_type_is_refused():
    @dataclass
    class Odd:
        thing: complex

    with pytest.raises(TypeError, match="thing"):
        schema(Odd)


def test_no_rows(tmp_path):
    write_records(tmp_path / "none.parquet", [], Sample)
    assert read_records(tmp_path / "none.parquet", Sample) == []
    with pytest.raises(ValueError, match="cls"):
        write_records(tmp_path / "none.parquet", [])


def test_a_folder_is_read_in_order_and_without_temporary_files(tmp_path):
    samples = [Sample("s", "p", f"s/{i}", (i,), str(i), "stop", (-1.0,), 0.0) for i in range(3)]
    for i in (2, 0, 1):
        write_records(tmp_path / f"part-{i:05d}.parquet", [samples[i]])
    (tmp_path / ".part-00003.parquet.77-aa.tmp").write_bytes(b"half a file")
    (tmp_path / ".part-00004.parquet").write_bytes(b"half a file")
    assert read_records(tmp_path, Sample) == samples


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(InputError, match=r"gone\.parquet: no such file"):
        read_records(tmp_path / "gone.parquet", Sample)
    (tmp_path / "bad.parquet").write_text("not parquet")
    with pytest.raises(InputError, match=r"bad\.parquet: not a readable parquet"):
        read_records(tmp_path / "bad.parquet", Sample)
    write_records(tmp_path / "prompts.parquet", [ROWS[0]])
    with pytest.raises(InputError, match=r"no column start_id.*found: prompt_id"):
        read_records(tmp_path / "prompts.parquet", Sample)
    table = pa.table({"row": ["one"], "id": ["a"], "reason": ["b"], "message": ["c"]})
    pq.write_table(table, tmp_path / "typed.parquet")
    with pytest.raises(InputError, match="column does not hold"):
        read_records(tmp_path / "typed.parquet", RowError)


def test_jsonl_and_json(tmp_path):
    write_jsonl(tmp_path / "errors.jsonl", [RowError(3, None, "no-answer", "give one"), {"row": 4}])
    lines = [json.loads(line) for line in (tmp_path / "errors.jsonl").read_text().splitlines()]
    assert lines == [{"row": 3, "id": None, "reason": "no-answer", "message": "give one"}, {"row": 4}]
    write_json(tmp_path / "run.json", {"ü": [1, None]})
    assert json.loads((tmp_path / "run.json").read_text(encoding="utf-8")) == {"ü": [1, None]}
    with pytest.raises(ValueError):
        write_json(tmp_path / "run.json", {"rate": float("nan")})
    assert json.loads((tmp_path / "run.json").read_text(encoding="utf-8")) == {"ü": [1, None]}


def test_atoms(tmp_path):
    ids = torch.arange(6).reshape(3, 2)
    weights = torch.tensor([[1.0, 0.0], [0.25, 0.75], [0.5, 0.5]], dtype=torch.float64)
    write_atoms(tmp_path / "atoms.safetensors", {"p/latent/0": (ids, weights), "b.ids": (ids[:1], weights[:1])})
    found, _ = read_atoms(tmp_path / "atoms.safetensors")
    assert set(found) == {"p/latent/0", "b.ids"}
    assert found["p/latent/0"][0].dtype == torch.int32
    assert found["p/latent/0"][1].dtype == torch.float32
    assert torch.equal(found["p/latent/0"][0].long(), ids)
    assert torch.equal(found["p/latent/0"][1].double(), weights)
    write_atoms(tmp_path / "none.safetensors", {})
    assert read_atoms(tmp_path / "none.safetensors") == ({}, {})
    with pytest.raises(ValueError, match="mixture x"):
        write_atoms(tmp_path / "bad.safetensors", {"x": (ids, weights[:2])})
    (tmp_path / "bad.safetensors").write_bytes(b"\x00" * 4)
    with pytest.raises(InputError, match="safetensors"):
        read_atoms(tmp_path / "bad.safetensors")


def test_a_failed_write_keeps_the_old_file_and_no_temporary(tmp_path):
    target = tmp_path / "new" / "file.txt"
    with atomic_write(target) as temporary:
        temporary.write_text("old")
    with pytest.raises(KeyError), atomic_write(target) as temporary:
        {}[temporary.write_text("half")]
    assert target.read_text() == "old"
    assert os.listdir(target.parent) == ["file.txt"]


def test_a_killed_write_keeps_the_old_file(tmp_path):
    """kill -9 between the write and the rename."""
    target = tmp_path / "part-00000.parquet"
    write_records(target, [ROWS[0]])
    code = """
        import os, signal, sys
        from latentrevise.data.storage import atomic_write
        with atomic_write(sys.argv[1]) as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(target)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 2
    assert read_records(tmp_path, Prompt) == [ROWS[0]]


def test_an_unwritable_place_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot write .*file/below.*choose an output directory"):
        write_json(tmp_path / "file" / "below", {})
    assert issubclass(RunError, LatentReviseError)


def test_seeds_and_hashes_are_fixed_for_ever():
    assert row_seed(0, "p1", 3) == row_seed(0, "p1", 3)
    assert len({row_seed(s, p, i) for s in (0, 1) for p in ("a", "b") for i in range(50)}) == 200
    assert row_seed(0, "ab", "c") != row_seed(0, "a", "bc")
    assert all(0 <= row_seed(i) < 2**63 for i in range(100))
    assert stable_hash({"b": 1, "a": "ü"}) == stable_hash({"a": "ü", "b": 1}) == "4e7ff4080b1a00ac"
    assert row_seed(7, "p1", 3) == 6118288712951830833
