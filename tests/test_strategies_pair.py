"""Several decisions changed at once: exact scores, the ranking by row, the self-check, the random control, the beam."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch

from latentrevise.config import from_dict
from latentrevise.errors import ConfigError
from latentrevise.model.branches import BranchScores
from latentrevise.recovery.settings import RecoverConfig
from latentrevise.strategies import Choice, ForkConfig, PairConfig, build
from latentrevise.strategies.beam import Beam
from latentrevise.strategies.candidates import Reader, target_values
from latentrevise.strategies.pair import Pair, PairRandom
from tests.failed import tools_for, work_of
from tests.tiny import tiny_model, tiny_tokenizer

FORKS = ForkConfig(step_tokens=7, banned=("k",))


@pytest.fixture(scope="module")
def tiny():
    return tools_for(tiny_model("qwen3", vocab=97), tiny_tokenizer(), max_new_tokens=12)


def encode(tools, text):
    return tuple(tools.tokenizer.encode(text, add_special_tokens=False))


@pytest.fixture(scope="module")
def work(tiny):
    return work_of(
        encode(tiny, "1+2?"),
        [encode(tiny, text) for text in ("abcdef;gh;ij", "xy;")],
        encode(tiny, "= "),
        encode(tiny, "42"),
        tiny.tokenizer,
    )


def plain_logits(tools, ids):
    with torch.no_grad():
        return tools.policy.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)


def exact(tools, work, ids):
    """``log pi(target | ids and the rest of their step, template)``, one greedy token after another."""
    ids = [*work.prompt.ids, *ids]
    reader = Reader(tools, work.template_ids, FORKS.banned)
    stem = len(ids)
    while reader.ends(ids)[-1:] != [len(ids)] and len(ids) < stem + FORKS.step_tokens:
        token = int(plain_logits(tools, ids)[-1].argmax())
        if token == tools.tokenizer.eos_token_id:
            break
        ids.append(token)
    ids = [*ids[: stem + reader.reasoning(ids[stem:])], *work.template_ids]
    logprobs = plain_logits(tools, [*ids, *work.answer_ids])
    return sum(float(logprobs[len(ids) - 1 + j, token]) for j, token in enumerate(work.answer_ids))


def values_at(tools, work, at, p_min, most):
    """The plausible tokens at a place of the rollout, and the entropy there."""
    ids = [*work.prompt.ids, *work.failed[0].completion_ids[:at]]
    logprobs = plain_logits(tools, ids)[-1]
    kept = [t for t in logprobs.argsort(descending=True).tolist() if t >= 4 and logprobs[t].exp() >= p_min][:most]
    entropy = float(torch.special.entr(logprobs.exp()).sum())
    return [t for t in kept if tools.tokenizer.decode([t]) not in "k="], entropy


def test_few_combinations_are_all_scored_exactly(tiny, work):
    config = PairConfig(p_min=0.01, max_values=5)
    (own,) = Pair("pivot-pair", FORKS, config).propose(tiny, [work], 64)
    ids = work.failed[0].completion_ids
    entropies = [values_at(tiny, work, at, 0.01, 5)[1] for at in range(7)]
    first, last = sorted(sorted(range(7), key=lambda at: -entropies[at])[:2])
    a, b = (values_at(tiny, work, at, 0.01, 5)[0] for at in (first, last))
    assert min(len(a), len(b)) > 2
    wanted = {(*ids[:first], u, *ids[first + 1 : last], v): (u, v) for u, v in product(a, b)}
    greedy = [p for p in own if p.greedy]
    assert {p.plain_ids: p.trace.tokens for p in greedy} == wanted
    for p in greedy:
        assert p.trace.value == pytest.approx(exact(tiny, work, p.plain_ids), abs=1e-3)
        assert p.trace.positions == (first, last)
        assert p.trace.entropy == pytest.approx(entropies[first], abs=1e-3)
        assert p.original_ids == ids[:first]
    found = [p.trace.value for p in greedy]
    assert found == sorted(found, reverse=True)
    # Where there are fewer combinations than samples, the best are sampled from as well.
    assert sum(p.n for p in own) == 64
    assert {p.plain_ids for p in own} == set(wanted)
    fed = own[0].compute.forward
    each = len(work.template_ids) + len(work.answer_ids)
    assert fed == 6 + len(a) * (last - first) + len(wanted) * each
    assert all(p.compute.passes == 0 for p in own[1:])


def test_a_row_ranks_the_last_decision_by_one_gradient(tiny, work):
    config = PairConfig(p_min=0.01, max_values=5, exhaustive=0, rescored=4)
    pair = Pair("pivot-pair", FORKS, config)
    reader = Reader(tiny, work.template_ids, FORKS.banned)
    (own,) = pair._decisions(tiny, reader, [work])
    spent = own.compute
    (best,) = pair._by_row(tiny, [own])
    table, ids = tiny.policy.table, work.failed[0].completion_ids
    first, last = own.positions
    plausible = [token for token, _ in own.values[1]]
    linear = {}
    for u, _ in own.values[0]:
        before = [*work.prompt.ids, *ids[:first], u, *ids[first + 1 : last]]
        behind = [*ids[last + 1 : 7], *work.template_ids, *work.answer_ids]
        z = table[plausible].mean(0).requires_grad_(True)
        embeddings = torch.cat([table[before], z[None], table[behind]])
        logprobs = tiny.policy.model(inputs_embeds=embeddings[None]).logits[0].log_softmax(-1)
        start = len(embeddings) - len(work.answer_ids)
        nll = -sum(logprobs[start - 1 + j, token] for j, token in enumerate(work.answer_ids)) / 2
        (gradient,) = torch.autograd.grad(nll, z)
        for v in plausible:
            linear[(u,), v] = float((-nll - gradient @ (table[v] - z)).detach())
    assert best == sorted(linear, key=lambda pair: -linear[pair])[:4]
    rows, suffix = len(own.values[0]), 7 - last + len(work.template_ids) + len(work.answer_ids) - 1
    assert own.compute.forward - spent.forward == rows * (last - first + suffix)
    assert own.compute.backward - spent.backward == rows * suffix
    proposals = pair.propose(tiny, [work], 3)[0]
    assert {(p.trace.tokens[:1], p.trace.tokens[1]) for p in proposals} < set(best)
    assert [p.trace.value for p in proposals] == pytest.approx(
        [exact(tiny, work, p.plain_ids) for p in proposals], abs=1e-3
    )
    assert proposals[0].trace.candidates == 4


def test_only_the_most_probable_rows_are_tried(tiny, work):
    config = PairConfig(p_min=0.01, max_values=5, exhaustive=0, rows=2, rescored=64)
    (own,) = Pair("pivot-pair", FORKS, config).propose(tiny, [work], 64)
    first = own[0].trace.positions[0]
    assert {p.trace.tokens[0] for p in own} == set(values_at(tiny, work, first, 0.01, 5)[0][:2])


@pytest.mark.parametrize("exhaustive", [1000, 0])
def test_one_decision_or_three(tiny, work, exhaustive):
    for decisions in (1, 3):
        config = PairConfig(decisions=decisions, p_min=0.01, max_values=3, exhaustive=exhaustive, rescored=100)
        (own,) = Pair("pivot-pair", FORKS, config).propose(tiny, [work], 5)
        greedy = [p for p in own if p.greedy]
        assert len(own[0].trace.tokens) == decisions
        assert own[0].trace.candidates <= 3**decisions
        assert len({p.plain_ids for p in greedy}) == min(5, own[0].trace.candidates)
        for p in greedy:
            assert [p.plain_ids[at] for at in p.trace.positions] == list(p.trace.tokens)
            assert p.trace.value == pytest.approx(exact(tiny, work, p.plain_ids), abs=1e-3)
            assert len(p.trace.logprobs) == decisions


def test_the_models_own_check_comes_first(tiny, work):
    config = PairConfig(p_min=0.01, max_values=5, marker="w", marker_keep=2)
    (own,) = Pair("pivot-pair", FORKS, config).propose(tiny, [work], 64)
    ids, first = work.failed[0].completion_ids, own[0].trace.positions[0]
    semicolon = encode(tiny, ";")[0]
    fault = {}
    for u in values_at(tiny, work, first, 0.01, 5)[0]:
        text = [*work.prompt.ids, *ids[:first], u, *ids[first + 1 : 7]]
        stem = len(text)
        while len(text) < stem + FORKS.step_tokens:
            token = int(plain_logits(tiny, text)[-1].argmax())
            if token == tiny.tokenizer.eos_token_id:
                break
            text.append(token)
            if token == semicolon:
                break
        fault[u] = float(plain_logits(tiny, text)[-1, encode(tiny, "w")[0]])
    assert len(fault) > 2
    assert {p.trace.tokens[0] for p in own} == set(sorted(fault, key=fault.get)[:2])
    without = Pair("pivot-pair", FORKS, replace(config, marker=None)).propose(tiny, [work], 64)[0]
    assert len({p.trace.tokens[0] for p in without}) == len(fault)


def test_as_many_random_combinations_as_the_rows_would_have_paid_for(tiny, work):
    config = PairConfig(p_min=0.001, max_values=12, exhaustive=0, rescored=16)
    linear = Pair("pivot-pair", FORKS, config).propose(tiny, [work], 4)[0]
    drawn = PairRandom("pair-random", FORKS, config).propose(tiny, [work], 4)[0]
    # A row's two passes take as much as scoring three combinations whose step is as long as the rollout's own.
    assert drawn[0].trace.candidates == 16 + 3 * 12
    assert linear[0].trace.candidates == 16
    again = PairRandom("pair-random", FORKS, config)
    assert again.propose(tiny, [work], 4)[0] == drawn
    assert again.propose(tiny, [replace(work, seed=1)], 4)[0] != drawn
    # Where all are few enough to be scored, drawing all of them is the same.
    few = replace(config, max_values=3)
    assert PairRandom("pair-random", FORKS, few).propose(tiny, [work], 4)[0][0].trace.candidates == 9


def test_it_knows_the_target_alone_and_each_prompt_stands_for_itself(tiny, work):
    other = replace(work, prompt=replace(work.prompt, id="q", answer="else"), cuts=work.cuts)
    for name in ("pivot-pair", "pivot-pair-linear", "pair-random"):
        strategy = build(name, RecoverConfig(forks=FORKS, pair=PairConfig(p_min=0.01, max_values=5)))
        one, two = strategy.propose(tiny, [work, other], 3)
        assert [p.plain_ids for p in one] == [p.plain_ids for p in two]
        assert [p.plain_ids for p in strategy.propose(tiny, [work], 3)[0]] == [p.plain_ids for p in one]
        wrong = replace(work, answer_ids=encode(tiny, "9"))
        assert strategy.propose(tiny, [wrong], 3)[0][0].trace.value != one[0].trace.value
        assert strategy.uses_answer


def test_without_a_choice_it_samples_from_the_prompt_and_says_so(tiny, work):
    for name in ("pivot-pair", "pivot-pair-linear", "pair-random"):
        settings = RecoverConfig(forks=FORKS, pair=PairConfig(p_min=0.999, marker="w"))
        # Beside one that has a choice, so that the two are not mixed up.
        ((own,),) = build(name, settings).propose(tiny, [work], 5)
        assert (own.n, own.plain_ids, own.trace) == (5, (), Choice())


def test_the_window_is_the_first_steps(tiny, work):
    reader = Reader(tiny, work.template_ids, FORKS.banned)
    for steps, end in ((1, 7), (2, 10), (9, 12)):
        (own,) = Pair("p", FORKS, PairConfig(steps=steps, decisions=20, max_values=2))._decisions(tiny, reader, [work])
        assert own.positions[-1] < end
        assert own.compute.forward == end - 1
        assert math.isfinite(own.entropy)


def test_settings_are_checked():
    for change in ({"p_min": 1.0}, {"decisions": 0}, {"rescored": 0}, {"marker_keep": 0}):
        with pytest.raises(ConfigError, match="PairConfig"):
            PairConfig(**change)
    assert from_dict(RecoverConfig, {"pair": {"exhaustive": 0}}).pair.exhaustive == 0


# Decisions one after the other

BEAM = PairConfig(decisions=3, p_min=0.01, max_values=4, exhaustive=0, rows=1, rescored=1)


def decisions(tiny, work, config):
    """Places and plausible tokens, as the exhaustive search has them."""
    (own,) = Pair("p", FORKS, config)._decisions(tiny, Reader(tiny, work.template_ids, FORKS.banned), [work])
    return own.positions, [[token for token, _ in values] for values in own.values]


def test_each_decision_is_made_behind_those_kept_before(tiny, work):
    config = replace(BEAM, beam=2)
    reader = Reader(tiny, work.template_ids, FORKS.banned)
    places, values = decisions(tiny, work, config)
    ids = list(work.failed[0].completion_ids)
    rows, spent = [()], 0
    for depth, at in enumerate(places):
        scored = []
        for row in rows:
            for token in values[depth]:
                forced = list(ids)
                for place, known in zip(places, row, strict=False):
                    forced[place] = known
                ((value, compute),) = target_values(tiny, reader, [(work, tuple(forced), at, token)], FORKS.step_tokens)
                scored.append((value, (*row, token)))
                spent += compute.passes
        scored.sort(key=lambda pair: -pair[0])
        rows = [row for _, row in scored[:2]]
        if at != places[-1]:
            spent += 2 * (places[depth + 1] - at)
    (own,) = Beam("pivot-beam", FORKS, config).propose(tiny, [work], 5)
    assert [p.trace.tokens for p in own] == [row for _, row in scored[:5]]
    assert [p.trace.value for p in own] == pytest.approx([value for value, _ in scored[:5]], abs=1e-3)
    assert own[0].trace.candidates == 2 * len(values[-1])
    assert all(p.greedy and p.trace.positions == places for p in own)
    assert own[0].compute.passes == spent + 6, "the choices, and the pass that finds the decisions"


def test_a_beam_as_wide_as_the_rows_scores_all_combinations(tiny, work):
    two = replace(BEAM, decisions=2, exhaustive=64, beam=64)
    wide = Beam("pivot-beam", FORKS, two).propose(tiny, [work], 6)[0]
    every = Pair("pivot-pair", FORKS, two).propose(tiny, [work], 6)[0]
    assert [p.plain_ids for p in wide] == [p.plain_ids for p in every]
    assert wide[0].compute.passes > every[0].compute.passes


@pytest.mark.parametrize(("credit", "found"), [(True, True), (False, False)])
def test_it_finds_what_shows_by_itself(tiny, work, monkeypatch, credit, found):
    """A score of our own in place of the policy's: the last values are right, each counted, or only both together."""
    config = replace(BEAM, decisions=2, max_values=6, beam=1)
    places, values = decisions(tiny, work, config)
    right = [listed[-1] for listed in values]

    def score(policy, trunks, branches, **_):
        totals = []
        for branch in branches:
            text = [*trunks[branch.trunk][: branch.at], *branch.tokens]
            hits = [text[len(work.prompt.ids) + at] == token for at, token in zip(places, right, strict=True)]
            totals.append(torch.tensor([float(sum(hits) if credit else all(hits))]))
        return BranchScores(totals, [], [])

    monkeypatch.setattr("latentrevise.strategies.candidates.score_branches", score)
    monkeypatch.setattr("latentrevise.strategies.pair.score_branches", score)
    (own,) = Beam("pivot-beam", FORKS, config).propose(tiny, [work], 3)
    assert (own[0].trace.tokens == tuple(right)) == found


def test_by_name_each_prompt_for_itself_and_without_a_choice(tiny, work):
    other = replace(work, prompt=replace(work.prompt, id="q", answer="else"))
    strategy = build("pivot-beam", RecoverConfig(forks=FORKS, pair=replace(BEAM, decisions=2)))
    assert strategy.uses_answer
    one, two = strategy.propose(tiny, [work, other], 3)
    assert [p.plain_ids for p in one] == [p.plain_ids for p in two]
    assert one[0].compute.passes == two[0].compute.passes
    none = build("pivot-beam", RecoverConfig(forks=FORKS, pair=PairConfig(p_min=0.999)))
    ((own,),) = none.propose(tiny, [work], 5)
    assert (own.n, own.plain_ids, own.trace) == (5, (), Choice())
