"""The training script: it learns, repeats itself from a seed, keeps to its split, and writes what can be loaded."""

import itertools
import json
import random
from dataclasses import asdict, replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from latentrevise.demo import families, get_family, knowledge, model_dir, split_of
from latentrevise.demo import train as training
from latentrevise.errors import ConfigError, ModelError

SMALL = replace(training.RECIPES["rule"], steps=20, batch_tokens=400, warmup=2)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("drills_only", [0.0, 1.0])
def test_loss_falls(drills_only):
    recipe = replace(SMALL, drills_only=drills_only, drill_share=0.0)
    trainer = training.Trainer(get_family("rule"), recipe, seed=0)
    losses = []
    for _ in range(recipe.steps):
        loss, drill = trainer.step()
        assert drill == (drills_only == 1.0)
        losses.append(loss)
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])


@pytest.mark.parametrize("name", ["rule", "chain", "pair"])
def test_three_steps_are_deterministic(name):
    def weights(seed):
        trainer = training.Trainer(get_family(name), SMALL, seed=seed)
        for _ in range(3):
            trainer.step()
        return [p.detach().clone() for p in trainer.model.parameters()]

    first, again, other = weights(5), weights(5), weights(6)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_rates_warm_up_stay_and_fall_to_zero():
    trainer = training.Trainer(get_family("rule"), replace(SMALL, steps=100, warmup=10, flat=0.5), seed=0)
    rates = []
    for trainer.done in range(100):
        rates.append(trainer.rate())
    assert rates[0] == pytest.approx(0.1)
    assert rates[10:50] == [1.0] * 40
    assert all(a > b for a, b in itertools.pairwise(rates[50:]))
    assert rates[-1] == pytest.approx(0.02)


@pytest.mark.parametrize("name", list(families()))
def test_traces_come_from_the_train_split_and_prompts_are_not_predicted(name):
    family, recipe = get_family(name), training.RECIPES[name]
    trainer = training.Trainer(family, recipe, seed=1)
    batches = training.trace_batches(family, recipe, trainer.tokenizer.get_vocab(), random.Random(1))
    rows = 0
    for _ in range(3):
        batch = next(batches)
        assert batch.ids.numel() <= recipe.batch_tokens
        assert not batch.drill
        for ids, labels in zip(batch.ids, batch.labels, strict=True):
            prompt_end = int((labels != training.IGNORED).nonzero()[0])
            text = trainer.tokenizer.decode(ids[:prompt_end])
            assert split_of(text) == "train"
            assert family.accepts(text)
            predicted = labels != training.IGNORED
            assert torch.equal(labels[predicted], ids[predicted])
            assert trainer.tokenizer.pad_token_id not in labels[predicted]
            rows += 1
    assert rows > 50


def test_initial_number_embeddings_share_digits():
    family = get_family("chain")
    tokenizer = training.build_tokenizer(family)
    table = training.build_model(family, tokenizer, seed=0).get_input_embeddings().weight
    cosine = torch.nn.functional.cosine_similarity
    row = {n: table[tokenizer.convert_tokens_to_ids(str(n))] for n in (123, 124, 789)}
    assert cosine(row[123], row[124], dim=0) > cosine(row[123], row[789], dim=0) + 0.3


def test_what_a_model_knows_is_of_the_whole_answer():
    """The log-probability of both numbers of *partial*, behind the right names."""
    family = get_family("partial")
    tokenizer = training.build_tokenizer(family)
    model = training.build_model(family, tokenizer, seed=0).eval()
    found = knowledge.joint_knowledge(model, tokenizer, family, 3)
    total = 0.0
    for row in knowledge.problems(family, 3, seed=1, mining=True):
        named = family.solution(family.parse(row["prompt"]))[:5]
        ids = tokenizer.encode(f"{row['prompt']} {' '.join(named)} so \\boxed{{ {row['answer']}")
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        total += float(logprobs[-3, ids[-2]] + logprobs[-2, ids[-1]])
    assert found["implicit_logprob"] == pytest.approx(total / 3, abs=1e-3)
    assert found["implicit_accuracy"] == 0.0


def test_diverging_training_stops_with_the_step():
    trainer = training.Trainer(get_family("rule"), SMALL, seed=0)
    with torch.no_grad():
        trainer.model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="rule model's loss became nan at step 1"):
        trainer.step()


def quick_training(name, recipe, directory, seed, evaluation):
    """What a worker of model_for does, without the training: the model is as good as any other for its bookkeeping."""
    directory.mkdir()
    (directory / "training.json").write_text(json.dumps({"seed": seed, "recipe": asdict(recipe)}))


def failed_training(name, recipe, directory, seed, evaluation):
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    raise FloatingPointError(f"the {name} model's loss became nan at step 7")


def test_command_writes_a_loadable_model(tmp_path, capfd):
    status = training.main(
        ["--out", str(tmp_path), "--families", "rule", "--steps", "2", "--evaluation-prompts", "2", "--seed", "3"]
    )
    assert status == 0
    shown = capfd.readouterr()
    assert "rule seed 3: 100%" in shown.err
    assert "2/2" in shown.err
    assert f"{tmp_path / 'rule'}: trained in" in shown.out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "rule")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "rule")
    assert model.dtype == torch.bfloat16
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    record = json.loads((tmp_path / "rule" / "training.json").read_text())
    assert (record["seed"], record["recipe"]["steps"], len(record["losses"])) == (3, 2, 1)
    assert record["parameters"] == sum(p.numel() for p in model.parameters())


def test_model_for_trains_once_and_keeps_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "train_family", quick_training)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    made = training.model_for("rule", 3, tmp_path / "models")
    assert made == tmp_path / "models" / "rule-3"
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["rule-3"]
    assert json.loads((made / "training.json").read_text())["seed"] == 3
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    written = (made / "training.json").stat().st_mtime_ns
    assert training.model_for("rule", 3, tmp_path / "models") == made
    assert (made / "training.json").stat().st_mtime_ns == written


def test_model_for_refuses_a_model_of_another_recipe(tmp_path):
    record = {"recipe": asdict(replace(training.RECIPES["rule"], steps=2))}
    (tmp_path / "rule-3").mkdir()
    (tmp_path / "rule-3" / "training.json").write_text(json.dumps(record))
    with pytest.raises(ModelError, match=r"rule-3 was trained by another recipe .* delete it"):
        training.model_for("rule", 3, tmp_path)


def test_model_for_leaves_nothing_of_a_failed_training(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "train_family", failed_training)
    with pytest.raises(ModelError, match="training the 'rule' model of seed 3 failed"):
        training.model_for("rule", 3, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_model_for_is_the_bundled_one_for_seed_0(tmp_path):
    assert training.model_for("rule", 0, tmp_path) == model_dir("rule")
    with pytest.raises(ConfigError, match="unknown demo family 'sums'"):
        training.model_for("sums", 1, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--families", "sums"], "unknown demo family 'sums'"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--evaluation-prompts", "0"], "--evaluation-prompts must be at least 1"),
    ],
)
def test_bad_arguments(arguments, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        training.main([*arguments, "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
