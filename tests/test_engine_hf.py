"""The Hugging Face engine on several architectures, its batches and its memory; and the loading of models.

What it shares with other engines is in test_engines.py.
"""

import logging
from dataclasses import replace

import pytest
import torch
from torch import nn

from latentrevise.engines import HFEngine, Request, SamplingParams
from latentrevise.errors import ConfigError, InputError, ModelError, RunError
from latentrevise.model.loading import check_model, load_model
from tests.tiny import EOS, tiny_model, tiny_tokenizer

ARCHITECTURES = ["qwen3", "qwen2", "llama", "gemma3"]
V = 97


def prompts(count=5, seed=0, low=3, high=20):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(low, high, (count,), generator=g).tolist()
    return [torch.randint(4, V, (n,), generator=g).tolist() for n in lengths]


def never_ends(model):
    """The model without an end-of-sequence token, so that lengths are known."""
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    return model


def plain_logprobs(model, ids, completion):
    """Log-probs of ``completion`` behind ``ids`` from one unbatched pass without a cache."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*ids, *completion]]), use_cache=False).logits[0].float()
    return torch.log_softmax(logits, -1)[len(ids) - 1 : -1].gather(1, torch.tensor(completion)[:, None])[:, 0]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_logprobs_are_those_of_plain_passes_at_any_temperature(arch):
    """Ragged batch, sequences that end at different times, filtered sampling: the log-probs are of the raw model."""
    model = tiny_model(arch, V, seed=1)
    requests = [Request(ids) for ids in prompts()]
    params = SamplingParams(n=3, temperature=0.7, top_p=0.9, max_new_tokens=24, stop_token_ids=tuple(range(60, 66)))
    found = HFEngine(model).generate(requests, params)
    lengths = set()
    for request, completions in zip(requests, found, strict=True):
        assert len(completions) == 3
        for c in completions:
            lengths.add(len(c.ids))
            assert len(c.ids) == len(c.logprobs)
            assert not set(c.ids) & {EOS, *range(60, 66)}
            assert c.finish_reason == ("length" if len(c.ids) == 24 else "stop")
            if c.ids:
                expected = plain_logprobs(model, request.ids, list(c.ids))
                torch.testing.assert_close(torch.tensor(c.logprobs), expected, rtol=1e-4, atol=1e-4)
    assert len(lengths) > 3


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_greedy_is_the_models_own_greedy(arch):
    model = tiny_model(arch, V, seed=2)
    requests = [Request(ids) for ids in prompts(4, seed=3)]
    found = HFEngine(model).generate(requests, SamplingParams(temperature=0, max_new_tokens=20))
    for request, (completion,) in zip(requests, found, strict=True):
        with torch.no_grad():
            out = model.generate(torch.tensor([request.ids]), do_sample=False, max_new_tokens=20, pad_token_id=0)[0]
        own = out[len(request.ids) :].tolist()
        assert list(completion.ids) == [i for i in own if i != EOS]
        assert completion.finish_reason == ("stop" if EOS in own else "length")


def test_embeddings_of_tokens_are_the_tokens():
    """Also in one batch with token requests, of another length, of another dtype, and with a gradient attached."""
    model = tiny_model("gemma3", V, seed=1)
    module = model.get_input_embeddings()
    ids = prompts(4, seed=5)
    params = SamplingParams(n=2, max_new_tokens=12, seed=9)
    by_ids = HFEngine(model).generate([Request(i) for i in ids], params)
    mixed = [Request(i) if k % 2 else Request(embeddings=module(torch.tensor(i))) for k, i in enumerate(ids)]
    mixed[0] = replace(mixed[0], embeddings=mixed[0].embeddings.double())
    by_embeddings = HFEngine(model).generate(mixed, params)
    assert [[c.ids for c in row] for row in by_ids] == [[c.ids for c in row] for row in by_embeddings]
    assert len({c.ids for row in by_ids for c in row}) > 4


def test_the_size_of_batches_changes_no_token():
    model = tiny_model(seed=1)
    requests = [Request(ids, seed=100 + i) for i, ids in enumerate(prompts(6))]
    params = SamplingParams(n=3, max_new_tokens=16)

    def tokens(engine):
        return [[c.ids for c in row] for row in engine.generate(requests, params)]

    together = tokens(HFEngine(model))
    assert tokens(HFEngine(model, max_rows=2)) == together
    assert tokens(HFEngine(model, token_budget=1)) == together


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_requests_of_different_limits_are_one_batch(temperature):
    """Each ends at its own limit, with the tokens it has alone; no position lies beyond the model's last one."""
    model = never_ends(tiny_model(seed=1, max_position_embeddings=48))
    rows = prompts(6)
    rows[2] = [5] * 44
    requests, limits = [Request(ids, seed=i) for i, ids in enumerate(rows)], [9, 24, 4, 9, 10, 9]
    params = [SamplingParams(n=1 + i % 2, temperature=temperature, max_new_tokens=m) for i, m in enumerate(limits)]
    engine = HFEngine(model)
    alone = [engine.generate([r], p)[0] for r, p in zip(requests, params, strict=True)]
    widths, highest, plain, seen = [], [], model.forward, []

    def watched(*args, **inputs):
        widths.append(len(inputs["position_ids"]))
        highest.append(int(inputs["position_ids"].max()))
        return plain(*args, **inputs)

    model.forward = watched
    found = engine.generate(requests, params, lambda *now: seen.append(now))
    assert [[c.ids for c in own] for own in found] == [[c.ids for c in own] for own in alone]
    assert [{len(c.ids) for c in own} for own in found] == [{m} for m in limits]
    assert {c.finish_reason for own in found for c in own} == {"length"}
    assert len(widths) == max(limits)  # a pass for all prompts, then one a step
    assert (widths[0], widths[8], widths[-1]) == (6, 6, 1)  # a line a prompt
    assert max(highest) == 47
    assert [sum(part) for part in zip(*seen, strict=True)] == [9, sum(p.n * p.max_new_tokens for p in params)]


def test_dropout_is_off_while_sampling():
    """And the mode comes back when the call fails."""
    model = tiny_model(seed=1, attention_dropout=0.9).train()
    params = SamplingParams(temperature=0, max_new_tokens=8)
    engine = HFEngine(model)
    assert engine.generate([Request([5, 6, 7])], params) == engine.generate([Request([5, 6, 7])], params)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(ModelError):
        engine.generate([Request([5])], params)
    assert model.training


def test_bfloat16():
    model = tiny_model(seed=1).bfloat16()
    (row,) = HFEngine(model).generate([Request([5, 6, 7])], SamplingParams(n=4, max_new_tokens=8))
    for c in row:
        assert all(p <= 0 for p in c.logprobs)


class _OutOfMemoryAbove:
    """Runs out of memory whenever more than ``rows`` tokens, padding among them, are decoded at once."""

    def __init__(self, model, rows):
        self.forward_of, self.rows, self.failures = model.forward, rows, 0

    def __call__(self, *args, **inputs):
        if "input_ids" in inputs and inputs["input_ids"].numel() > self.rows:
            self.failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.forward_of(*args, **inputs)


def test_out_of_memory_makes_smaller_batches_and_changes_nothing():
    model = tiny_model(seed=1)
    requests = [Request(ids, seed=i) for i, ids in enumerate(prompts(5))]
    params = SamplingParams(n=4, max_new_tokens=8)
    expected = HFEngine(model).generate(requests, params)
    engine = HFEngine(model)
    model.forward = narrow = _OutOfMemoryAbove(model, 8)
    seen = []
    found = engine.generate(requests, params, lambda *now: seen.append(now))
    assert narrow.failures == 2
    assert [[c.ids for c in row] for row in found] == [[c.ids for c in row] for row in expected]
    assert sum(s for s, _ in seen) == 20
    narrow.rows = 0
    with pytest.raises(RunError, match=r"one sequence of 1\d \+ 8 tokens; lower"):
        engine.generate(requests, params)


def test_no_process_makes_smaller_batches_of_a_sharded_model_alone(monkeypatch):
    model = tiny_model(seed=1)
    monkeypatch.setattr("latentrevise.engines.hf.sharded", lambda model: True)
    engine = HFEngine(model)
    model.forward = _OutOfMemoryAbove(model, 0)
    monkeypatch.setattr(torch.distributed, "broadcast", lambda *_: None)
    with pytest.raises(RunError, match="4 sequences of a sharded model; make the engine with a lower max_rows"):
        engine.generate([Request([5, 6])], SamplingParams(n=4, max_new_tokens=4))


def test_other_runtime_errors_are_not_swallowed(monkeypatch):
    model = tiny_model(seed=1)

    def broken(*args, **inputs):
        raise RuntimeError("shape mismatch")

    engine = HFEngine(model)
    monkeypatch.setattr(model, "forward", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        engine.generate([Request([5])], SamplingParams(max_new_tokens=4))


def test_bad_parameters():
    for change in ({"n": 0}, {"temperature": -1}, {"top_p": 0}, {"top_k": 0}, {"max_new_tokens": 0}, {"stop": ("",)}):
        with pytest.raises(ConfigError, match=next(iter(change))):
            SamplingParams(**change)
    with pytest.raises(InputError, match="exactly one"):
        Request()
    with pytest.raises(InputError, match="exactly one"):
        Request([1], torch.zeros(1, 32))
    with pytest.raises(ConfigError, match="max_rows = 0"):
        HFEngine(tiny_model(), max_rows=0)


def test_logits_that_are_not_numbers_name_the_request():
    model = tiny_model(seed=1)
    with torch.no_grad():
        model.get_input_embeddings().weight[9] = torch.nan
        model.lm_head.weight = nn.Parameter(torch.randn(V, 32))
    with pytest.raises(ModelError, match="request 1, token 0: the model's logits are not finite"):
        HFEngine(model).generate([Request([5, 6]), Request([5, 9])], SamplingParams(max_new_tokens=4))


# Loading
# ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    tiny_model("qwen3", seed=1).save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def test_a_saved_model_is_loaded_in_eval_mode(saved):
    model, tokenizer = load_model(saved, dtype="bfloat16", device="cpu")
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert tokenizer.decode(tokenizer("1 + 1").input_ids) == "1 + 1"
    exact, _ = load_model(str(saved), device="cpu")
    expected = tiny_model("qwen3", seed=1).state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in exact.state_dict().items())


def test_places_without_a_model_are_named(saved, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="no such directory"):
        load_model(tmp_path / "absent")
    with pytest.raises(ModelError, match="no such directory"):
        load_model("./absent")
    with pytest.raises(ModelError, match=r"no config\.json in it"):
        load_model(tmp_path)
    with pytest.raises(ModelError, match="it is a file"):
        load_model(saved / "config.json")
    with pytest.raises(ModelError, match="floating type"):
        load_model(saved, dtype="int8")


def test_a_model_without_tokenizer_or_weights(saved):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (saved / name).unlink()
    with pytest.raises(ModelError, match="no tokenizer"):
        load_model(saved)
    (saved / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no causal language model can be loaded"):
        load_model(saved)


def test_pickled_weights_are_not_read(saved):
    (saved / "model.safetensors").unlink()
    torch.save(tiny_model("qwen3", seed=1).state_dict(), saved / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        load_model(saved)


def test_remote_code_is_not_run(saved):
    import json

    config = json.loads((saved / "config.json").read_text())
    config |= {"model_type": "odd", "auto_map": {"AutoConfig": "odd.C", "AutoModelForCausalLM": "odd.M"}}
    (saved / "config.json").write_text(json.dumps(config))
    (saved / "odd.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ModelError, match="no causal language model"):
        load_model(saved)


def test_tokenizer_and_table_must_match(saved, caplog):
    caplog.set_level(logging.CRITICAL)
    tiny_model("qwen3", vocab=50, seed=1).save_pretrained(saved)
    with pytest.raises(ModelError, match="tokenizer has 97 tokens but the model's embedding table only 50 rows"):
        load_model(saved)


def test_a_model_without_plain_embedding_is_refused():
    model = tiny_model()
    model.set_input_embeddings(nn.Linear(3, 32))
    with pytest.raises(ModelError, match="no plain input embedding"):
        check_model(model)
