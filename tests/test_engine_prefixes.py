"""Requests that share leading tokens: each distinct token is computed once, and nothing sampled changes."""

from itertools import chain

import pytest
import torch

from latentrevise.engines import HFEngine, Request, SamplingParams, lines
from latentrevise.engines.families import families
from latentrevise.engines.prefixes import shared_prefixes
from tests.tiny import tiny_model, tiny_tokenizer

V = 97


def draw(length, seed):
    return torch.randint(4, V, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def family():
    """Forks of a rollout at several places, a fork of a fork, a duplicate, a prefix, and two strangers."""
    trunk = draw(60, 0)
    forks = [
        [*trunk[:at], (trunk[at] - 4 + 7) % (V - 4) + 4, *draw(more, at)] for at, more in ((20, 3), (33, 0), (50, 5))
    ]
    deep = [*trunk[:20], (trunk[20] - 4 + 7) % (V - 4) + 4, *draw(3, 20), *draw(9, 77)]
    return [draw(7, 5), trunk, *forks, list(trunk), deep, trunk[:40], draw(30, 6)]


def distinct(rows):
    return len({tuple(row[: i + 1]) for row in rows for i in range(len(row))})


def fed(model, engine, requests, params):
    """The completions, and how many positions that are no padding went through the model."""
    count = []

    def hook(module, args, inputs):
        width = inputs["position_ids"].shape[1]
        mask = inputs["attention_mask"]
        if mask is None:
            count.append(inputs["position_ids"].numel())
        else:  # padding is masked, or sees nothing
            count.append(int(mask[:, -width:].sum() if mask.ndim == 2 else (mask == 0).any(-1).sum()))

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    found = engine.generate(requests, params)
    handle.remove()
    return found, sum(count)


@pytest.mark.parametrize("budget", [65536, 700])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("arch", ["qwen3", "qwen2", "llama", "gemma3"])
def test_the_tokens_are_those_of_one_by_one(arch, temperature, budget):
    model = tiny_model(arch, V, seed=1)
    engine = HFEngine(model, tiny_tokenizer(V), token_budget=budget)
    requests = [Request(ids, seed=i) for i, ids in enumerate(family())]
    params = SamplingParams(n=2, temperature=temperature, max_new_tokens=10, stop=("1", "a"))
    alone = [engine.generate([request], params)[0] for request in requests]
    together = engine.generate(requests, params)
    assert [[(c.ids, c.finish_reason) for c in row] for row in together] == [
        [(c.ids, c.finish_reason) for c in row] for row in alone
    ]
    for a, b in zip(chain(*alone), chain(*together), strict=True):
        torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), rtol=1e-4, atol=1e-4)


def test_each_distinct_token_is_fed_once():
    """But for the last of the two requests that are the beginning of another: the logits behind it are needed."""
    model, rows = tiny_model("qwen3", V, seed=1), family()
    assert HFEngine(model).shares_prefixes
    _, tokens = fed(model, HFEngine(model), [Request(ids) for ids in rows], SamplingParams(max_new_tokens=1))
    assert distinct(rows) + 2 == tokens < sum(map(len, rows)) / 2


@pytest.mark.parametrize("crowded", [0, 1e9])
def test_rows_that_part_from_their_family_go_on_the_same(crowded, monkeypatch):
    """At once, or never; with rows that end at different steps, and families that end altogether."""
    model = tiny_model("llama", V, seed=2)
    engine, params = HFEngine(model, tiny_tokenizer(V)), SamplingParams(n=3, max_new_tokens=24, stop=("1", "a"))
    requests = [Request([*rows, 5], seed=i) for i, rows in enumerate([*family(), *([9, *row] for row in family())])]
    alone = [engine.generate([request], params)[0] for request in requests]
    parted = []
    monkeypatch.setattr(lines, "_CROWDED", crowded)
    monkeypatch.setattr(
        lines.Packed, "parted", lambda self, own=lines.Packed.parted: parted.append(own(self)) or parted[-1]
    )
    together = engine.generate(requests, params)
    assert [[c.ids for c in row] for row in together] == [[c.ids for c in row] for row in alone]
    assert {len(c.ids) for row in together for c in row} > {1, 24}
    assert all(isinstance(each, lines.Padded) is (not crowded) for each in parted)
    assert parted


def test_a_model_that_makes_its_own_masks_runs_each_request_whole():
    model, rows = tiny_model("llama", V, seed=1), family()

    def own(module, args, inputs):
        if inputs.get("attention_mask") is not None and inputs["attention_mask"].ndim == 4:
            inputs["attention_mask"] = None
        return args, inputs

    model.register_forward_pre_hook(own, with_kwargs=True)
    engine, params = HFEngine(model), SamplingParams(max_new_tokens=5)
    assert not engine.shares_prefixes
    whole = engine.generate([Request(ids, seed=i) for i, ids in enumerate(rows)], params)
    assert [row[0].ids for row in whole] == [
        engine.generate([Request(ids, seed=i)], params)[0][0].ids for i, ids in enumerate(rows)
    ]


def test_a_sliding_window_runs_each_request_whole():
    model, rows = tiny_model("gemma3", V, seed=1), family()
    assert not HFEngine(model).shares_prefixes
    _, tokens = fed(model, HFEngine(model), [Request(ids) for ids in rows], SamplingParams(max_new_tokens=1))
    assert tokens == sum(map(len, rows))


def test_soft_prefixes_share_the_rows_that_are_bitwise_equal():
    """Also with requests of tokens. Rows that differ in one bit's worth are not shared."""
    model = tiny_model("llama", V, seed=1)
    prompt, tail = draw(30, 1), torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        embedded = model.get_input_embeddings()(torch.tensor(prompt))
    near = embedded.clone()
    near[0, 0] = torch.nextafter(near[0, 0], torch.tensor(9.0))
    soft = [torch.cat([start, end]) for start, end in ((embedded, tail[0]), (embedded, tail[1]), (near, tail[0]))]
    requests = [*(Request(embeddings=row, seed=i) for i, row in enumerate(soft)), Request([*prompt, 9], seed=3)]
    engine, params = HFEngine(model), SamplingParams(n=2, max_new_tokens=8)
    together = engine.generate(requests, params)
    assert [[c.ids for c in row] for row in together] == [
        [c.ids for c in engine.generate([request], params)[0]] for request in requests
    ]
    _, tokens = fed(model, engine, requests, SamplingParams(max_new_tokens=1))
    assert tokens == 36 + 6 + 36 + 1


def test_the_plan_of_a_chain():
    base = list(range(100))
    found = shared_prefixes([base[:50], base, [*base[:70], -1, -2], [*base[:70], -1, -3], base])
    assert [(s.owner, s.length, s.level, s.same) for s in found] == [
        (1, 49, 1, False),
        (1, 0, 0, False),
        (1, 70, 1, False),
        (2, 71, 2, False),
        (1, 100, 0, True),
    ]


def test_prompts_with_a_short_beginning_in_common_are_kept_apart():
    """Eight prompts that share 25 of 85 tokens, each with rollouts begun: a line a prompt, with all its rollouts."""
    prompts = [[*range(25), *range(1000 * p, 1000 * p + 60)] for p in range(1, 9)]
    rollouts = [[*prompt, *range(-100 * j - 30, -100 * j)] for prompt in prompts for j in range(1, 9)]
    found = families(shared_prefixes(rollouts))
    assert found == [list(range(8 * p, 8 * p + 8)) for p in range(8)]
    assert len(families(shared_prefixes(prompts))) == 8


def test_a_crowded_family_parts_by_prompts_and_then_by_rows(monkeypatch):
    """Four prompts of 60 tokens, 40 of them the same, 6 rows each: one line, then one a prompt, then one a row."""
    model = tiny_model("llama", V, seed=2)
    engine, params = HFEngine(model, tiny_tokenizer(V)), SamplingParams(n=6, max_new_tokens=40)
    requests = [Request([*draw(40, 1), *draw(20, 10 + i)], seed=i) for i in range(4)]
    alone = [engine.generate([request], params)[0] for request in requests]
    forms = []

    def form(self, own=lines.Packed.parted):
        found = own(self)
        forms.append(found._families if isinstance(found, lines.Packed) else "padded")
        return found

    monkeypatch.setattr(lines.Packed, "parted", form)
    monkeypatch.setattr(lines, "_CROWDED", 2)
    together = engine.generate(requests, params)
    assert [[c.ids for c in row] for row in together] == [[c.ids for c in row] for row in alone]
    assert list(dict.fromkeys(forms)) == [4, "padded"]


def grown(requests, found):
    """Each request with its first two completions behind it: what a search asks next."""
    return [
        Request((*request.ids, *completion.ids, 7), seed=request.seed + 100 * j)
        for request, own in zip(requests, found, strict=True)
        for j, completion in enumerate(own[:2])
    ]


@pytest.mark.parametrize("crowded", [0, 6, 1e9])
@pytest.mark.parametrize("budget", [65536, 300])
@pytest.mark.parametrize("arch", ["qwen3", "llama"])
def test_what_was_run_in_a_call_is_reused_in_the_next(arch, budget, crowded, monkeypatch):
    """Three calls, each behind the last one's completions, with rows that end at different steps; a budget of 300
    positions is forgotten again and again."""
    monkeypatch.setattr(lines, "_CROWDED", crowded)
    model = tiny_model(arch, V, seed=1)
    engine = HFEngine(model, tiny_tokenizer(V), token_budget=budget)
    params = SamplingParams(n=3, max_new_tokens=8, stop=("1", "a"))
    asked = [Request(ids, seed=i) for i, ids in enumerate(family()[:4])]
    table = model.get_input_embeddings().weight.detach()
    soft = [Request(embeddings=table[torch.tensor([*family()[0], *draw(9, 5)])], seed=77)]
    with engine.reusing():
        for also in ([], soft, []):  # nothing is reused beside a soft prefix, whose tokens are not known
            with engine.reusing():  # the outer one goes on
                kept, ran = fed(model, engine, [*asked, *also], params)
            fresh = HFEngine(model, tiny_tokenizer(V), token_budget=budget)
            alone, ran_alone = fed(model, fresh, [*asked, *also], params)
            assert [[(c.ids, c.finish_reason) for c in row] for row in kept] == [
                [(c.ids, c.finish_reason) for c in row] for row in alone
            ]
            for a, b in zip(chain(*alone), chain(*kept), strict=True):
                torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), rtol=1e-4, atol=1e-4)
            asked = grown(asked, kept[: len(asked)])
    assert budget < 65536 or ran < 0.7 * ran_alone
    assert len({len(c.ids) for row in kept for c in row}) > 3, "rows end at different steps"


def test_each_distinct_token_of_several_calls_is_fed_once():
    """But for the last of each request, whose logits are needed."""
    model = tiny_model("qwen3", V, seed=1)
    engine = HFEngine(model)
    asked, params = [Request(draw(20, i), seed=i) for i in range(3)], SamplingParams(n=2, max_new_tokens=6)
    with engine.reusing():
        found, first = fed(model, engine, asked, params)
        _, again = fed(model, engine, asked, SamplingParams(max_new_tokens=1))
        _, behind = fed(model, engine, grown(asked, found), SamplingParams(max_new_tokens=1))
    assert (first, again) == (3 * 20 + 6 * 5, 3)
    assert behind == 6 * 2, "the sixth token was sampled and not run yet"
    _, after = fed(model, engine, asked, SamplingParams(max_new_tokens=1))
    assert after == 3 * 20


def test_new_weights_are_not_read_from_old_keys():
    model, other = tiny_model("llama", V, seed=1), tiny_model("llama", V, seed=2)
    engine, params, asked = HFEngine(model), SamplingParams(max_new_tokens=5, temperature=0.0), [Request(draw(20, 3))]
    with engine.reusing():
        engine.generate(asked, params)
        engine.update(other)
        found = engine.generate(asked, params)
    assert found == HFEngine(other).generate(asked, params)
