"""What a run will take: the sample's cost, times as many prompts."""

import json
from dataclasses import replace

import pytest
import torch
import yaml
from typer.testing import CliRunner

from latentrevise import RecoverConfig
from latentrevise.cli import app
from latentrevise.config import load_config
from latentrevise.data.storage import write_jsonl
from latentrevise.errors import ConfigError, InputError
from latentrevise.recovery import measure
from latentrevise.recovery.estimate import Cost, Estimate, estimate_text, expected, sampled
from latentrevise.recovery.pipeline import Recovery
from tests.tiny import tiny_model, tiny_tokenizer

ROWS = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(4)]
CONFIG = RecoverConfig(
    rollouts=2, samples=2, max_new_tokens=4, strategies=("latent", "resample"), chunk=2, chat="never"
)  # fmt: skip


def recovery(out):
    return Recovery(tiny_model(), tiny_tokenizer(), CONFIG, out, progress=False)


def estimate(out, rows, size=None):
    return expected(sampled(recovery(out), rows, size)[0], CONFIG)


def test_measured_on_all_prompts_it_is_what_the_run_took(tmp_path):
    found = estimate(tmp_path / "plan", ROWS, len(ROWS))
    run = recovery(tmp_path / "run")
    metrics = run.recover(ROWS).metrics
    by_name = {line.name: line for line in found.costs}
    assert by_name["mine"].passes == metrics["mined"]["passes"]
    assert by_name["mine"].tokens == metrics["mined"]["decoded"]
    assert by_name.keys() == {"mine", *metrics["arms"]}
    for name, arm in metrics["arms"].items():
        assert by_name[name].prompts == arm["prompts"]
        assert by_name[name].tokens == arm["compute"]["decoded"]
        assert by_name[name].passes == pytest.approx(arm["compute"]["per_prompt"] * arm["prompts"])
        assert by_name[name].stages.keys() == {"revise", "sample", "verify"}
        assert all(seconds > 0 for seconds in by_name[name].stages.values())
        own = [p for stage in ("starts", "samples", "verdicts") for p in (tmp_path / "plan" / stage / name).iterdir()]
        assert by_name[name].disk == pytest.approx(sum(path.stat().st_size for path in own))
    assert all(seconds > 0 for seconds in by_name["mine"].stages.values())
    assert found.zero_hit[0] == metrics["zero_hit"] / len(ROWS)
    assert found.control == json.loads((tmp_path / "plan/control.json").read_text())["samples"]
    assert found.disk == pytest.approx(sum(p.stat().st_size for p in (tmp_path / "plan").rglob("*") if p.is_file()))
    assert found.gpus == 0, "this test is on a CPU"


def test_a_sample_stands_for_all_prompts_alike(tmp_path):
    rows = [{"id": str(i), "prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(6)]
    few = estimate(tmp_path / "few", rows[::3])
    many = estimate(tmp_path / "many", rows)
    assert (few.sampled, many.sampled, few.prompts, many.prompts) == (2, 2, 2, 6)
    assert few.zero_hit == many.zero_hit
    for a, b in zip(few.costs, many.costs, strict=True):
        assert (b.name, b.prompts, b.tokens, b.passes) == (a.name, 3 * a.prompts, 3 * a.tokens, 3 * a.passes)


def test_the_peak_of_memory_is_that_of_a_part():
    cpu = torch.device("cpu")
    if not measure._peak_anew(cpu):
        pytest.skip("this kernel does not let the peak begin anew")
    held = torch.ones(2**26)  # 256 MiB
    high = measure._peak(cpu)
    del held
    assert measure._peak_anew(cpu)
    assert high - measure._peak(cpu) > 2**27


def test_what_is_not_to_be_measured_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="at least 1"):
        sampled(recovery(tmp_path / "a"), ROWS, 0)
    with pytest.raises(InputError, match="no usable prompt among 1 rows"):
        sampled(recovery(tmp_path / "b"), [{"prompt": "1", "answer": None}])


def test_the_words():
    costs = [
        Cost("mine", 100, 900, 1000, {"sample": 2700.0, "verify": 900.0}, 1e9, None),
        Cost("latent", 40, 400, 5000, {"revise": 7200.0, "sample": 0.0, "verify": 0.0}, 1e9, 3 * 10**9),
    ]
    found = Estimate(CONFIG, 100, 10, (0.4, 0.2, 0.8), 12.0, 0, costs, 2e9, 2)
    text = estimate_text(found, left_out=1, workers=2)
    assert "100 prompts (1 rows left out); measured on 10 of them" in text
    mine, latent = ([*line.split()] for line in text.splitlines()[3:5])
    assert mine == ["mine", "100", "900", "1,000", "1", "2", "1", "sample", "(75%)"]
    assert latent == ["latent", "40", "400", "5,000", "2", "4", "3", "1", "revise", "(100%)"]
    assert "in all 1.5 hours [1, 2.5] on 2 workers like this one, 6 GPU hours; 67% of it is latent, by revise" in text
    assert "disk 2 GB; memory 3 GB at the peak" in text
    assert "memory not known here" in estimate_text(replace(found, costs=costs[:1]))


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    place = tmp_path_factory.mktemp("plan")
    tiny_model().save_pretrained(place / "model")
    tiny_tokenizer().save_pretrained(place / "model")
    write_jsonl(place / "p.jsonl", ROWS)
    words = ["plan", "--model", place / "model", "--prompts", place / "p.jsonl", "--quiet", "--sample", 1]
    for setting in ("rollouts=1", "samples=1", "max_new_tokens=2", "strategies=resample", "equal_compute=false"):
        words += ["--set", setting]
    return [*map(str, words)]


def test_the_command(words):
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.exception
    assert "4 prompts (0 rows left out); measured on 1 of them" in result.output
    assert [line.split()[0] for line in result.output.splitlines()[3:5]] == ["mine", "resample"]


def test_what_it_prints_for_a_budget_is_a_file_of_settings(words, tmp_path):
    result = CliRunner().invoke(app, [*words, "--budget", "1000h"])
    assert result.exit_code == 0, result.exception
    (tmp_path / "fits.yaml").write_text(result.stdout)
    assert yaml.safe_load(result.stdout)["max_new_tokens"] == 2
    asked = {"rollouts": 1, "samples": 1, "max_new_tokens": 2, "strategies": ("resample",), "equal_compute": False}
    assert load_config(RecoverConfig, tmp_path / "fits.yaml") == RecoverConfig(**asked)
    assert "# 4 prompts (0 rows left out)" in result.stdout
    result = CliRunner().invoke(app, [*words, "--budget", "0.0000001m"])
    assert isinstance(result.exception, ConfigError)
    assert "no settings fit" in str(result.exception)
    assert "the least is" in str(result.exception)


@pytest.mark.parametrize("text", ["12", "h", "-1h", "0h", "1d", "12 h", "1e3h", ""])
def test_a_budget_that_is_no_time_is_refused_before_anything_is_loaded(text):
    result = CliRunner().invoke(app, ["plan", "--model", "nowhere", "--prompts", "none", "--budget", text])
    assert isinstance(result.exception, ConfigError)
    assert str(result.exception).startswith(f"--budget {text!r}: it is no time above zero with its unit; write hours")
