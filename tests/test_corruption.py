"""A bit that flips in a file of a run is told with the file's name, or changes nothing that is read."""

import contextlib
import random
import shutil

import pytest
import torch
from safetensors import safe_open

from latentrevise import RecoverConfig, recover
from latentrevise.data.atoms import read_atoms, write_atoms
from latentrevise.data.parquet import read_table
from latentrevise.data.records import Prompt, Rollout, Sample, Start, Trajectory, Verdict, read_records
from latentrevise.data.storage import read_signed
from latentrevise.errors import InputError, LatentReviseError
from latentrevise.recovery.rundir import RunDirectory
from latentrevise.recovery.targets import Target
from tests.tiny import tiny_model, tiny_tokenizer

CLASSES = {"rollouts": Rollout, "targets.parquet": Target, "starts": Start, "samples": Sample, "verdicts": Verdict}
FLIPS = 40  # a file


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    rows = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(4)] + [
        {"prompt": "no answer\u2028here", "answer": None}
    ]
    config = RecoverConfig(
        rollouts=2, samples=2, max_new_tokens=12, strategies=("latent", "pivot", "resample"), equal_compute_cap=4
    )
    recover(tiny_model(), tiny_tokenizer(), rows, config, out)
    return out


def content(path):
    """What the package reads of a file."""
    if path.suffix == ".safetensors":
        atoms, offsets = read_atoms(path)
        pairs = {name: (ids.tolist(), weights.tolist()) for name, (ids, weights) in atoms.items()}
        return pairs, {name: offset.tolist() for name, offset in offsets.items()}
    if path.name == "errors.jsonl":
        return RunDirectory(path.parent).read_errors()
    if path.name == "run.json":
        return RunDirectory(path.parent).read_header()
    if path.suffix == ".json":
        return read_signed(path, "remedy")
    cls = {"prompts.parquet": Prompt, "trajectories.parquet": Trajectory}.get(path.name)
    return read_records(path, cls or next(CLASSES[part] for part in path.parts if part in CLASSES))


def outcome(path):
    """Its content, or what the error says."""
    try:
        return content(path), None
    except LatentReviseError as error:
        return None, str(error)


def test_every_flipped_bit_is_told_or_harmless(run, tmp_path):
    files = sorted(p for p in run.rglob("*") if p.is_file() and p.name != ".lock")
    assert {p.suffix for p in files} == {".parquet", ".safetensors", ".json", ".jsonl"}
    assert {p.relative_to(run).parts[0] for p in files} == {
        "rollouts", "starts", "samples", "verdicts", "plan", "run.json", "prompts.parquet", "errors.jsonl",
        "control.json", "targets.parquet", "trajectories.parquet", "atoms.safetensors", "metrics.json",
    }  # fmt: skip
    draw, told = random.Random(0), 0
    for number, file in enumerate(files):
        whole, good = file.read_bytes(), content(file)
        place = tmp_path / str(number) / file.relative_to(run)
        place.parent.mkdir(parents=True)
        for _ in range(FLIPS):
            damaged = bytearray(whole)
            damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
            place.write_bytes(damaged)
            found, message = outcome(place)
            assert found == good if message is None else str(place) in message, (file, message)
            told += message is not None
    assert told > FLIPS * len(files) / 4


def test_a_flip_in_values_is_always_found(run, tmp_path):
    """Every byte of the first page of samples, and every byte of the tensors."""
    sample = next((run / "samples").rglob("*.parquet"))
    assert read_table(sample).num_rows
    whole = sample.read_bytes()
    footer = int.from_bytes(whole[-8:-4], "little")
    place = tmp_path / "part-00000.parquet"
    good, missed = content(sample), 0
    for i in range(4, len(whole) - 8 - footer, 7):
        place.write_bytes(whole[:i] + bytes([whole[i] ^ 4]) + whole[i + 1 :])
        with contextlib.suppress(InputError):
            missed += read_records(place, Sample) != good
    assert missed == 0

    atoms = tmp_path / "a.safetensors"
    write_atoms(atoms, {"x": (torch.arange(6).view(3, 2), torch.rand(3, 2))}, {"x": torch.rand(3, 4)})
    with safe_open(atoms, "pt") as stored:
        assert len(stored.metadata()["digest"]) == 64
    whole = atoms.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for i in range(start, len(whole)):
        atoms.write_bytes(whole[:i] + bytes([whole[i] ^ 16]) + whole[i + 1 :])
        with pytest.raises(InputError, match=r"a\.safetensors: its content is not what was written"):
            read_atoms(atoms)


@pytest.mark.parametrize("name", ["prompts.parquet", "rollouts/part-00000.parquet", "errors.jsonl"])
def test_a_resumed_run_names_the_file(run, tmp_path, name):
    out = tmp_path / "copy"
    shutil.copytree(run, out)
    damaged = bytearray((out / name).read_bytes())
    damaged[len(damaged) // 4 if name.endswith("parquet") else 0] ^= 64
    (out / name).write_bytes(damaged)
    config = RunDirectory(out).read_header()["config"]
    from latentrevise.config import from_dict

    rows = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(4)]
    with pytest.raises(InputError, match=name.split("/")[-1].replace(".", r"\.")):
        recover(tiny_model(), tiny_tokenizer(), rows, from_dict(RecoverConfig, config), out)
