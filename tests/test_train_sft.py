"""SFT: the same losses, gradients and weights as TRL's own trainer; rows, renderings, mixing; resumption."""

import json
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import embedding
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from latentrevise.config import load_config
from latentrevise.data.records import Prompt, Rollout, Start, Trajectory, write_records
from latentrevise.data.storage import write_json
from latentrevise.errors import ConfigError, InputError
from latentrevise.kernels.linear_logprob import blocked
from latentrevise.recovery.evaluate import EvalConfig
from latentrevise.recovery.rundir import FORMAT, RunDirectory
from latentrevise.train.logprob import METRICS, add_linear_logprob
from latentrevise.train.settings import trl_arguments
from latentrevise.train.sft import (
    LinearSFTTrainer,
    SFTSettings,
    file_dataset,
    ordinary_rollouts,
    rendered,
    sft_dataset,
    train_sft,
)
from tests.test_exports import TOKENIZER, encode, learned, trajectory
from tests.tiny import BOS, EOS, PAD, tiny_model

MODELS = {
    "tied": ("qwen3", {}),
    "untied": ("llama", {}),
    "softcap": ("gemma3", {"final_logit_softcapping": 5.0}),
}


def both(name, **changes):
    """The same model twice: under TRL's head and under ours."""
    arch, own = MODELS[name]
    models = [tiny_model(arch, **(own | changes)) for _ in range(2)]
    add_fused_lm_head(models[0], temperature=0.7, outputs=("log_probs", *METRICS))
    add_linear_logprob(models[1], temperature=0.7, metrics=METRICS)
    return models


@pytest.mark.parametrize("name", MODELS)
def test_log_probs_and_gradients_are_those_of_trl(name, monkeypatch):
    monkeypatch.setattr(blocked, "MOST", 40)  # the table's gradient in three blocks, the last one shorter
    ids = torch.randint(4, 97, (3, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :5] = labels[1, 9:] = -100
    weights = torch.randn(3, 11, generator=torch.Generator().manual_seed(1))
    results = []
    for model in both(name):
        out = model(input_ids=ids, labels=labels, fused_lm_head=True)
        (out.log_probs * weights).sum().backward()
        results.append((out, {n: p.grad for n, p in model.named_parameters()}))
    (theirs, wanted), (ours, got) = results
    torch.testing.assert_close(ours.log_probs, theirs.log_probs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.entropy, theirs.entropy, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.loss, theirs.loss, atol=1e-5, rtol=1e-5)
    assert torch.equal(ours.is_top1, theirs.is_top1)
    assert torch.equal(ours.label_mask, theirs.label_mask)
    for key in wanted:
        torch.testing.assert_close(got[key], wanted[key], atol=1e-5, rtol=1e-5, msg=key)


def steps_into(loss, parameter):
    """How many edges of the graph lead to the parameter: autograd holds a gradient of its size for each at once."""
    edges, seen, todo = 0, set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        for step, _ in node.next_functions:
            if step is not None:
                edges += getattr(step, "variable", None) is parameter
                if step not in seen:
                    seen.add(step)
                    todo.append(step)
    return edges


@pytest.mark.parametrize("unusual", [None, "scale_grad_by_freq", "twice", "frozen"])
@pytest.mark.parametrize("name", ["tied", "softcap", "untied"])
def test_the_uses_of_a_tied_table_share_a_gradient(name, unusual):
    """Over two micro-batches, padding among the ids: what TRL's head gives, by one way into the table."""
    ids = torch.randint(0, 97, (2, 3, 12), generator=torch.Generator().manual_seed(0))
    ids[:, :, 3:5] = PAD
    theirs, ours = both(name)
    assert ours.get_input_embeddings().padding_idx == PAD
    for model in (theirs, ours):
        rows = model.get_input_embeddings()
        if unusual == "scale_grad_by_freq":
            rows.scale_grad_by_freq = True
        if unusual == "twice":
            rows.register_forward_hook(lambda rows, ids, out: out + embedding(ids[0].flip(1), rows.weight))
        if unusual == "frozen":
            rows.weight.requires_grad_(False)
        for batch in ids:
            loss = model(input_ids=batch, labels=batch, fused_lm_head=True).loss
            loss.backward()
    one_way = {"scale_grad_by_freq": 2, "frozen": 0}.get(unusual, 1)
    untied_ways = {"twice": 2, "frozen": 0}.get(unusual, 1)
    assert steps_into(loss, ours.get_input_embeddings().weight) == (untied_ways if name == "untied" else one_way)
    for (key, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if p.requires_grad:
            torch.testing.assert_close(p.grad, q.grad, atol=1e-5, rtol=1e-5, msg=key)
        else:
            assert p.grad is q.grad is None


@pytest.mark.parametrize("detached", [False, True])
def test_a_tied_table_whose_entropy_counts(detached):
    """Any function of log-probs and entropy, back twice, and where the rows looked up pass no gradient on."""
    plain, ours = tiny_model(), tiny_model()
    add_linear_logprob(ours, metrics=("entropy",))
    ids = torch.arange(4, 28).view(2, 12)
    for model in (plain, ours):
        if detached:
            model.get_input_embeddings().register_forward_hook(lambda rows, ids, out: out.detach())
    logp = plain(input_ids=ids).logits[:, :-1].log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    own = logp.gather(2, ids[:, 1:, None])[..., 0]
    (own.square().sum() + 2 * entropy.sum()).mul(2).backward()
    out = ours(input_ids=ids, labels=ids, fused_lm_head=True)
    loss = out.log_probs.square().sum() + 2 * out.entropy.sum()
    loss.backward(retain_graph=True)
    loss.backward()
    for (key, p), q in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-4, rtol=1e-4, msg=key)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_tied_table_with_checkpoints(reentrant):
    grads = []
    for model in both("tied"):
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        ids = torch.arange(4, 28).view(2, 12)
        model(input_ids=ids, labels=ids, fused_lm_head=True).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    for key, wanted in grads[0].items():
        torch.testing.assert_close(grads[1][key], wanted, atol=1e-5, rtol=1e-5, msg=key)


def test_the_plain_forward_is_untouched():
    model = tiny_model()
    ids = torch.arange(4, 12)[None]
    before = model(input_ids=ids, labels=ids)
    add_linear_logprob(model)
    after = model(input_ids=ids, labels=ids)
    assert torch.equal(before.logits, after.logits)
    assert torch.equal(before.loss, after.loss)
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape[1] <= ids.shape[1] + 2


def test_a_batch_without_a_label_has_a_gradient_of_zero():
    model = tiny_model()
    add_linear_logprob(model)
    ids = torch.arange(4, 12)[None]
    out = model(input_ids=ids, labels=torch.full_like(ids, -100), fused_lm_head=True)
    out.loss.backward()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def rows(count=6):
    texts = ["2*3 is \\boxed{6}", "so 4+4, eight: \\boxed{8}", "no", "think of ten minus one = 9"]
    out = []
    for i in range(count):
        prompt, completion = encode(f"q{i}"), (*encode(texts[i % 4]), EOS)
        out.append(
            {
                "input_ids": [BOS, *prompt, *completion],
                "completion_mask": [0] * (1 + len(prompt)) + [1] * len(completion),
            }
        )
    return out


ARGUMENTS = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
    "max_steps": 4,
    "logging_steps": 1,
    "save_strategy": "no",
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}


def trained(cls, out, peft=None, **changes):
    trainer = cls(
        model=tiny_model(),
        args=trl_arguments(SFTConfig, out, ARGUMENTS | changes),
        train_dataset=Dataset.from_list(rows()),
        processing_class=TOKENIZER,
        peft_config=peft,
    )
    trainer.train()
    keys = ("loss", "grad_norm", "entropy", "mean_token_accuracy")
    history = [[entry[k] for k in keys] for entry in trainer.state.log_history if "loss" in entry]
    return torch.tensor(history), {n: p.detach() for n, p in trainer.model.named_parameters()}


@pytest.mark.parametrize(
    "changes", [{}, {"packing": True, "max_length": 64, "per_device_train_batch_size": 1}, {"loss_type": "dft"}]
)
def test_training_equals_trl(tmp_path, changes):
    (losses, weights), (own_losses, own) = (
        trained(cls, tmp_path / cls.__name__, **changes) for cls in (SFTTrainer, LinearSFTTrainer)
    )
    assert len(losses) == 4
    torch.testing.assert_close(own_losses, losses, atol=1e-5, rtol=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(own[name], weight, atol=1e-5, rtol=1e-5, msg=name)


def test_lora_trains_the_adapter_alone(tmp_path):
    settings = load_config(SFTSettings, overrides=["lora.rank=4", "lora.alpha=8"])
    (losses, _), (own_losses, own) = (
        trained(cls, tmp_path / cls.__name__, peft=settings.lora.peft()) for cls in (SFTTrainer, LinearSFTTrainer)
    )
    torch.testing.assert_close(own_losses, losses, atol=1e-5, rtol=1e-5)
    base = dict(tiny_model().named_parameters())
    frozen = [n for n in own if "lora" not in n]
    assert frozen
    for name in frozen:
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        assert torch.equal(own[name], base[plain]), name


@pytest.mark.parametrize("packing", [{}, {"packing": True, "max_length": 64}])
def test_only_the_completion_is_learned(tmp_path, packing):
    data, model = rows(), tiny_model()
    total = count = 0.0
    for row in data:
        ids, mask = torch.tensor(row["input_ids"]), torch.tensor(row["completion_mask"])[1:]
        logprobs = model(ids[None]).logits[0, :-1].detach().log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        total, count = total - float((logprobs * mask).sum()), count + int(mask.sum())
    one_batch = {"max_steps": 1, "per_device_train_batch_size": len(data), "gradient_accumulation_steps": 1}
    settings = SFTSettings(trainer=ARGUMENTS | one_batch | packing)
    trainer = train_sft(model, TOKENIZER, data, tmp_path, settings)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize("packing", [False, True])
def test_rows_are_cut_only_where_a_length_is_given(tmp_path, caplog, packing):
    """TRL's own length is 1024 tokens."""
    long = {"input_ids": [BOS, *[5] * 1100, EOS], "completion_mask": [0] + [1] * 1101}
    own = ARGUMENTS | {"max_steps": 1, "per_device_train_batch_size": 1, "packing": packing}
    model, data = tiny_model(max_position_embeddings=2048), [long, *rows(1)]
    trainer = train_sft(model, TOKENIZER, data, tmp_path / "whole", SFTSettings(trainer=own))
    assert max(len(row["input_ids"]) for row in trainer.train_dataset) == 1102
    assert "rows are longer" not in caplog.text
    trainer = train_sft(model, TOKENIZER, data, tmp_path / "cut", SFTSettings(trainer=own | {"max_length": 64}))
    assert max(len(row["input_ids"]) for row in trainer.train_dataset) == 64
    assert "1 of 2 rows are longer than trainer.max_length = 64" in caplog.text


def test_interrupted_training_resumes_to_the_same_losses(tmp_path):
    settings = SFTSettings(mix=0.0, trainer=ARGUMENTS | {"save_strategy": "steps", "save_steps": 2})
    whole = train_sft(tiny_model(), TOKENIZER, rows(), tmp_path / "whole", settings)
    # The same run, killed after its second step: four planned, the checkpoint of step 2 is the last one there.
    for name in ("checkpoint-2",):
        (tmp_path / "resumed").mkdir()
        (tmp_path / "whole" / name).rename(tmp_path / "resumed" / name)
    resumed = train_sft(tiny_model(seed=9), TOKENIZER, rows(), tmp_path / "resumed", settings)
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (whole, resumed)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert (tmp_path / "resumed" / "model" / "model.safetensors").is_file()


def test_evaluation_samples_the_prompts(tmp_path):
    prompts = [Prompt(f"p{i}", "q", (BOS, *encode("q")), "6") for i in range(3)]
    evaluation = EvalConfig(samples=2, k=(1, 2), max_new_tokens=4, resamples=10)
    settings = SFTSettings(trainer=ARGUMENTS | {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 2}, holdout=2)
    settings = replace(settings, evaluation=evaluation)
    trainer = train_sft(tiny_model(), TOKENIZER, rows(), tmp_path, settings, prompts)
    (entry,) = [e for e in trainer.state.log_history if "eval_pass@2" in e]
    assert entry["eval_pass@1"] == 0.0
    assert entry["eval_zero_hit"] == 1.0
    with pytest.raises(ConfigError, match="when the trainer evaluates"):
        train_sft(tiny_model(), TOKENIZER, rows(), tmp_path / "b", replace(settings, trainer=ARGUMENTS), prompts)
    with pytest.raises(ConfigError, match="holdout"):
        train_sft(tiny_model(), TOKENIZER, rows(), tmp_path / "b", replace(settings, holdout=0), prompts)


@pytest.fixture
def run(tmp_path):
    """A finished run: two trajectories of one prompt, one of another; a third prompt has ordinary correct rollouts."""
    directory = RunDirectory(tmp_path / "run")
    made = [
        trajectory(0),
        trajectory(
            0, sample_id="p0/latent/1", completion=" it is \\boxed{6}", completion_ids=encode(" it is \\boxed{6}")
        ),
        trajectory(1, strategy="pivot", start_id="pivot/p1/0"),
    ]
    write_json(directory.header, {"format": FORMAT, "config": {"stop": []}, "model": {"path": "m"}})
    write_records(directory.trajectories, made, Trajectory)
    write_records(directory.prompts, [Prompt(f"p{i}", "q", (BOS, *encode(f"q{i}")), "6") for i in range(4)], Prompt)
    correct = [
        Rollout(f"p{p}", f"p{p}/{s}", encode(f"ok {s}"), f"ok {s}", "6", "correct", "stop", ())
        for p, s in ((2, 0), (2, 1), (3, 0))
    ]
    write_records(directory.path / "rollouts" / "part-00000.parquet", correct, Rollout)
    starts = [
        Start(
            start_id=t.start_id, prompt_id=t.prompt_id, parent_sample_id=None, target="6", prefix_ids=t.prefix_ids,
            plain_ids=encode("think six."), latent=True, greedy=False, n=1, forward_tokens=0, backward_tokens=0,
            decoded_tokens=0, seconds=0.0,
        )
        for t in (made[0], made[2])
    ]  # fmt: skip
    for strategy, start in zip(("latent", "pivot"), starts, strict=True):
        write_records(directory.part("starts", 0, strategy), [start], Start)
    return directory


def test_rows_of_a_run(run):
    found = sft_dataset(run.path, SFTSettings(mix=1.0), TOKENIZER)
    assert sorted(r["strategy"] for r in found) == ["latent", "latent", "ordinary", "ordinary", "ordinary", "pivot"]
    plain = next(r for r in found if r["sample_id"] == "p2/0")
    assert learned(plain) == (*encode("ok 0"), EOS)
    found = sft_dataset(run.path, SFTSettings(mix=0.0, strategies=("latent",), per_prompt=1), TOKENIZER)
    assert [r["sample_id"] for r in found] == ["p0/latent/0"]
    with pytest.raises(InputError, match="no trajectory of hint"):
        sft_dataset(run.path, SFTSettings(strategies=("hint",)), TOKENIZER)


def test_ordinary_rollouts_are_spread_over_prompts(run):
    from latentrevise.data.records import read_records

    found = ordinary_rollouts(read_records(run.path / "rollouts", Rollout), 2, seed=0)
    assert {r.prompt_id for r in found} == {"p2", "p3"}


def test_renderings(run):
    t = trajectory(0)
    by = {
        name: sft_dataset(
            run.path, SFTSettings(mix=0.0, strategies=("latent",), per_prompt=1, rendering=name), TOKENIZER
        )
        for name in ("argmax", "original", "continuation")
    }
    assert learned(by["argmax"][0]) == (*encode("think six."), *t.completion_ids, EOS)
    assert learned(by["original"][0]) == (*t.prefix_ids, *t.completion_ids, EOS)
    assert learned(by["continuation"][0]) == (*t.completion_ids, EOS)
    assert by["continuation"][0]["input_ids"] == by["argmax"][0]["input_ids"]
    # Recorded with the failed prefix, rendered with the revised one: its tokens come from the run's starts.
    recorded = replace(t, prefix_rendering="original", plain_prefix_ids=t.prefix_ids, plain_logprobs=(-1.0,))
    (again,) = rendered([recorded], "argmax", run)
    assert again.plain_prefix_ids == encode("think six.")
    assert again.plain_logprobs is None


def test_command(run, tmp_path):
    from typer.testing import CliRunner

    from latentrevise.cli import app

    tiny_model().save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")

    def call(*more, rows=("--run", str(run.path))):
        steps = [part for key in ("max_steps=1", "save_strategy=no", *more) for part in ("--set", f"trainer.{key}")]
        places = [*rows, "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out")]
        return CliRunner().invoke(app, ["train", "sft", *places, *steps])

    result = call()
    assert result.exit_code == 0, result.output
    assert "6 rows: 2 latent, 3 ordinary, 1 pivot" in result.output
    assert (tmp_path / "out" / "model" / "tokenizer.json").is_file()
    assert call().exit_code == 0
    assert "other settings" in str(call("learning_rate=1").exception)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "think six .", "completion": "so six ."}\n' * 2)
    of_a_file = ("--rows", str(tmp_path / "rows.jsonl"))
    assert "either --run" in str(call(rows=(*of_a_file, "--run", str(run.path))).exception)
    (tmp_path / "out").rename(tmp_path / "before")
    result = call(rows=of_a_file)
    assert result.exit_code == 0, result.output
    assert "2 rows: 2 given" in result.output


def test_rows_of_a_file(tmp_path):
    """The completion and the end-of-sequence token are learned; what only a run has is refused beside it."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "think six .", "completion": "so six ."}\n')
    (row,) = file_dataset(path, SFTSettings(), TOKENIZER)
    assert tuple(row["input_ids"]) == (*encode("think six ."), *encode("so six ."), TOKENIZER.eos_token_id)
    assert row["completion_mask"] == [0] * len(encode("think six .")) + [1] * (len(encode("so six .")) + 1)
    with pytest.raises(ConfigError, match="valid_only: chosen among the rows of a run"):
        file_dataset(path, SFTSettings(valid_only=True), TOKENIZER)
    for line, reason in (
        ('{"prompt": "think six ."}', "row 1: column 'completion' is no text"),
        ('{"completion": "so six ."}', "row 1"),
        ("", "is empty"),
    ):
        path.write_text(line)
        with pytest.raises(InputError, match=reason):
            file_dataset(path, SFTSettings(), TOKENIZER)


def test_arguments_of_trl_are_checked(tmp_path):
    assert trl_arguments(SFTConfig, tmp_path, {"learning_rate": "1e-4"}).learning_rate == 1e-4
    with pytest.raises(ConfigError, match="did you mean learning_rate"):
        trl_arguments(SFTConfig, tmp_path, {"learning_rat": 1})
    with pytest.raises(ConfigError, match="refuses"):
        trl_arguments(SFTConfig, tmp_path, {"lr_scheduler_type": "zigzag"})
    assert json.loads(json.dumps(load_config(SFTSettings, overrides=["trainer.packing=true"]).trainer)) == {
        "packing": True
    }
