"""The Hugging Face engine: right logits, right distribution, right bookkeeping, whatever the batch."""

import logging
from dataclasses import replace

import pytest
import torch
from torch import nn

from latentrevise.engines import HFEngine, Request, SamplingParams
from latentrevise.errors import ConfigError, InputError, ModelError, RunError
from latentrevise.models import check_model, load_model
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


def test_embeddings_are_what_is_fed():
    model = tiny_model(seed=1)
    table = model.get_input_embeddings().weight.detach()
    mixture = torch.stack([0.5 * table[5] + 0.5 * table[9], 0.3 * table[7] + 0.7 * table[20]])
    ((c,),) = HFEngine(model).generate([Request(embeddings=mixture)], SamplingParams(max_new_tokens=1, seed=3))
    with torch.no_grad():
        logits = model(inputs_embeds=mixture[None]).logits[0, -1]
    assert c.logprobs[0] == pytest.approx(torch.log_softmax(logits, -1)[c.ids[0]].item(), abs=1e-5)


@pytest.mark.parametrize(
    ("params", "support"),
    [
        (SamplingParams(), None),
        (SamplingParams(temperature=0.5), None),
        (SamplingParams(temperature=2.0, top_k=5), "top_k"),
        (SamplingParams(top_p=0.4), "top_p"),
    ],
    ids=["plain", "cold", "top_k", "top_p"],
)
def test_samples_follow_the_distribution(params, support):
    model = never_ends(tiny_model(vocab=24, seed=4))
    ids = [5, 6, 7]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1].double()
    expected = torch.softmax(logits / params.temperature, -1)
    if support == "top_k":
        expected[expected < expected.topk(5).values[-1]] = 0
    if support == "top_p":
        order = expected.argsort(descending=True)
        inside = int((expected[order].cumsum(0) < 0.4).sum()) + 1
        expected[order[inside:]] = 0
    expected /= expected.sum()
    n = 6000
    (row,) = HFEngine(model, max_rows=n).generate([Request(ids)], replace(params, n=n, max_new_tokens=1))
    counts = torch.zeros(24, dtype=torch.double)
    for c in row:
        counts[c.ids[0]] += 1
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    statistic = ((counts - n * expected)[kept] ** 2 / (n * expected)[kept]).sum()
    # The seeds are fixed, so this either holds or not; 60 is the 1e-5 quantile at 23 degrees of freedom.
    assert statistic < 60
    assert kept.sum() > 1


def test_tokens_of_a_row_are_independent():
    """Pairs of successive samples of one row against the product of the model's conditionals."""
    model = never_ends(tiny_model(vocab=12, seed=4))
    n = 4000
    (row,) = HFEngine(model, max_rows=n).generate([Request([5, 6])], SamplingParams(n=n, max_new_tokens=2))
    with torch.no_grad():
        first = torch.softmax(model(input_ids=torch.tensor([[5, 6]])).logits[0, -1].double(), -1)
        second = torch.softmax(model(input_ids=torch.tensor([[5, 6, i] for i in range(12)])).logits[:, -1].double(), -1)
    joint = n * first[:, None] * second
    counts = torch.zeros(12, 12, dtype=torch.double)
    for c in row:
        counts[c.ids] += 1
    # 143 degrees of freedom: mean 143, standard deviation 17.
    assert ((counts - joint) ** 2 / joint).sum() < 143 + 5 * 17


def test_the_same_call_gives_the_same_result_and_another_seed_another():
    model = tiny_model(seed=1)
    engine = HFEngine(model, max_rows=7)
    requests = [Request(ids) for ids in prompts(6)]
    params = SamplingParams(n=4, max_new_tokens=16, seed=1)
    first = engine.generate(requests, params)
    assert engine.generate(requests, params) == first
    assert engine.generate(requests, replace(params, seed=2)) != first
    assert len({c.ids for row in first for c in row}) > 20


def test_a_row_does_not_depend_on_its_companions():
    """Alone, in a crowd, in another order, in smaller batches: the same tokens."""
    model = tiny_model(seed=1)
    requests = [Request(ids, seed=100 + i) for i, ids in enumerate(prompts(6))]
    params = SamplingParams(n=3, max_new_tokens=16)

    def tokens(rows):
        return [[c.ids for c in row] for row in rows]

    together = tokens(HFEngine(model).generate(requests, params))
    assert tokens(HFEngine(model, max_rows=2).generate(requests, params)) == together
    assert tokens(HFEngine(model, token_budget=1).generate(requests, params)) == together
    assert tokens(HFEngine(model).generate(requests[::-1], params))[::-1] == together
    assert [tokens(HFEngine(model).generate([r], params))[0] for r in requests] == together
    fewer = tokens(HFEngine(model).generate(requests, replace(params, n=2)))
    assert fewer == [row[:2] for row in together]


def test_parameters_of_each_request():
    model = never_ends(tiny_model(seed=1))
    requests = [Request(ids, seed=i) for i, ids in enumerate(prompts(3))]
    each = [
        SamplingParams(n=2, max_new_tokens=3),
        SamplingParams(n=1, max_new_tokens=7, logprobs=False),
        SamplingParams(n=3, max_new_tokens=3),
    ]
    found = HFEngine(model).generate(requests, each)
    assert [[len(c.ids) for c in row] for row in found] == [[3, 3], [7], [3, 3, 3]]
    assert found[1][0].logprobs is None
    assert [c.ids for c in found[0]] == [c.ids for c in HFEngine(model).generate(requests[:1], each[0])[0]]
    with pytest.raises(InputError, match="3 requests but 2 parameters"):
        HFEngine(model).generate(requests, each[:2])
    assert HFEngine(model).generate([], SamplingParams()) == []


def test_callers_random_state_and_modes_are_left_alone():
    model = tiny_model(seed=1)
    model.train()
    model.model.layers[0].eval()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    HFEngine(model).generate([Request([5, 6])], SamplingParams(n=2, max_new_tokens=4))
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert not model.model.layers[0].training
    assert model.model.layers[1].training


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


def test_stop_tokens_and_stop_strings():
    tokenizer = tiny_tokenizer(V)
    model = never_ends(tiny_model(seed=1))
    engine = HFEngine(model, tokenizer)
    (plain,) = engine.generate([Request([5, 6, 7], seed=1)], SamplingParams(max_new_tokens=40))[0]
    text = tokenizer.decode(plain.ids)
    assert len(plain.ids) == 40
    stop = text[30:32]
    at = next(k for k in range(40) if stop in tokenizer.decode(plain.ids[:k]))
    (cut,) = engine.generate([Request([5, 6, 7], seed=1)], SamplingParams(max_new_tokens=40, stop=("\0", stop)))[0]
    assert cut.ids == plain.ids[:at]
    assert cut.logprobs == pytest.approx(plain.logprobs[:at], abs=1e-5)
    assert cut.finish_reason == "stop"
    token = plain.ids[12]
    at = plain.ids.index(token)
    (cut,) = engine.generate([Request([5, 6, 7], seed=1)], SamplingParams(max_new_tokens=40, stop_token_ids=(token,)))[
        0
    ]
    assert cut.ids == plain.ids[:at]
    assert cut.finish_reason == "stop"
    with pytest.raises(ConfigError, match="needs a tokenizer"):
        HFEngine(model).generate([Request([5])], SamplingParams(max_new_tokens=4, stop=("x",)))


def test_ids_that_the_tokenizer_lacks_are_not_sampled():
    model = never_ends(tiny_model(vocab=400, seed=1))
    params = SamplingParams(n=8, max_new_tokens=20)
    free = HFEngine(model).generate([Request([5])], params)
    kept = HFEngine(model, tiny_tokenizer(97)).generate([Request([5])], params)
    assert max(i for c in free[0] for i in c.ids) >= 97
    assert max(i for c in kept[0] for i in c.ids) < 97
    ids = kept[0][0].ids
    torch.testing.assert_close(
        torch.tensor(kept[0][0].logprobs), plain_logprobs(model, [5], list(ids)), rtol=1e-4, atol=1e-4
    )


def test_bfloat16():
    model = tiny_model(seed=1).bfloat16()
    (row,) = HFEngine(model).generate([Request([5, 6, 7])], SamplingParams(n=4, max_new_tokens=8))
    for c in row:
        assert all(p <= 0 for p in c.logprobs)


def test_progress_adds_up():
    model = tiny_model(seed=1)
    seen = []
    found = HFEngine(model, max_rows=4).generate(
        [Request(ids) for ids in prompts(5)], SamplingParams(n=2, max_new_tokens=9), lambda *now: seen.append(now)
    )
    completions = [c for row in found for c in row]
    assert sum(s for s, _ in seen) == 10
    assert sum(t for _, t in seen) == sum(len(c.ids) + (c.finish_reason == "stop") for c in completions)


class _OutOfMemoryAbove:
    """Runs out of memory whenever more than ``rows`` sequences are decoded at once."""

    def __init__(self, model, rows):
        self.forward_of, self.rows, self.failures = model.forward, rows, 0

    def __call__(self, *args, **inputs):
        if "input_ids" in inputs and inputs["input_ids"].shape[0] > self.rows:
            self.failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.forward_of(*args, **inputs)


def test_out_of_memory_makes_smaller_batches_and_changes_nothing():
    model = tiny_model(seed=1)
    requests = [Request(ids, seed=i) for i, ids in enumerate(prompts(5))]
    params = SamplingParams(n=4, max_new_tokens=8)
    expected = HFEngine(model).generate(requests, params)
    engine = HFEngine(model)
    model.forward = narrow = _OutOfMemoryAbove(model, 6)
    seen = []
    found = engine.generate(requests, params, lambda *now: seen.append(now))
    assert narrow.failures == 2
    assert [[c.ids for c in row] for row in found] == [[c.ids for c in row] for row in expected]
    assert sum(s for s, _ in seen) == 20
    narrow.rows = 0
    with pytest.raises(RunError, match=r"one sequence of 1\d \+ 8 tokens; lower"):
        engine.generate(requests, params)


def test_other_runtime_errors_are_not_swallowed(monkeypatch):
    model = tiny_model(seed=1)

    def broken(*args, **inputs):
        raise RuntimeError("shape mismatch")

    engine = HFEngine(model)
    monkeypatch.setattr(model, "forward", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        engine.generate([Request([5])], SamplingParams(max_new_tokens=4))


BAD_REQUESTS = [
    (Request([]), "request 1: it is empty"),
    (Request([5, 97]), "request 1: token 97, but the model's table has rows 0 to 96"),
    (Request([5, -1]), "request 1: token -1"),
    (Request([5] * 250), r"request 1: 250 tokens and up to 8 new ones, but the model has 256 positions"),
    (Request(embeddings=torch.zeros(3, 31)), r"request 1: embeddings of shape \(3, 31\).*\[L, 32\]"),
    (Request(embeddings=torch.zeros(32)), r"request 1: embeddings of shape \(32,\)"),
    (Request(embeddings=torch.zeros(0, 32)), "request 1: it is empty"),
    (Request(embeddings=torch.zeros(3, 32, dtype=torch.long)), "request 1: embeddings of type torch.int64"),
    (Request(embeddings=torch.full((3, 32), torch.nan)), "request 1: the embeddings hold NaN"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_REQUESTS)
def test_bad_requests_are_named_before_anything_runs(monkeypatch, bad, message):
    model = tiny_model(seed=1)
    engine = HFEngine(model)
    monkeypatch.setattr(model, "forward", lambda **_: pytest.fail("it ran"))
    with pytest.raises(InputError, match=message):
        engine.generate([Request([5]), bad], SamplingParams(max_new_tokens=8))


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
