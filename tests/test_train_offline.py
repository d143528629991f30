"""Trainers that TRL has, over what this package has: groups that are there already, teachers told the answer."""

import json

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer
from typer.testing import CliRunner

from latentrevise.cli import app
from latentrevise.data.export import export_run
from latentrevise.data.formats import group_rows, step_preference_rows
from latentrevise.data.records import Rollout, write_records
from latentrevise.data.storage import write_json, write_jsonl
from latentrevise.errors import ConfigError, InputError
from latentrevise.train.distill import DistillSettings, train_distill
from latentrevise.train.offline import GroupSettings, read_groups, train_groups
from tests.test_exports import PROMPTS, TOKENIZER, encode, trajectory
from tests.test_train_rlvr import ARGUMENTS
from tests.test_train_rlvr import PROMPTS as QUESTIONS
from tests.tiny import EOS, tiny_model

DISTILLED = {key: value for key, value in ARGUMENTS.items() if key != "num_generations"} | {"max_steps": 1}


def rollout(i, text, verdict="wrong", prompt="p0", reason="stop"):
    ids = encode(text)
    return Rollout(prompt, f"{prompt}/{i}", ids, text, None, verdict, reason, (-1.0,) * len(ids))


FAILED = [rollout(0, "no"), rollout(1, "think five. \\boxed{5}"), rollout(2, "nope"), rollout(3, "x", reason="length")]
SOLVED = [rollout(i, "six \\boxed{6}", "correct" if i else "wrong", "p1") for i in range(4)]


def made(**changes):
    return group_rows([trajectory(**changes)], [*FAILED, *SOLVED], PROMPTS, TOKENIZER)


def test_groups_are_a_runs_rollouts_with_the_recovered_row_in_the_longest_ones_place():
    first, second = made()
    assert first["outcomes"] == [0.0, 1.0, 0.0, 0.0]
    assert first["recovered"] == [False, True, False, False]
    assert first["completions"][1] == [*encode("think six. so \\boxed{6}"), EOS]
    assert first["completions"][0] == [*encode("no"), EOS]
    assert first["completions"][3] == list(encode("x"))  # cut by the sampler: no end
    assert second["outcomes"] == [0.0, 1.0, 1.0, 1.0]
    assert not any(second["recovered"])
    (given, _) = made(prefix_rendering="continuation")
    prefix = len(encode("think six."))
    assert given["masks"][1] == [0] * prefix + [1] * (len(given["completions"][1]) - prefix)


def test_groups_with_an_undecided_row_are_left_out():
    rollouts = [rollout(0, "no", "unknown"), *FAILED[1:], *SOLVED]
    assert [row["prompt_id"] for row in group_rows([], rollouts, PROMPTS, TOKENIZER)] == ["p1"]


def test_grpo_over_groups_makes_the_recovered_row_likelier(tmp_path):
    write_jsonl(tmp_path / "groups.jsonl", made())
    groups = read_groups(tmp_path / "groups.jsonl")
    model = tiny_model()
    row = torch.tensor([[*groups[0]["prompt_ids"], *groups[0]["completions"][1]]])
    skip = len(groups[0]["prompt_ids"])

    def logp(policy):
        with torch.no_grad():
            return policy(row).logits[0, skip - 1 : -1].log_softmax(-1).gather(1, row[0, skip:, None]).sum()

    before = logp(model)
    given = {"max_steps": 2, "learning_rate": 1e-3, "gradient_accumulation_steps": 2, "logging_steps": 1}
    given |= {"gradient_checkpointing": False, "save_strategy": "no", "disable_tqdm": True}
    trainer = train_groups(model, TOKENIZER, groups, tmp_path / "out", GroupSettings(trainer=given))
    assert logp(trainer.model.eval()) > before
    (entry, *_) = trainer.state.log_history
    assert entry["rewards/recorded/mean"] == 0.5
    with pytest.raises(ConfigError, match="4 rows each"):
        train_groups(model, TOKENIZER, groups, tmp_path / "b", GroupSettings(trainer={"num_generations": 8}))


def test_files_that_hold_no_groups(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "q"}])
    with pytest.raises(InputError, match="no column prompt_id"):
        read_groups(tmp_path / "a.jsonl")
    write_jsonl(tmp_path / "b.jsonl", [row | {"prompt_id": "same"} for row in made()])
    with pytest.raises(InputError, match="a prompt id twice"):
        read_groups(tmp_path / "b.jsonl")
    with pytest.raises(InputError, match="no such file"):
        read_groups(tmp_path / "c.jsonl")


def test_step_pairs_part_at_one_fork():
    """Nearest is the branch that shares the most tokens; what is given is in no pair's answers."""
    branches = [
        ("p0", "far", encode("no")),
        ("p0", "near", encode("think six, so 5")),
        ("p0", "mid", encode("think five")),
    ]
    (row,) = step_preference_rows([trajectory()], branches, TOKENIZER)
    assert row["prompt"].endswith("2 * 3 = ?think six")
    assert (row["chosen"], row["rejected"]) == (". so \\boxed{6}", ", so 5")
    assert (row["rejected_sample_id"], row["shared_tokens"]) == ("near", len("think six"))
    given = trajectory(prefix_rendering="continuation")  # its prefix is context: a fork within it cannot be learned
    (row,) = step_preference_rows([given], [*branches, ("p0", "sib", encode("think six. no"))], TOKENIZER)
    assert (row["rejected_sample_id"], row["chosen"], row["rejected"]) == ("sib", "so \\boxed{6}", "no")
    with pytest.raises(InputError, match="export trl-pref"):
        step_preference_rows([given], branches, TOKENIZER)
    with pytest.raises(InputError, match="none of 1"):
        step_preference_rows([trajectory()], [("p0", "beginning", encode("think"))], TOKENIZER)


def test_step_pairs_are_what_dpo_reads(tmp_path):
    rows = step_preference_rows([trajectory()], [("p0", "near", encode("think six, so 5"))], TOKENIZER)
    out = DPOConfig(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, bf16=False, disable_tqdm=True)
    data = Dataset.from_list([{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows])
    tiny_model().save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    trainer = DPOTrainer(model=model, args=out, train_dataset=data, processing_class=TOKENIZER)
    assert trainer.train().training_loss > 0


def test_commands(tmp_path):
    run, model = tmp_path / "run", tmp_path / "model"
    tiny_model().save_pretrained(model)
    TOKENIZER.save_pretrained(model)
    write_json(run / "run.json", {"config": {"stop": []}, "model": {"path": str(model)}})
    write_records(run / "trajectories.parquet", [trajectory()])
    write_records(run / "rollouts" / "part-00000.parquet", [*FAILED, *SOLVED])
    write_records(run / "prompts.parquet", PROMPTS)
    assert export_run(run, "trl-groups", tmp_path / "groups.jsonl") == 2
    words = ["train", "groups", "--data", tmp_path / "groups.jsonl", "--model", model, "--out", tmp_path / "out"]
    for key in ("max_steps=1", "gradient_checkpointing=false", "save_strategy=no"):
        words += ["--set", f"trainer.{key}"]
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out" / "train.json").read_text())["kind"] == "groups"
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(("method", "own"), [("opsd", {}), ("sdpo", {"num_generations": 4})])
def test_a_teacher_that_is_told_the_answer(tmp_path, method, own):
    """TRL's trainers, one step on groups that fail throughout: what they learn comes from the gold answer alone."""
    tiny_model().save_pretrained(tmp_path / "model")
    settings = DistillSettings(method=method, trainer=DISTILLED | own)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    trainer = train_distill(model, TOKENIZER, QUESTIONS, tmp_path / "out", settings)
    (entry,) = [e for e in trainer.state.log_history if "grad_norm" in e]
    assert entry["grad_norm"] > 0
    with pytest.raises(ConfigError, match="must hold"):
        DistillSettings(privileged="no answer")
