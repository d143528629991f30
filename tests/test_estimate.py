"""What a run will take: the sample's cost, times as many prompts."""

import pytest
from typer.testing import CliRunner

from latentrevise import RecoverConfig
from latentrevise.cli import app
from latentrevise.data.storage import write_jsonl
from latentrevise.errors import ConfigError, InputError
from latentrevise.recovery.estimate import Cost, Estimate, estimate, estimate_text
from latentrevise.recovery.pipeline import Recovery
from tests.tiny import tiny_model, tiny_tokenizer

ROWS = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(4)]
CONFIG = RecoverConfig(
    rollouts=2, samples=2, max_new_tokens=4, strategies=("latent", "resample"), chunk=2, chat="never"
)  # fmt: skip


def recovery(out):
    return Recovery(tiny_model(), tiny_tokenizer(), CONFIG, out, progress=False)


def test_measured_on_all_prompts_it_is_what_the_run_took(tmp_path):
    found = estimate(recovery(tmp_path / "plan"), ROWS, sample=len(ROWS))
    run = recovery(tmp_path / "run")
    metrics = run.recover(ROWS).metrics
    decoded = sum(len(r.completion_ids) + (r.finish_reason == "stop") for own in run.rollouts().values() for r in own)
    by_name = {line.name: line for line in found.costs}
    assert by_name["mine"].passes == decoded
    assert by_name.keys() == {"mine", *metrics["arms"], "verify"}
    for name, arm in metrics["arms"].items():
        assert by_name[name].prompts == arm["prompts"]
        assert by_name[name].passes == pytest.approx(arm["compute"]["per_prompt"] * arm["prompts"])
        assert by_name[name].seconds > 0
    assert found.zero_hit[0] == metrics["zero_hit"] / len(ROWS)
    assert found.disk == pytest.approx(sum(p.stat().st_size for p in (tmp_path / "plan").rglob("*") if p.is_file()))


def test_a_sample_stands_for_all_prompts_alike(tmp_path):
    rows = [{"id": str(i), "prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(6)]
    few = estimate(recovery(tmp_path / "few"), rows[::3])
    many = estimate(recovery(tmp_path / "many"), rows)
    assert (few.sampled, many.sampled, few.prompts, many.prompts) == (2, 2, 2, 6)
    assert few.zero_hit == many.zero_hit
    for a, b in zip(few.costs, many.costs, strict=True):
        assert (b.name, b.prompts, b.passes) == (a.name, 3 * a.prompts, None if a.passes is None else 3 * a.passes)


def test_the_command_and_its_words(tmp_path):
    with pytest.raises(ConfigError, match="at least 1"):
        estimate(recovery(tmp_path / "a"), ROWS, sample=0)
    with pytest.raises(InputError, match="no usable prompt among 1 rows"):
        estimate(recovery(tmp_path / "b"), [{"prompt": "1", "answer": None}])
    costs = [Cost("mine", 100, 1000, 3600.0), Cost("latent", 40, 5000, 7200.0), Cost("verify", 40, None, 0.0)]
    found = Estimate(100, 1, 10, (0.4, 0.2, 0.8), costs, 2e9, 10**9)
    text = estimate_text(found, workers=2)
    assert "in all 1.5 hours [1, 2.5] on 2 workers like this one; 67% of it is latent" in text
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    write_jsonl(tmp_path / "p.jsonl", ROWS)
    words = ["plan", "--model", tmp_path / "model", "--prompts", tmp_path / "p.jsonl", "--quiet", "--sample", 1]
    for setting in ("rollouts=1", "samples=1", "max_new_tokens=2", "strategies=resample", "equal_compute=false"):
        words += ["--set", setting]
    result = CliRunner().invoke(app, [*map(str, words)])
    assert result.exit_code == 0, result.exception
    assert "4 prompts (0 rows left out); measured on 1 of them" in result.output
    assert [line.split()[0] for line in result.output.splitlines()[3:6]] == ["mine", "resample", "verify"]
