"""What every engine owes its callers, on each of them: right logits, right distribution, right bookkeeping.

What only one of them has is in test_engine_hf.py and test_engine_vllm.py.
"""

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from latentrevise.engines import HFEngine, Request, SamplingParams, VLLMConfig, VLLMEngine, engine_factory
from latentrevise.engines.vllm_setup import unavailable
from latentrevise.errors import ConfigError, InputError
from latentrevise.model.loading import load_model
from tests.tiny import EOS, tiny_model, tiny_tokenizer

V, ROWS = 97, 130  # the tokenizer's tokens, the table's rows

needs_vllm = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A random model with padding rows, in float32. Heads of 32: vLLM's CPU attention has no smaller ones."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model("qwen3", ROWS, seed=1, head_dim=32).save_pretrained(folder)
    tiny_tokenizer(V).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["hf", pytest.param("vllm", marks=needs_vllm)])
def engine(request, saved):
    model, tokenizer = load_model(saved, dtype="float32", device="cpu")
    made = engine_factory(request.param)(model, tokenizer, VLLMConfig(kv_cache_gib=1 / 16, max_sequences=48))
    yield made
    if isinstance(made, VLLMEngine):
        made.close()


def prompts(count=5, seed=0, low=3, high=20):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(low, high, (count,), generator=g).tolist()
    return [torch.randint(4, V, (n,), generator=g).tolist() for n in lengths]


def plain_logprobs(model, embeddings, completion):
    """Log-probs of ``completion`` behind ``embeddings`` from one unbatched pass without a cache."""
    own = model.get_input_embeddings()(torch.tensor(completion, dtype=torch.long))
    with torch.no_grad():
        logits = model(inputs_embeds=torch.cat([embeddings, own])[None], use_cache=False).logits[0]
    at = torch.log_softmax(logits.float(), -1)[len(embeddings) - 1 : -1]
    return at.gather(1, torch.tensor(completion, dtype=torch.long)[:, None])[:, 0]


def embedded(model, ids):
    return model.get_input_embeddings()(torch.tensor(ids)).detach()


def mixtures(model, ids, count):
    """Different prompts over the same ids: rows mixed half and half with others."""
    g = torch.Generator().manual_seed(8)
    table, plain = model.get_input_embeddings().weight.detach(), embedded(model, ids)
    return [0.5 * plain + 0.5 * table[torch.randint(4, V, (len(ids),), generator=g)] for _ in range(count)]


def tokens(found):
    return [[c.ids for c in row] for row in found]


def test_logprobs_are_those_of_plain_passes_at_any_temperature(engine):
    """Ragged batch of ids and embeddings, sequences that end at different times, filtered sampling: the log-probs are
    of the raw model."""
    model, ids = engine.model, prompts()
    given = [embedded(model, i) for i in ids] + mixtures(model, prompts(1, low=40, high=70)[0], 3)
    requests = [Request(i) for i in ids] + [Request(embeddings=e) for e in given[len(ids) :]]
    params = SamplingParams(n=3, temperature=0.7, top_p=0.9, max_new_tokens=24, stop_token_ids=tuple(range(60, 66)))
    lengths = set()
    for prompt, completions in zip(given, engine.generate(requests, params), strict=True):
        assert len(completions) == 3
        for c in completions:
            lengths.add(len(c.ids))
            assert len(c.ids) == len(c.logprobs)
            assert not set(c.ids) & {EOS, *range(60, 66)}
            assert c.finish_reason == ("length" if len(c.ids) == 24 else "stop")
            assert (c.end is None) == (c.finish_reason == "length")
            token, value = c.end or (EOS, None)
            assert token in {EOS, *range(60, 66)}
            expected = plain_logprobs(model, prompt, [*c.ids, token])
            found = torch.tensor([*c.logprobs, expected[-1].item() if value is None else value])
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert len(lengths) > 3


def test_greedy_is_the_models_own_greedy(engine):
    """From ids, from their embeddings, and from mixtures, all in one batch; equal tokens, not only close log-probs."""
    model, ids = engine.model, prompts(4, seed=3, high=90)
    given = [embedded(model, i) for i in ids] + mixtures(model, ids[0], 2)
    requests = [Request(i) for i in ids] + [Request(embeddings=e) for e in given]
    found = engine.generate(requests, SamplingParams(temperature=0, max_new_tokens=20))
    assert tokens(found[:4]) == tokens(found[4:8])
    for prompt, (completion,) in zip(given, found[4:], strict=True):
        inputs = {"inputs_embeds": prompt[None], "attention_mask": torch.ones(1, len(prompt), dtype=torch.long)}
        with torch.no_grad():
            own = model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=20,
                pad_token_id=0,
                bad_words_ids=[[i] for i in range(V, ROWS)],
            )[0].tolist()
        assert list(completion.ids) == [i for i in own if i != EOS]
        assert completion.finish_reason == ("stop" if EOS in own else "length")


def test_greedy_samples_of_one_request_are_equal(engine):
    (row,) = engine.generate([Request([5, 6])], SamplingParams(n=3, temperature=0, max_new_tokens=6))
    assert len(row) == 3
    assert len({c.ids for c in row}) == 1
    for other in row[1:]:  # rows may be summed in another order
        torch.testing.assert_close(torch.tensor(other.logprobs), torch.tensor(row[0].logprobs), rtol=0, atol=1e-5)


def test_embeddings_of_tokens_are_the_tokens(engine):
    """Also in one batch with token requests, of another dtype, not contiguous, and with a gradient attached."""
    ids = prompts(4, seed=5)
    params = SamplingParams(n=2, max_new_tokens=12, seed=9)
    module = engine.model.get_input_embeddings()
    mixed = [Request(i) if k % 2 else Request(embeddings=module(torch.tensor(i))) for k, i in enumerate(ids)]
    assert mixed[0].embeddings.requires_grad
    mixed[0] = replace(mixed[0], embeddings=mixed[0].embeddings.double())
    mixed[2] = replace(mixed[2], embeddings=mixed[2].embeddings.T.contiguous().T)
    by_ids = engine.generate([Request(i) for i in ids], params)
    assert tokens(engine.generate(mixed, params)) == tokens(by_ids)
    assert len({c.ids for row in by_ids for c in row}) > 4


def test_prompts_over_the_same_ids_are_told_apart(engine):
    """Two revised prefixes of a prompt, long enough to be cached, one after the other and together."""
    model, params = engine.model, SamplingParams(temperature=0, max_new_tokens=1)
    ids = prompts(1, seed=6, low=90, high=91)[0]
    a, b = mixtures(model, ids, 2)
    b = torch.cat([a[:40], b[40:]])
    (one,), (two,) = engine.generate([Request(embeddings=a), Request(embeddings=b)], params)
    assert abs(one.logprobs[0] - two.logprobs[0]) > 1e-3
    for prompt, found in ((a, one), (b, two), (embedded(model, ids), engine.generate([Request(ids)], params)[0][0])):
        again = engine.generate([Request(embeddings=prompt)], params)[0][0]
        expected = plain_logprobs(model, prompt, found.ids).tolist()
        assert again.ids == found.ids
        assert [*found.logprobs, *again.logprobs] == pytest.approx([*expected, *expected], abs=1e-4)


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
def test_samples_follow_the_distribution(engine, params, support):
    ids = [5, 6, 7]
    with torch.no_grad():
        logits = engine.model(input_ids=torch.tensor([ids])).logits[0, -1].double()
    logits[V:] = -torch.inf
    expected = torch.softmax(logits / params.temperature, -1)
    if support == "top_k":
        expected[expected < expected.topk(5).values[-1]] = 0
    if support == "top_p":
        order = expected.argsort(descending=True)
        inside = int((expected[order].cumsum(0) < 0.4).sum()) + 1
        expected[order[inside:]] = 0
    expected /= expected.sum()
    n = 3000
    (row,) = engine.generate([Request(ids)], replace(params, n=n, max_new_tokens=1))
    counts = torch.zeros(ROWS, dtype=torch.double)
    for c in row:
        counts[c.ids[0] if c.ids else EOS] += 1
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    assert kept.sum() > 1
    # Rare tokens together in one cell, so that every cell expects some samples.
    rare = kept & (n * expected < 5)
    cells = [(counts[i], expected[i]) for i in (kept & ~rare).nonzero()[:, 0]]
    cells += [(counts[rare].sum(), expected[rare].sum())] if rare.any() else []
    statistic = sum((c - n * e) ** 2 / (n * e) for c, e in cells)
    # The seeds are fixed, so this either holds or not: mean df, standard deviation sqrt(2 df).
    df = len(cells) - 1
    assert statistic < df + 5 * (2 * df) ** 0.5


def test_tokens_of_a_row_are_independent(engine):
    """Pairs of successive samples of one row against the product of the model's conditionals, by the first one's
    being among the likelier half."""
    n = 2000
    (row,) = engine.generate([Request([5, 6])], SamplingParams(n=n, temperature=1.5, max_new_tokens=2))
    with torch.no_grad():
        first = engine.model(input_ids=torch.tensor([[5, 6]])).logits[0, -1].double()[:V]
        second = engine.model(input_ids=torch.tensor([[5, 6, i] for i in range(V)])).logits[:, -1].double()[:, :V]
    first, second = (torch.softmax(x / 1.5, -1) for x in (first, second))
    first[EOS] = 0
    low = torch.arange(V) < V // 2
    expected = n * torch.stack([(first[a][:, None] * second[a][:, b]).sum() for a in (low, ~low) for b in (low, ~low)])
    counts = torch.zeros(4, dtype=torch.double)
    for c in row:
        if c.ids:
            counts[2 * (c.ids[0] >= V // 2) + ((c.ids[1] if len(c.ids) > 1 else EOS) >= V // 2)] += 1
    assert ((counts - expected) ** 2 / expected).sum() < 25  # 3 degrees of freedom: quantile 1e-5


def test_the_same_call_gives_the_same_result_and_another_seed_another(engine):
    requests = [Request(ids) for ids in prompts(6)]
    params = SamplingParams(n=4, max_new_tokens=16, seed=1)
    first = engine.generate(requests, params)
    assert tokens(engine.generate(requests, params)) == tokens(first)
    assert tokens(engine.generate(requests, replace(params, seed=2))) != tokens(first)
    assert len({c.ids for row in first for c in row}) > 20


def test_a_row_does_not_depend_on_its_companions(engine):
    """Alone, in a crowd, in another order: the same tokens; and the first of many samples are those of fewer."""
    requests = [Request(ids, seed=100 + i) for i, ids in enumerate(prompts(6, high=60))]
    params = SamplingParams(n=3, max_new_tokens=16)
    together = tokens(engine.generate(requests, params))
    assert tokens(engine.generate(requests[::-1], params))[::-1] == together
    assert [tokens(engine.generate([r], params))[0] for r in requests] == together
    crowd = [Request(ids) for ids in prompts(40, seed=7)]
    assert tokens(engine.generate([*crowd, *requests], params))[40:] == together
    assert tokens(engine.generate(requests, replace(params, n=2))) == [row[:2] for row in together]


def test_parameters_of_each_request(engine):
    requests = [Request(ids, seed=i) for i, ids in enumerate(prompts(3))]
    each = [
        SamplingParams(n=2, max_new_tokens=3),
        SamplingParams(n=1, max_new_tokens=7, logprobs=False),
        SamplingParams(n=3, max_new_tokens=1, temperature=0),
    ]
    found = engine.generate(requests, each)
    assert [len(row) for row in found] == [2, 1, 3]
    assert max(len(c.ids) for c in found[0]) == 3
    assert 3 < len(found[1][0].ids) <= 7
    assert found[1][0].logprobs is None
    assert tokens(engine.generate(requests[:1], each[0])) == tokens(found[:1])
    with pytest.raises(InputError, match="3 requests but 2 parameters"):
        engine.generate(requests, each[:2])
    assert engine.generate([], SamplingParams()) == []


def test_callers_random_state_and_modes_are_left_alone(engine):
    engine.model.train()
    engine.model.model.layers[0].eval()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    engine.generate([Request([5, 6])], SamplingParams(n=2, max_new_tokens=4))
    assert torch.equal(torch.get_rng_state(), before)
    assert engine.model.training
    assert not engine.model.model.layers[0].training
    assert engine.model.model.layers[1].training
    engine.model.eval()


def test_stop_tokens_and_stop_strings(engine):
    request, params = Request([5, 6, 7], seed=4), SamplingParams(max_new_tokens=40)
    (plain,) = engine.generate([request], params)[0]
    text = engine.tokenizer.decode(plain.ids)
    assert len(plain.ids) > 20, "choose a seed whose sample is longer"
    stop = text[14:16]
    at = next(k for k in range(40) if stop in engine.tokenizer.decode(plain.ids[:k]))
    (cut,) = engine.generate([request], replace(params, stop=("\0", stop)))[0]
    assert cut.ids == plain.ids[:at]
    assert cut.logprobs == pytest.approx(plain.logprobs[:at], abs=1e-5)
    assert (cut.finish_reason, cut.end) == ("stop", None)
    token = plain.ids[12]
    (cut,) = engine.generate([request], replace(params, stop_token_ids=(token,)))[0]
    assert cut.ids == plain.ids[: plain.ids.index(token)]
    assert len(cut.logprobs) == len(cut.ids)
    assert (cut.finish_reason, cut.end[0]) == ("stop", token)


def test_ids_that_the_tokenizer_lacks_are_not_sampled(engine):
    """Though the model gives them a quarter of the mass; log-probs remain those of the whole distribution."""
    (row,) = engine.generate([Request([5])], SamplingParams(n=16, max_new_tokens=20))
    assert max(i for c in row for i in c.ids) < V
    expected = plain_logprobs(engine.model, embedded(engine.model, [5]), list(row[0].ids))
    torch.testing.assert_close(torch.tensor(row[0].logprobs), expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        logits = engine.model(input_ids=torch.tensor([[5]])).logits[0, -1]
    assert torch.softmax(logits, -1)[V:].sum() > 0.01


def test_progress_adds_up(engine):
    seen = []
    requests = [Request(ids) for ids in prompts(5)]
    found = engine.generate(requests, SamplingParams(n=2, max_new_tokens=9), lambda *now: seen.append(now))
    completions = [c for row in found for c in row]
    assert sum(s for s, _ in seen) == 10
    assert sum(t for _, t in seen) == sum(len(c.ids) + (c.finish_reason == "stop") for c in completions)


def test_embeddings_are_let_go(engine):
    given = embedded(engine.model, [5, 6, 7] * 20)
    requests = [Request(embeddings=given)]
    gone = weakref.ref(given)
    engine.generate(requests, SamplingParams(max_new_tokens=2))
    del given, requests
    gc.collect()
    assert gone() is None


def test_new_weights_are_sampled_from(engine, saved):
    """Weights changed in place, as a training step does, then put back; warm prompts, so that a stale cache shows."""
    requests = [Request(ids, seed=1) for ids in prompts(3, low=70, high=90)]
    params = SamplingParams(n=2, max_new_tokens=12)
    before = engine.generate(requests, params)
    with torch.no_grad():
        for k, parameter in enumerate(engine.model.parameters()):
            parameter.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(k)))
    engine.update(engine.model)
    after = engine.generate(requests, params)
    assert tokens(after) != tokens(before)
    for request, row in zip(requests, after, strict=True):
        for c in row:
            expected = plain_logprobs(engine.model, embedded(engine.model, request.ids), list(c.ids))
            torch.testing.assert_close(torch.tensor(c.logprobs), expected, rtol=1e-4, atol=1e-4)
    engine.update(load_model(saved, dtype="float32", device="cpu")[0])
    assert tokens(engine.generate(requests, params)) == tokens(before)


def test_sleep_changes_nothing(engine):
    params = SamplingParams(n=2, max_new_tokens=8)
    before = engine.generate([Request([5, 6])], params)
    engine.sleep()
    engine.sleep()
    assert tokens(engine.generate([Request([5, 6])], params)) == tokens(before)


BAD_REQUESTS = [
    (Request([]), "request 1: it is empty"),
    (Request([5, ROWS]), f"request 1: token {ROWS}, but the model's table has rows 0 to {ROWS - 1}"),
    (Request([5, -1]), "request 1: token -1"),
    (Request([5] * 250), r"request 1: 250 tokens and up to 8 new ones, but the model has 256 positions"),
    (Request(embeddings=torch.zeros(3, 31)), r"request 1: embeddings of shape \(3, 31\).*\[L, 32\]"),
    (Request(embeddings=torch.zeros(32)), r"request 1: embeddings of shape \(32,\)"),
    (Request(embeddings=torch.zeros(0, 32)), "request 1: it is empty"),
    (Request(embeddings=torch.zeros(250, 32)), "request 1: 250 tokens"),
    (Request(embeddings=torch.zeros(3, 32, dtype=torch.long)), "request 1: embeddings of type torch.int64"),
    (Request(embeddings=torch.full((3, 32), torch.nan)), "request 1: the embeddings hold NaN"),
    (Request(embeddings=torch.full((3, 32), 1e300, dtype=torch.double)), "request 1: the embeddings hold NaN"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_REQUESTS)
def test_bad_requests_are_named_before_anything_runs(engine, bad, message):
    done = []
    with pytest.raises(InputError, match=message):
        engine.generate([Request([5]), bad], SamplingParams(max_new_tokens=8), lambda *now: done.append(now))
    assert not done
    assert engine.generate([Request([5])], SamplingParams(max_new_tokens=8))


def test_stop_strings_need_a_tokenizer(saved):
    model, _ = load_model(saved, dtype="float32", device="cpu")
    for kind in [HFEngine] + [VLLMEngine] * (unavailable() is None):
        with pytest.raises(ConfigError, match="needs a tokenizer"):
            kind(model).generate([Request([5])], SamplingParams(max_new_tokens=4, stop=("x",)))


def test_engines_that_there_are_not_are_named(monkeypatch):
    with pytest.raises(ConfigError, match=r"engine 'vlm': there are hf"):
        engine_factory("vlm")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="vllm is not installed"):
        engine_factory("vllm")
