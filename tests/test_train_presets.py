"""The published settings that come with the package: they load by name, say what Table 7 says, and run."""

import dataclasses
from pathlib import Path

import pytest
from typer.testing import CliRunner

from latentrevise.cli import app
from latentrevise.config import PRESETS, load_config
from latentrevise.data.storage import write_jsonl
from latentrevise.errors import ConfigError
from latentrevise.recovery.guards import GuardConfig
from latentrevise.revise.revision import ReviseConfig
from latentrevise.train.rlvr import RLVRSettings
from latentrevise.train.sft import SFTSettings
from tests.test_train_rlvr import PROMPTS, TOKENIZER
from tests.tiny import tiny_model

SMALL = ("per_device_train_batch_size=8", "gradient_accumulation_steps=2", "max_steps=1", "disable_tqdm=true")


def test_grpo_is_table_7():
    s = load_config(RLVRSettings, "paper-grpo")
    repair, trainer = s.repair, s.trainer
    assert (repair.strategy, repair.prefix_fraction, repair.revised_rollouts, repair.replace) == ("latent", 0.8, 1, 1)
    assert repair.answer_template == "Based on my current reasoning process, the final answer is "
    assert (repair.rendering, s.loss, s.advantages, s.drop_unrescued) == ("argmax", "trl", "grpo_include", False)
    assert repair.latent == ReviseConfig()  # which is the published one
    latent = repair.latent
    assert (latent.guide_weight, latent.explore_weight, latent.fluency_weight) == (1.0, 1.0, 0.1)
    assert (latent.steps, latent.step_rule, latent.step_size, latent.stop_guide) == (10, "harmonic", 0.1, 1e-3)
    assert repair.rho == 0.8
    assert trainer["per_device_train_batch_size"] * trainer["gradient_accumulation_steps"] == 512 * 8
    wanted = {"num_generations": 8, "learning_rate": 1e-5, "beta": 0.001, "max_grad_norm": 1.0}
    wanted |= {"max_completion_length": 8192, "lr_scheduler_type": "constant", "optim": "adamw_torch"}
    assert wanted.items() <= trainer.items()
    thresholds = {f.name for f in dataclasses.fields(GuardConfig)} - {"agreement_samples", "agreement_cut"}
    on = {name for name in thresholds if getattr(repair.guards, name) not in (None, False)}
    assert not on, "the paper turns no verified row away"


def test_sft_is_cross_entropy_on_the_whole_row():
    s = load_config(SFTSettings, "paper-sft")
    assert (s.strategies, s.rendering, s.mix) == (("latent",), "argmax", 0.0)
    assert {"learning_rate": 1e-5, "max_grad_norm": 1.0, "max_length": 8192}.items() <= s.trainer.items()


def test_a_file_comes_before_a_preset_and_a_wrong_name_lists_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("paper-sft").write_text("mix: 0.5\n")
    assert load_config(SFTSettings, "paper-sft").mix == 0.5
    assert load_config(SFTSettings, PRESETS / "paper-sft.yaml").mix == 0.0
    with pytest.raises(ConfigError, match="paper-grpo, paper-sft"):
        load_config(SFTSettings, "paper-stf")


def test_grpo_runs_by_its_name(tmp_path):
    """Every group of a random model is zero-hit: one path of each is revised."""
    tiny_model().save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": p.text, "answer": p.answer} for p in PROMPTS])
    words = ["train", "rlvr", "--model", tmp_path / "model", "--prompts", tmp_path / "prompts.jsonl"]
    words += ["--out", tmp_path / "out", "--config", "paper-grpo"]
    for value in (*SMALL, "max_completion_length=16", "logging_steps=1"):
        words += ["--set", f"trainer.{value}"]
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()
