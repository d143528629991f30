"""Intervals, pass@k and guards against values worked out by hand."""

import itertools

import pytest
import torch

from latentrevise.checkers.arithmetic import check_step
from latentrevise.data.boundary import Boundary, Regex
from latentrevise.errors import ConfigError
from latentrevise.recovery.guards import (
    Candidate,
    GuardConfig,
    guard,
    guard_curves,
    guard_rates,
    guard_trade_off,
    markers,
    pass_at_k,
    signals,
    wilson,
)
from latentrevise.recovery.provenance import provenance, text_signals
from latentrevise.recovery.settings import RecoverConfig
from latentrevise.revise.hull import Mixture
from latentrevise.train.repair import RepairSettings
from tests.tiny import tiny_tokenizer


@pytest.mark.parametrize(
    ("k", "n", "expected"),
    [
        (0, 128, (0.0, 0.0, 0.0291)),
        (65, 128, (0.5078, 0.4222, 0.5930)),
        (10, 10, (1.0, 0.7225, 1.0)),
        (0, 0, (0, 0, 1)),
    ],
)
def test_wilson(k, n, expected):
    assert wilson(k, n) == pytest.approx(expected, abs=1e-3)


def test_pass_at_k_is_the_share_of_subsets_with_a_hit():
    outcomes = [1, 0, 0, 1, 0, 0, 0]
    for k in range(1, 8):
        subsets = list(itertools.combinations(outcomes, k))
        assert pass_at_k(7, 2, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets))
    with pytest.raises(ConfigError, match="at least k"):
        pass_at_k(4, 1, 5)


def _candidate(**changes):
    fields = {
        "prompt_ids": [1, 2],
        "original_ids": [3, 4],
        "plain_ids": [3, 4],
        "mixture": Mixture(torch.tensor([[3, 9], [4, 5]]), torch.tensor([[0.9, 0.1], [1.0, 0.0]])),
        "answer_ids": [7],
        "completion_ids": list(range(20, 40)),
        "completion": "so it is 7",
        "before_answer": 15,
        "plain_logprobs": [-0.5] * 20,
    }
    return Candidate(**{**fields, **changes})


def objections(config=None, **changes):
    return guard(signals(_candidate(**changes)), config or GuardConfig())


def test_guards_admit_a_sound_sample_and_name_what_is_wrong():
    assert objections() == []
    assert objections(answer_ids=[9]) == ["prefix-leak"]
    assert objections(before_answer=2) == ["bare-answer"]
    assert objections(plain_logprobs=[-4.0] * 20) == ["implausible"]
    assert objections(completion_ids=[1], before_answer=0) == ["bare-answer", "short"]
    off = GuardConfig(leak_weight=None, min_derivation_tokens=None, told=False, max_mention=None)
    assert objections(off, answer_ids=[9], before_answer=0, told=True) == []


def test_an_answer_token_of_the_prompt_or_of_a_light_atom_is_no_leak():
    assert objections(answer_ids=[9], prompt_ids=[9]) == []
    light = Mixture(torch.tensor([[3, 9]]), torch.tensor([[0.97, 0.03]]))
    assert objections(answer_ids=[9], mixture=light) == []


def test_an_answer_token_in_a_plain_prefix_is_a_leak_where_the_answer_was_read():
    assert objections(mixture=None, plain_ids=[3, 7]) == ["prefix-leak"]
    assert objections(mixture=None, plain_ids=[3, 7], aimed=False) == []
    assert objections(mixture=None, plain_ids=[3, 7], original_ids=[3, 7]) == []


def test_the_derivation_includes_what_the_prefix_has_of_its_own():
    assert signals(_candidate(before_answer=3))["derivation"] == 3
    assert signals(_candidate(before_answer=3, plain_ids=[3, 8, 8, 8, 8]))["derivation"] == 7


def test_the_weakest_token_of_the_steps_and_of_the_answer():
    steps = [-0.1] * 14 + [-3.0] + [-0.2] * 5
    assert signals(_candidate(plain_logprobs=steps))["step"] == -3.0
    assert objections(GuardConfig(min_step_logprob=-2.0), plain_logprobs=steps) == ["doubtful-step"]
    answer = [-0.1] * 15 + [-0.2] * 3 + [-6.0, -0.1]
    assert objections(GuardConfig(min_step_logprob=-2.0), plain_logprobs=answer) == []
    assert objections(GuardConfig(min_answer_logprob=-2.0), plain_logprobs=answer) == ["unfounded-answer"]
    assert objections(GuardConfig(min_agreement=0.5), agreement=0.25) == ["unstable"]
    assert objections(GuardConfig(min_agreement=0.5), agreement=0.5) == []
    assert "agreement" not in signals(_candidate())


@pytest.mark.parametrize(
    ("question", "steps", "expected"),
    [
        # One hidden rule: an example, an input that is asked about.
        ("61 ?A = 34 ; 5 ?A", "check A6 ; 61 + 73 = 34 ; so A6 ; 5 + 73 = 78 ; so", {"founded": 0, "used": 1}),
        ("61 ?A = 34 ; 5 ?A", "check A1 ; 61 + 12 = 73 ; so A1 ; 5 + 12 = 17 ; so", {"founded": 0, "used": 2 / 3}),
        ("61 ?A = 34 ; 5 ?A", "check A6 ; so", {"used": 0}),
        ("He had 6 eggs and bought 3.", "83 + 6 = 89. 89 - 6 = 83.", {"founded": 0.5, "used": 0.5}),
        ("He had 6 eggs and bought 3.", "6 + 3 = 9. 9 * 2 = 18.", {"founded": 1, "used": 1}),
        ("Two of six?", "2 * 6 = 12", {"founded": 1, "used": 1}),
        ("He has 4, doubles it twice and buys 4.", "4 * 2 = 8. 8 + 4 = 12.", {"founded": 1, "used": 3 / 4}),
        ("How many are one and none?", "1 + 1 = 2.", {"founded": 1}),
    ],
)
def test_provenance_says_where_numbers_come_from_and_which_are_used(question, steps, expected):
    assert provenance(question, steps) == pytest.approx(expected)


def test_provenance_and_contrast_object_below_their_thresholds_alone():
    config = GuardConfig(min_founded=0.5, min_used=1.0, min_contrast=0.0)
    known = {"founded": 0.5, "used": 1.0}
    assert objections(config, text=known, contrast=0.0) == []
    assert objections(config) == [], "what was not measured is no objection"
    worse = {"founded": 0.4, "used": 0.9}
    wanted = ["undecided", "unfounded-operand", "unused-fact"]
    assert objections(config, text=worse, contrast=-0.1) == wanted
    assert objections(text=worse, contrast=-0.1) == [], "off by default"


@pytest.mark.parametrize(
    ("row", "true"),
    [
        ("6+3=9. 9*2=18. so ", 1.0),
        ("6+3=9. 9*2=17. so ", 0.5),
        ("6+3=9. 8*2=16. so ", 0.5),  # no 8 anywhere
        ("6+3=8. 8*2=17", 0.0),
        ("so. ", None),
    ],
)
@pytest.mark.parametrize("boundary", [None, ".", Regex(r"\.(?!\d)")])
def test_a_step_that_the_checker_calls_false_is_a_signal(row, true, boundary):
    tokenizer, question = tiny_tokenizer(), "he had 6 eggs and bought 3, twice."
    ids, steps = tokenizer.encode(row, add_special_tokens=False), Boundary.of(boundary, tokenizer)
    assert text_signals(question, ids, tokenizer, steps, None) == provenance(question, row)
    found = text_signals(question, ids, tokenizer, steps, check_step)
    if boundary is None and true is not None:
        true = float(true == 1.0)  # all of it is one step
    assert found == provenance(question, row) | ({} if true is None else {"true": true})
    config = GuardConfig(min_true_steps=1.0)
    assert objections(config, text=found) == (["false-step"] if true is not None and true < 1 else [])


def test_steps_are_judged_by_a_checker_that_is_named():
    for settings in (RecoverConfig, RepairSettings):
        with pytest.raises(ConfigError, match=r"guards.min_true_steps = 1.0 needs a step_checker.*set it to null"):
            settings(guards=GuardConfig(min_true_steps=1.0))
        settings(guards=GuardConfig(min_true_steps=1.0), step_checker="latentrevise.checkers.arithmetic:check_step")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("The given answer is 7, so", True),
        ("we were told the answer: 7", True),
        ("As the answer 7 was provided, we check", True),
        ("Since the final answer is known to be 7", True),
        ("we are given that x = 2, so the answer is 7", False),
        ("the answer is 7", False),
    ],
)
def test_a_sample_that_was_told_the_answer_must_not_say_so(text, told):
    assert objections(completion=text, told=True) == (["told"] if told else [])
    assert objections(completion=text) == []


def test_a_sample_that_was_told_the_answer_must_derive_it_first():
    ids = [20, 21, 7, *range(22, 39)]
    assert signals(_candidate(told=True, completion_ids=ids))["mention"] == pytest.approx(0.1)
    assert objections(told=True, completion_ids=ids) == ["early-answer"]
    assert objections(completion_ids=ids) == []
    assert objections(told=True, completion_ids=[*ids[3:], *ids[:3]]) == []
    assert objections(told=True, completion_ids=ids, prompt_ids=[7]) == [], "the prompt has it anyway"
    both = [*range(20, 30), 7, *range(30, 35), 7, 8, 9, 10]
    assert signals(_candidate(told=True, answer_ids=[7, 8], completion_ids=both))["mention"] == pytest.approx(0.8)


def test_guard_rates_are_counts_of_the_four_kinds():
    found = guard_rates({(True, True): 8, (False, True): 2, (True, False): 1, (False, False): 4})
    assert (found["valid"], found["invalid"], found["admitted"]) == (10, 5, 9)
    assert found["false_reject"] == list(wilson(2, 10))
    assert found["false_accept"] == list(wilson(1, 5))
    assert found["contamination"] == list(wilson(1, 9))


def test_curves_and_trade_off_find_what_separates():
    """``answer`` separates all but one invalid sample, ``step`` that one; ``plain`` nothing."""
    valid = [({"answer": -0.1 * i, "step": -0.5, "plain": -1.0}, True) for i in range(20)]
    bad = [({"answer": -9.0, "step": -0.5, "plain": -1.0}, False) for _ in range(9)]
    bad.append(({"answer": -0.1, "step": -7.0, "plain": -1.0}, False))
    curves = guard_curves(valid + bad)
    assert set(curves) == {"unfounded-answer", "doubtful-step"}, "a guard that turns nothing away has no curve"
    assert [(p["kept"], p["false_accept"]) for p in curves["doubtful-step"]] == [(1.0, 0.9)]
    points = curves["unfounded-answer"]
    assert [p["kept"] for p in points] == sorted((p["kept"] for p in points), reverse=True)
    for point in points:
        kept = sum(s["answer"] >= point["threshold"] for s, _ in valid)
        assert point["kept"] == pytest.approx(kept / 20)
        assert point["false_accept"] == pytest.approx(sum(s["answer"] >= point["threshold"] for s, _ in bad) / 10)
    spread = [({**s, "step": -0.5 - 0.01 * i}, v) for i, (s, v) in enumerate(valid)] + bad
    front = guard_trade_off(spread)
    assert front[-1]["kept"] == 1.0
    assert front[-1]["contamination"] == 0.0
    assert set(front[-1]["thresholds"]) == {"unfounded-answer", "doubtful-step"}
    assert guard_trade_off([({"step": -1.0}, False)]) == []
    mixed = guard_trade_off([*spread, ({"answer": -1.95, "step": -0.5, "plain": -1.0}, False)] * 2)
    assert all(a["kept"] < b["kept"] and a["contamination"] < b["contamination"] for a, b in itertools.pairwise(mixed))


def test_markers_count_texts_not_words():
    found = markers(["wait, wait", "so 4", "let me double-check", "Actually"])
    assert (found["wait"], found["check"], found["however"], found["again"]) == (0.25, 0.25, 0.25, 0.0)
