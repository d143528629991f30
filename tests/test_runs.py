"""Runs that are taken up: on another day, over rows of any text, with wrapped models; the same in training."""

import json
from importlib.util import find_spec
from itertools import count

import pytest

from latentrevise import RecoverConfig, recover
from latentrevise.data.records import Prompt, read_records
from latentrevise.data.storage import read_jsonl, write_jsonl
from latentrevise.engines import HFEngine, Request, SamplingParams
from latentrevise.errors import ConfigError, RunError
from latentrevise.recovery.evaluate import EvalRunConfig, evaluate_run
from tests.tiny import EOS, PAD, tiny_model, tiny_tokenizer

FAST = {
    "rollouts": 2,
    "samples": 2,
    "max_new_tokens": 6,
    "strategies": ("latent", "resample"),
    "answer_template": "=",
    "chunk": 2,
}
ROWS = [{"prompt": f"1+{i}", "answer": str(i + 1)} for i in range(3)]


def dated(day):
    """A template that prints the date, as those of Llama 3.2, Granite and SmolLM3 do."""
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = f"{{{{ 'today is {day}.' }}}}" + tokenizer.chat_template
    return tokenizer


def test_a_run_goes_on_after_midnight_with_the_prompts_it_has(tmp_path):
    config, model = RecoverConfig(**FAST), tiny_model()
    rows = [*ROWS, {"prompt": [{"role": "user", "content": "5"}], "answer": "5"}]
    first = recover(model, dated("1 May"), rows, config, tmp_path / "out")
    stored = read_records(tmp_path / "out" / "prompts.parquet", Prompt)
    (tmp_path / "out" / "rollouts" / "part-00001.parquet").unlink()
    again = recover(model, dated("2 May"), rows, config, tmp_path / "out")
    assert read_records(tmp_path / "out" / "prompts.parquet", Prompt) == stored
    assert again.metrics["zero_hit"] == first.metrics["zero_hit"]
    for other in (
        [{**rows[0], "prompt": "1+7"}, *rows[1:]],
        [{**rows[0], "answer": "7"}, *rows[1:]],
        rows[1:],
        rows[::-1],
        [*rows[:3], {"prompt": [{"role": "system", "content": "5"}, {"role": "user", "content": ""}], "answer": "5"}],
    ):
        with pytest.raises(RunError, match="other prompts"):
            recover(model, dated("2 May"), other, config, tmp_path / "out")


def test_a_prompt_that_a_longer_date_leaves_out_is_no_other_prompt(tmp_path):
    model, day = tiny_model(), "1 May"
    long = {"prompt": "1" * 30, "answer": "2"}
    most = len(
        dated(day).apply_chat_template([{"role": "user", "content": long["prompt"]}], return_dict=True)["input_ids"]
    )
    config = RecoverConfig(**FAST, max_prompt_tokens=most + len("[assistant]"))
    recover(model, dated(day), [*ROWS, long], config, tmp_path / "out")
    assert len(read_records(tmp_path / "out" / "prompts.parquet", Prompt)) == 4
    recover(model, dated("10 May"), [*ROWS, long], config, tmp_path / "out")
    assert len(read_records(tmp_path / "out" / "prompts.parquet", Prompt)) == 4


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\u0085"])
def test_rows_left_out_may_hold_any_text(tmp_path, mark):
    rows = [
        {"id": f"a{mark}b", "prompt": "q", "answer": None},
        *({"id": f"{i}{mark}", **r} for i, r in enumerate(ROWS)),
    ]
    config = RecoverConfig(**FAST, chat="never")
    for _ in range(2):
        found = recover(tiny_model(), tiny_tokenizer(), rows, config, tmp_path / "out")
        assert (found.metrics["rows_left_out"], found.metrics["prompts"]) == (1, 3)
    assert read_jsonl(tmp_path / "out" / "errors.jsonl")[0]["id"] == f"a{mark}b"
    write_jsonl(tmp_path / "p.jsonl", rows)
    config = EvalRunConfig(max_new_tokens=4)
    metrics = evaluate_run(tiny_model(), tiny_tokenizer(), tmp_path / "p.jsonl", config, tmp_path / "eval")
    assert (metrics["left_out"], metrics["prompts"]) == (1, 3)


def test_an_evaluation_follows_the_advice_of_its_error(tmp_path):
    rows = [{"task": r["prompt"], "answer": r["answer"]} for r in ROWS]
    write_jsonl(tmp_path / "p.jsonl", rows)
    own = {"max_new_tokens": 4, "chat": "never"}
    with pytest.raises(Exception, match="name one with prompt_column"):
        evaluate_run(tiny_model(), tiny_tokenizer(), tmp_path / "p.jsonl", EvalRunConfig(**own), tmp_path / "out")
    config = EvalRunConfig(**own, prompt_column="task")
    found = evaluate_run(tiny_model(), tiny_tokenizer(), tmp_path / "p.jsonl", config, tmp_path / "out")
    assert found["prompts"] == 3
    (tmp_path / "shards").mkdir()
    for i, row in enumerate(rows):
        write_jsonl(tmp_path / "shards" / f"{i}.jsonl", [row])
    assert evaluate_run(tiny_model(), tiny_tokenizer(), tmp_path / "shards", config, tmp_path / "two")["prompts"] == 3


def test_a_model_in_pefts_wrapper_is_recovered(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    lora = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")  # of no effect: B is zero
    config = RecoverConfig(**FAST, chat="never")
    plain = recover(tiny_model(), tiny_tokenizer(), ROWS, config, tmp_path / "plain")
    wrapped = recover(peft.get_peft_model(tiny_model(), lora).eval(), tiny_tokenizer(), ROWS, config, tmp_path / "lora")
    assert wrapped.metrics["zero_hit"] == plain.metrics["zero_hit"] > 0

    def texts(out):
        return [
            path.read_bytes() and [r.completion for r in records(path)] for path in sorted(out.rglob("part-*.parquet"))
        ]

    assert texts(tmp_path / "lora" / "samples") == texts(tmp_path / "plain" / "samples")


def test_vllm_starts_from_the_base_of_merged_adapters(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from latentrevise.engines import VLLMEngine
    from latentrevise.engines.vllm_setup import unavailable
    from latentrevise.model.loading import load_model

    if (why := unavailable()) is not None:
        pytest.skip(why)
    tiny_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    base, _ = load_model(tmp_path / "base", device="cpu")
    peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules="all-linear")).save_pretrained(tmp_path / "lora")
    engine = VLLMEngine(*load_model(tmp_path / "lora", device="cpu"))
    assert (engine.path, engine._changed) == (str(tmp_path / "base"), True)
    plain = VLLMEngine(*load_model(tmp_path / "base", device="cpu"))
    assert (plain.path, plain._changed) == (str(tmp_path / "base"), False)


def records(path):
    from latentrevise.data.records import Sample

    return read_records(path, Sample)


def test_an_end_that_only_the_generation_config_names():
    """Gemma3ForConditionalGeneration, what AutoModelForCausalLM makes of model_type gemma3."""
    import torch
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "pad_token_id": PAD,
        "sliding_window": 8,
        "query_pre_attn_scalar": 8,
    }
    vision = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 8,
        "patch_size": 4,
    }
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    if hasattr(config, "eos_token_id"):
        del config.eos_token_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Gemma3ForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = [EOS, 5]
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token is as probable
    params = SamplingParams(n=16, max_new_tokens=64)
    (drawn,) = HFEngine(model).generate([Request(ids=(7, 8))], params)
    assert all(EOS not in c.ids and 5 not in c.ids for c in drawn)
    assert {c.finish_reason for c in drawn} == {"stop", "length"}


# Training

GRPO = {
    "max_steps": 1,
    "num_generations": 2,
    "per_device_train_batch_size": 2,
    "max_completion_length": 4,
    "save_strategy": "no",
}


@pytest.fixture
def rlvr(tmp_path, monkeypatch):
    """``train rlvr`` as a command, with a template that prints another day each time."""
    pytest.importorskip("trl", reason="trl is not installed")
    from typer.testing import CliRunner

    from latentrevise.cli import app
    from latentrevise.cli import training as commands

    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    write_jsonl(tmp_path / "p.jsonl", ROWS)
    days, loaded = count(1), commands._loaded
    monkeypatch.setattr(commands, "_loaded", lambda *a: (loaded(*a)[0], dated(f"{next(days)} May")))

    def call(*more, model="model", **trainer):
        given = [*(f"trainer.{k}={v}" for k, v in (GRPO | trainer).items()), "repair.strategy=none", *more]
        places = ["--model", tmp_path / model, "--prompts", tmp_path / "p.jsonl", "--out", tmp_path / "out"]
        return CliRunner().invoke(app, ["train", "rlvr", *map(str, places), *(w for s in given for w in ("--set", s))])

    return call


def test_training_goes_on_after_midnight_and_after_its_model_moved(rlvr, tmp_path):
    assert rlvr("prompt_column=task").exit_code == 1
    absent = next(name for name in ("dvclive", "clearml", "wandb") if find_spec(name) is None)
    refused = rlvr(report_to=absent)
    assert isinstance(refused.exception, ConfigError), refused.exception
    assert "not installed" in str(refused.exception)
    assert rlvr("chat_template_kwargs={day: 1}").exit_code == 1
    result = rlvr()  # with the same --out: nothing was computed
    assert result.exit_code == 0, result.exception
    stored = read_records(tmp_path / "out" / "prompts.parquet", Prompt)
    (tmp_path / "model").rename(tmp_path / "moved")
    assert rlvr(model="moved").exit_code == 0
    assert read_records(tmp_path / "out" / "prompts.parquet", Prompt) == stored
    assert "other settings" in str(rlvr("seed=3", model="moved").exception)
    write_jsonl(tmp_path / "p.jsonl", ROWS[:2])
    assert "other prompts" in str(rlvr(model="moved").exception)


def test_settings_that_need_more_or_would_be_ignored(rlvr):
    refused = rlvr(chat_template_kwargs="{enable_thinking: false}")
    assert "trainer.chat_template_kwargs would be ignored" in str(refused.exception)
    from latentrevise.train.settings import refusals

    assert "the trainer refuses" in str(rlvr("lora.rank=2", "lora.targets=nothing").exception)
    # use_vllm=true without vLLM, and a failure that is no missing package's.
    with pytest.raises(ConfigError, match=r"not installed \(vLLM is not available"), refusals():
        raise ImportError("vLLM is not available and `use_vllm` is set to True. Please install vLLM.")
    with pytest.raises(RuntimeError, match="out of memory"), refusals():
        raise RuntimeError("out of memory")


def test_adapters_that_training_leaves_are_taken_everywhere(rlvr, tmp_path):
    from latentrevise.model.loading import load_model

    result = rlvr("lora.rank=2")
    assert result.exit_code == 0, result.exception
    assert json.loads((tmp_path / "out" / "model" / "adapter_config.json").read_text())["r"] == 2
    model, tokenizer = load_model(tmp_path / "out" / "model", device="cpu")
    config = RecoverConfig(**FAST, chat="never")
    assert recover(model, tokenizer, ROWS, config, tmp_path / "again").metrics["prompts"] == 3
