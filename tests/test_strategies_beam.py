"""Decisions changed one after the other: what the beam keeps, what it finds with partial credit, what it is charged."""

from dataclasses import replace

import pytest
import torch

from latentrevise.branches import BranchScores
from latentrevise.pipeline import RecoverConfig
from latentrevise.strategies import Choice, ForkConfig, PairConfig, build
from latentrevise.strategies.beam import Beam
from latentrevise.strategies.candidates import Reader, target_values
from latentrevise.strategies.pair import Pair
from tests.failed import tools_for, work_of
from tests.tiny import tiny_model, tiny_tokenizer

FORKS = ForkConfig(step_tokens=7, banned=("k",))
CONFIG = PairConfig(decisions=3, p_min=0.01, max_values=4, exhaustive=0, rows=1, rescored=1)


@pytest.fixture(scope="module")
def tiny():
    return tools_for(tiny_model("qwen3", vocab=97), tiny_tokenizer(), max_new_tokens=12)


def encode(tools, text):
    return tuple(tools.tokenizer.encode(text, add_special_tokens=False))


@pytest.fixture(scope="module")
def work(tiny):
    rollouts = [encode(tiny, text) for text in ("abcdef;gh;ij", "xy;")]
    return work_of(encode(tiny, "1+2?"), rollouts, encode(tiny, "= "), encode(tiny, "42"), tiny.tokenizer)


def decisions(tiny, work, config):
    """Places and plausible tokens, as the exhaustive search has them."""
    (own,) = Pair("p", FORKS, config)._decisions(tiny, Reader(tiny, work.template_ids, FORKS.banned), [work])
    return own.positions, [[token for token, _ in values] for values in own.values]


def test_each_decision_is_made_behind_those_kept_before(tiny, work):
    config = replace(CONFIG, beam=2)
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
    two = replace(CONFIG, decisions=2, exhaustive=64, beam=64)
    wide = Beam("pivot-beam", FORKS, two).propose(tiny, [work], 6)[0]
    every = Pair("pivot-pair", FORKS, two).propose(tiny, [work], 6)[0]
    assert [p.plain_ids for p in wide] == [p.plain_ids for p in every]
    assert wide[0].compute.passes > every[0].compute.passes


@pytest.mark.parametrize(("credit", "found"), [(True, True), (False, False)])
def test_it_finds_what_shows_by_itself(tiny, work, monkeypatch, credit, found):
    """A score of our own in place of the policy's: the last values are right, each counted, or only both together."""
    config = replace(CONFIG, decisions=2, max_values=6, beam=1)
    places, values = decisions(tiny, work, config)
    right = [listed[-1] for listed in values]

    def score(trunks, branches, **_):
        totals = []
        for branch in branches:
            text = [*trunks[branch.trunk][: branch.at], *branch.tokens]
            hits = [text[len(work.prompt.ids) + at] == token for at, token in zip(places, right, strict=True)]
            totals.append(torch.tensor([float(sum(hits) if credit else all(hits))]))
        return BranchScores(totals, [], [])

    monkeypatch.setattr(tiny.policy, "score_branches", score)
    (own,) = Beam("pivot-beam", FORKS, config).propose(tiny, [work], 3)
    assert (own[0].trace.tokens == tuple(right)) == found


def test_by_name_each_prompt_for_itself_and_without_a_choice(tiny, work):
    other = replace(work, prompt=replace(work.prompt, id="q", answer="else"))
    strategy = build("pivot-beam", RecoverConfig(forks=FORKS, pair=replace(CONFIG, decisions=2)))
    assert strategy.uses_answer
    one, two = strategy.propose(tiny, [work, other], 3)
    assert [p.plain_ids for p in one] == [p.plain_ids for p in two]
    assert one[0].compute.passes == two[0].compute.passes
    none = build("pivot-beam", RecoverConfig(forks=FORKS, pair=PairConfig(p_min=0.999)))
    ((own,),) = none.propose(tiny, [work], 5)
    assert (own.n, own.plain_ids, own.trace) == (5, (), Choice())
