"""Gold-free branching off the trie of the failed rollouts, alone and through the whole pipeline."""

import dataclasses
import json
import math
from collections import Counter

import pytest

from latentrevise import recover
from latentrevise.data.records import Start, read_records
from latentrevise.demo import get_family, make_prompts, model_dir
from latentrevise.demo.run import demo_config
from latentrevise.model.loading import load_model
from latentrevise.report.runs import FinishedRun
from latentrevise.strategies import ForkConfig
from latentrevise.strategies.branching import Branching
from latentrevise.strategies.candidates import Fork, Reader, find_forks
from tests.failed import tools_for, zero_hit


@pytest.fixture(scope="module")
def rule():
    model, tokenizer = load_model(model_dir("rule"), dtype="float32", device="cpu")
    tools = tools_for(model, tokenizer)
    family = get_family("rule")
    return tools, zero_hit(family, tools, 8, 6, seed=5)


def branches(order, **changes):
    return Branching(f"branch-{order}", ForkConfig(**changes), order)


@pytest.mark.parametrize("order", ["mass", "entropy"])
def test_the_first_forks_are_continued_greedily(rule, order):
    tools, work = rule
    config = ForkConfig()
    for item, own in zip(work, branches(order).propose(tools, work, 8), strict=True):
        assert [(p.n, p.greedy) for p in own] == [(1, True)] * 8
        assert len({p.plain_ids for p in own}) == 8
        tried = {r.completion_ids[:n] for r in item.failed for n in range(len(r.completion_ids) + 1)}
        assert not tried & {p.plain_ids for p in own}
        reader = Reader(tools, item.template_ids, config.banned)
        (found,) = find_forks(tools, reader, [item], [item.failed], config)
        left = [f for f in found.forks if (*f.prefix_ids, f.token) not in {p.plain_ids for p in own}]
        assert min(getattr(p.trace, order) for p in own) >= max(getattr(f, order) for f in left)
        # One pass over each distinct rollout, without the answer part and the token that is only predicted.
        assert own[0].compute == found.compute
        assert 0 < found.compute.forward < sum(len(r.completion_ids) for r in item.failed)


def test_new_samples_leave_the_known_rollouts_by_forks_of_their_own(rule):
    tools, work = rule
    strategy = Branching("resample-new", ForkConfig(), "draw")
    for item, own in zip(work, strategy.propose(tools, work, 8), strict=True):
        assert [(p.n, p.greedy) for p in own] == [(1, False)] * 8
        tried = {r.completion_ids[:n] for r in item.failed for n in range(len(r.completion_ids) + 1)}
        assert len({p.plain_ids for p in own} - tried) == 8
    again = [[p.plain_ids for p in own] for own in strategy.propose(tools, work[::-1], 8)][::-1]
    assert again == [[p.plain_ids for p in own] for own in strategy.propose(tools, work, 8)]


def test_forks_are_drawn_in_proportion_to_their_mass_and_none_twice(rule):
    _, work = rule
    strategy = Branching("resample-new", ForkConfig(), "draw")
    shares = [0.5, 0.3, 0.2]
    forks = [Fork(work[0].failed[0], 0, token, 0.0, 0.0, math.log(0.1 * share)) for token, share in enumerate(shares)]
    orders = Counter(tuple(f.token for f in strategy._ranked(forks, seed)) for seed in range(4000))
    for order, count in orders.items():
        a, b, _ = (shares[i] for i in order)
        assert count / 4000 == pytest.approx(a * b / (1 - a), abs=0.03), order  # some 4 standard errors
    assert len(orders) == 6


def test_identical_rollouts_are_one_and_all_samples_are_spent(rule):
    tools, work = rule
    item = dataclasses.replace(work[0], failed=(work[0].failed[0],) * 3)
    (once,) = branches("mass").propose(tools, [dataclasses.replace(item, failed=item.failed[:1])], 64)
    (own,) = branches("mass").propose(tools, [item], 64)
    assert own == once
    greedy = [p for p in own if p.greedy]
    assert 3 < len(greedy) < 64
    assert sum(p.n for p in own) == 64
    assert {p.plain_ids for p in own if not p.greedy} <= {p.plain_ids for p in greedy}


def test_a_run_records_what_was_chosen(rule, tmp_path):
    family = get_family("rule")
    tools, _ = rule
    config = dataclasses.replace(
        demo_config(family),
        strategies=("pivot", "branch-mass", "resample"),
        rollouts=4,
        samples=4,
        equal_compute_cap=16,
    )
    prompts = make_prompts(family, 12, split="develop", seed=6)
    recovered = recover(tools.policy.model, tools.tokenizer, prompts, config, tmp_path / "out")
    arms = recovered.metrics["arms"]
    assert "pivot@wrong" in arms
    assert "branch-mass@wrong" not in arms
    assert arms["pivot"]["recovered"] > arms["resample"]["recovered"]
    for arm in ("pivot", "branch-mass"):
        starts = read_records(tmp_path / "out" / "starts" / arm, Start)
        for start in starts:
            (at,), (token,) = start.trace["positions"], start.trace["tokens"]
            assert start.plain_ids == (*start.prefix_ids, token)
            assert len(start.prefix_ids) == at
            assert (start.trace["value"] is None) is (arm == "branch-mass")
        json.dumps(starts[0].trace, allow_nan=False)
        assert FinishedRun.open(tmp_path / "out").traces(arm) == []
    rows = [row for row in recovered.trajectories if row.strategy == "pivot"]
    assert rows
    for row in rows:
        assert row.plain_logprobs == pytest.approx(row.sampling_logprobs, abs=1e-3)
