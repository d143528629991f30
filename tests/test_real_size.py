"""Everything once at the sizes of real models: a table of 151936 x 896, a byte-level vocabulary, both dtypes."""

import gc
import itertools
import re

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from latentrevise.cli import app
from latentrevise.data.records import Start, read_records
from latentrevise.data.storage import write_jsonl
from latentrevise.model.loading import spread
from latentrevise.recovery.rundir import RunDirectory, fingerprint
from latentrevise.strategies import names
from tests.test_cli import write_trajectory
from tests.tiny import tiny_model

ROWS, WIDTH, PADDING = (
    151_936,
    896,
    290,
)  # of Qwen2.5-0.5B: 136 million elements, more than float32 or int8 offsets count
PROBLEMS = [
    {"prompt": f"What is 1{i} + 3?", "answer": f"{13 + i}", "solution": f"1{i} + 3 is \\boxed{{{13 + i}}}."}
    for i in (0, 1)
]
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@pytest.mark.parametrize(
    "length", [1, 2, 63, 64, 65, 2**24, 2**24 + 1, 49152 * 576, 151_936 * 896, 2**31 + 5, 2**53 + 3]
)
def test_places_are_spread_over_any_number(length):
    places = spread(length, 64)
    assert places == sorted(set(places))
    assert (places[0], places[-1], len(places)) == (0, length - 1, min(64, length))
    assert len(spread(length, 12, repeat=True)) == 12
    assert max(spread(length, 12, repeat=True)) == length - 1


def test_the_fingerprint_of_a_large_table_sees_its_last_element():
    model = nn.Embedding(2**24 + 8, 1, dtype=torch.bfloat16)
    before = fingerprint(model)
    with torch.no_grad():
        model.weight[-1] += 1
    assert fingerprint(model) != before


def byte_level_tokenizer(size):
    """A byte-level BPE with ``size`` tokens, the special ones at the end, as Qwen's: all pairs of bytes, then some
    triples. Its merges never cross a word."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in letters for b in letters]
    triples = ((a + b, c) for (a, b), c in itertools.product(pairs, letters))
    merges = [*pairs, *itertools.islice(triples, size - len(SPECIAL) - len(letters) - len(pairs))]
    vocabulary = {token: i for i, token in enumerate([*letters, *(a + b for a, b in merges)])}
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=SPECIAL[2], pad_token=SPECIAL[0])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    return tokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model and prompts; its weights are removed afterwards."""
    path = tmp_path_factory.mktemp("real")
    tokenizer = byte_level_tokenizer(ROWS - PADDING)
    model = tiny_model(
        "qwen2", ROWS, hidden_size=WIDTH, intermediate_size=128, num_hidden_layers=1, num_attention_heads=14,
        max_position_embeddings=512, initializer_range=0.02, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model.to(torch.bfloat16).save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")
    del model
    gc.collect()
    write_jsonl(path / "p.jsonl", PROBLEMS)
    yield path
    (path / "model" / "model.safetensors").unlink()


def call(*words, **settings):
    own = [word for key, value in settings.items() for word in ("--set", f"{key.replace('__', '.')}={value}")]
    result = CliRunner().invoke(app, [*map(str, words), *own], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


FEW = {
    "rollouts": 2, "samples": 1, "max_new_tokens": 6, "token_budget": 4096, "audit": "false", "equal_compute": "false",
    "gcg.steps": 1, "gcg.candidates": 4, "pair.exhaustive": 4, "pair.rows": 8,
    "self_hint.hints": 1, "intervene.corrections": 1, "evocot.rationales": 1,
    "step_checker": "latentrevise.checkers.arithmetic:check_step",
    **{f"{name}.steps": 2 for name in ("latent", "latent_plausible", "latent_softmax")},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_step_at_real_size(place, dtype):
    pytest.importorskip("trl", reason="trl is not installed")
    base, run, quick = place / "model", place / dtype, dtype == "float32"
    distinct = [name for name in names() if not re.search(r"-no-|-(k|rho)\d", name)]  # others differ by a number
    given = ("--model", base, "--prompts", place / "p.jsonl", "--out", run, "--quiet", "--dtype", dtype)
    few = FEW | {"strategies": f"[{','.join(distinct if quick else ['latent-plausible', 'pivot', 'resample'])}]"}
    assert "2 of 2 prompts" in call("mine", *given, **few)
    for step in ("revise", "continue", "verify"):
        call(step, "--out", run, "--quiet")
    starts = [s for arm in sorted((run / "starts").iterdir()) for s in read_records(arm, Start)]
    assert {s.start_id.split("/")[0] for s in starts} == set(few["strategies"].strip("[]").split(","))
    assert all(0 <= i < ROWS - PADDING for s in starts for i in s.plain_ids)
    assert RunDirectory(run).read_header()["model"]["dtype"] == dtype
    assert "implicit value: 0 solved prompts" in call("audit", *given, "--gate-only", **few)

    write_trajectory(run)  # a random model recovers nothing
    assert "1 rows" in call("export", "--run", run, "--to", "trl-sft", "--out", run / "rows.jsonl")
    data = ("--data", place / "p.jsonl", "--out", run / "eval")
    told = call("eval", "--model", base, *data, "--quiet", "--dtype", dtype, max_new_tokens=4)
    assert "2 prompts, 0 left out" in told
    one = {"trainer.max_steps": 1, "trainer.optim": "sgd", "trainer.save_strategy": "no", "trainer.bf16": "false"}
    call("train", "sft", "--run", run, "--out", run / "sft", "--dtype", dtype, **one, mix=0.0, lora__rank=2)
    assert (run / "sft" / "model" / "adapter_model.safetensors").is_file()
    call(
        *("train", "rlvr", "--model", base, "--prompts", place / "p.jsonl", "--out", run / "rlvr", "--dtype", dtype),
        **one, trainer__num_generations=2, trainer__per_device_train_batch_size=2, trainer__max_completion_length=4,
        lora__rank=2, repair__strategy="latent-plausible", repair__latent_plausible__steps=1,
    )  # fmt: skip
    assert (run / "rlvr" / "model" / "adapter_model.safetensors").is_file()
