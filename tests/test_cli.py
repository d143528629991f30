"""The command line: options written once, errors in words, paths from anywhere."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from latentrevise import __version__, cli
from latentrevise.cli import app
from latentrevise.data.records import Prompt, Rollout, Trajectory, read_records
from latentrevise.data.storage import write_jsonl
from latentrevise.errors import ModelError
from latentrevise.model.loading import load_model
from latentrevise.recovery.rundir import RunDirectory
from tests.tiny import tiny_model, tiny_tokenizer

FAST = ["rollouts=1", "samples=1", "max_new_tokens=4", "strategies=resample", "equal_compute=false", "chunk=2"]


def call(*words):
    return CliRunner().invoke(app, [*map(str, words)])


def settings(*more):
    return [word for setting in (*FAST, *more) for word in ("--set", setting)]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A model and prompts, named relative to the current folder, which is also the home."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    tiny_model().save_pretrained(tmp_path / "mm")
    tiny_tokenizer().save_pretrained(tmp_path / "mm")
    write_jsonl(tmp_path / "p.jsonl", [{"prompt": f"1+{i}", "answer": str(i + 1)} for i in range(3)])
    return tmp_path


def mine(*more, out="run", prompts="p.jsonl", model="./mm", own=()):
    return call("mine", "--model", model, "--prompts", prompts, "--out", out, "--quiet", *settings(*own), *more)


def test_version_and_shared_options():
    assert call("--version").output == f"latentrevise {__version__}\n"
    for name in ("recover", "mine", "audit", "eval"):
        shown = call(name, "--help").output
        for option in ("--model", "--config", "--set", "--engine", "--dtype", "--device", "--quiet", "--out"):
            assert option in shown, (name, option)
    for name in ("revise", "continue", "verify", "export"):
        assert "--model" in call(name, "--help").output
    assert "Missing option '--model'" in call("recover", "--prompts", "p", "--out", "o").output


def test_the_advice_of_an_error_can_be_followed(place):
    write_jsonl(place / "named.jsonl", [{"task": "1+1", "gold": "2"}, {"task": "2+2", "gold": "4"}])
    for own, told in (
        ([], "no prompt column .*found task, gold.*prompt_column"),
        (["prompt_column=task", "answer_column=goal"], "no column 'goal'"),
        (["prompt_column=task", "answer_column=gold", "max_prompt_tokens=1"], "no usable prompt among 2 rows"),
    ):
        result = mine(prompts="named.jsonl", own=own)
        with pytest.raises(Exception, match=told):
            raise result.exception
        assert not (place / "run" / "run.json").exists()
    result = mine(prompts="named.jsonl", own=["prompt_column=task", "answer_column=gold"])
    assert (result.exit_code, result.output) == (0, "2 of 2 prompts are zero-hit\n"), result.exception
    assert (place / "run" / "errors.jsonl").read_text() == ""
    assert "other settings" in str(mine(prompts="named.jsonl", own=["prompt_column=task"]).exception)


def test_a_run_opens_from_another_folder_and_after_its_model_moved(place, monkeypatch):
    assert mine().exit_code == 0
    header = RunDirectory(place / "run").read_header()
    assert header["model"]["path"] == str(place / "mm")
    (place / "elsewhere").mkdir()
    monkeypatch.chdir(place / "elsewhere")
    run = ("--out", "../run", "--quiet")
    assert call("revise", *run).exit_code == 0
    (place / "mm").rename(place / "moved")
    assert "name its place with --model" in str(call("continue", *run).exception)
    result = call("verify", *run, "--model", "../moved")
    assert "run `latentrevise continue` first" in str(result.exception)
    assert RunDirectory(place / "run").read_header()["model"]["path"] == str(place / "moved"), "it is noted"
    assert call("continue", *run).exit_code == 0
    result = call("verify", *run)
    assert result.exit_code == 0, result.exception
    (place / "moved").rename(place / "again")
    write_trajectory(place / "run")
    export = ("export", "--run", "../run", "--to", "trl-sft", "--out", "rows.jsonl")
    assert "with --model" in str(call(*export).exception)
    assert "1 rows in rows.jsonl" in call(*export, "--model", "../again").output
    other = place / "other"
    tiny_model(seed=1).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    assert "fingerprint" in str(call("revise", *run, "--model", other).exception)


def write_trajectory(out):
    """Random models recover nothing, so the run gets a row of its own."""
    import dataclasses

    from latentrevise.data.records import write_records

    blank = {"str": "x", "int": 0, "float": 0.0, "tuple[int, ...]": (5, 6), "tuple[float, ...]": (0.0, 0.0)}
    values = {f.name: blank.get(str(f.type)) for f in dataclasses.fields(Trajectory)}
    (prompt, *_) = read_records(out / "prompts.parquet", Prompt)
    own = {"prompt_id": prompt.id, "verdict": "correct", "finish_reason": "stop", "prefix_rendering": "argmax"}
    write_records(out / "trajectories.parquet", [Trajectory(**(values | own | {"steps": []}))])


def test_home_is_expanded_wherever_a_path_is_given(place):
    (place / "c.yaml").write_text("seed: 3\n")
    result = call(
        *("mine", "--model=~/mm", "--prompts=~/p.jsonl", "--out=~/run", "--config=~/c.yaml", "--quiet", *settings())
    )
    assert result.exit_code == 0, result.exception
    assert not (place / "~").exists()
    assert RunDirectory("~/run").read_header()["config"]["seed"] == 3
    result = call("eval", "--model=~/mm", "--data=~/p.jsonl", "--out=~/e", "--set", "max_new_tokens=2", "--quiet")
    assert result.exit_code == 0, result.exception
    assert sorted(p.name for p in place.iterdir()) == ["c.yaml", "e", "mm", "p.jsonl", "run"]


@pytest.mark.parametrize(
    ("device", "told"),
    [
        ("gpu", "none of that name"),
        ("cuda:99", "sees [0-9]+ such devices"),
        ("meta", "no weights"),
        ("", "none of that"),
    ],
)
def test_a_device_that_is_not_here(place, device, told):
    with pytest.raises(Exception, match=told) as found:
        raise mine("--device", device).exception
    assert type(found.value).__name__ == "ModelError"


@pytest.mark.parametrize(("level", "code", "told"), [("debug", 0, "latentrevise"), ("loud", 1, "choose one of")])
def test_log_level(level, code, told, monkeypatch):
    done = subprocess.run(
        [sys.executable, "-m", "latentrevise", "--version"],
        env={**__import__("os").environ, "LATENTREVISE_LOG_LEVEL": level},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, told in done.stdout + done.stderr) == (code, True), done.stderr
    assert "Traceback" not in done.stderr


def test_an_adapter_is_loaded_and_merged(place):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    import torch

    base, _ = load_model("mm", device="cpu")
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = peft.get_peft_model(base, config).eval()
    ids = torch.tensor([[5, 6, 7]])
    expected = adapted(ids).logits.detach()
    adapted.save_pretrained("lora")
    loaded, tokenizer = load_model("lora", device="cpu")
    torch.testing.assert_close(loaded(ids).logits, expected)
    assert loaded.config._name_or_path == str(place / "lora")
    assert len(tokenizer) == 97
    assert mine(model="lora").exit_code == 0
    result = call("revise", "--out", "run", "--quiet")
    assert result.exit_code == 0, result.exception

    write_trajectory(place / "run")
    result = call("export", "--run", "run", "--to", "trl-sft", "--out", "rows.jsonl")
    assert "1 rows" in result.output, result.exception

    (place / "mm").rename(place / "moved")
    assert "which is not there" in str(mine(model="lora", out="other").exception)
    assert "merged model in" in call("merge", "--adapter", "lora", "--base", "moved", "--out", "~/merged").output
    merged, _ = load_model(place / "merged", device="cpu")
    torch.testing.assert_close(merged(ids).logits, expected)
    assert "is there already" in str(call("merge", "--adapter", "lora", "--base", "moved", "--out", "merged").exception)
    assert "nothing to merge" in str(call("merge", "--adapter", "moved", "--out", "m2").exception)
    tiny_model(num_hidden_layers=1).save_pretrained("less")  # peft would leave out the second layer's without a word
    tiny_tokenizer().save_pretrained("less")
    assert "can't be merged into" in str(call("merge", "--adapter", "lora", "--base", "less", "--out", "m2").exception)
    config_file = place / "lora" / "adapter_config.json"
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"base_model_name_or_path": None}))
    assert "a model that it does not name" in str(mine(model="lora", out="other").exception)


def test_an_error_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["latentrevise", "revise", "--out", "nothing"])
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    assert capsys.readouterr().err.count("\n") == 1


def test_pickled_adapters_are_not_read(place):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    base, _ = load_model("mm", device="cpu")
    peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear")).save_pretrained("lora")
    (place / "lora" / "adapter_model.safetensors").rename(place / "lora" / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"no adapter_model\.safetensors"):
        load_model("lora", device="cpu")


@pytest.mark.parametrize("positions", [40, 512])
def test_the_defaults_run_on_a_model_of_few_positions(place, positions):
    """No max_new_tokens is set: completions end where the model's positions do."""
    import torch

    model = tiny_model(max_position_embeddings=positions)
    with torch.no_grad():
        model.get_input_embeddings().weight[2] = 0.0  # the end of a sequence is improbable
    model.save_pretrained("mm")
    own = [word for setting in FAST if "max_new" not in setting for word in ("--set", setting)]
    given = ("--model", "mm", "--prompts", "p.jsonl", "--quiet")
    result = call("recover", *given, "--out", "run", *own)
    assert result.exit_code == 0, result.exception
    rollouts = read_records(place / "run" / "rollouts", Rollout)
    assert {len(r.completion_ids) for r in rollouts if r.finish_reason == "length"} <= {positions - 3}
    assert positions == 512 or any(r.finish_reason == "length" for r in rollouts)
    result = call("eval", "--model", "mm", "--data", "p.jsonl", "--out", "e", "--quiet")
    assert result.exit_code == 0, result.exception
    for words in (
        ("recover", *given, "--out", "run2", *own),
        ("eval", "--model", "mm", "--data", "p.jsonl", "--out", "e2"),
    ):
        told = str(call(*words, "--set", "max_new_tokens=1024").exception)
        assert f"1024 leaves no room for any prompt in the model's {positions} positions; set it to at most" in told
        assert "-" not in told.split("leaves no room")[1]


@pytest.mark.parametrize(
    ("positions", "given", "expected"), [(40, {}, 20), (4096, {}, 256), (40, {"max_completion_length": 39}, 39)]
)
def test_a_trainers_completions_fit_where_their_length_was_not_set(positions, given, expected):
    pytest.importorskip("trl", reason="trl is not installed (extra `train`)")
    from latentrevise.cli.training import _with_completions
    from latentrevise.train.settings import RLVRSettings

    settings, new = _with_completions(
        RLVRSettings(trainer=given), tiny_model(max_position_embeddings=positions), usual=256
    )
    assert new == settings.trainer["max_completion_length"] == expected
