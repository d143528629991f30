"""Intervals, pass@k and guards against values worked out by hand."""

import itertools

import pytest
import torch

from latentrevise.audit import Candidate, GuardConfig, guard, markers, pass_at_k, wilson
from latentrevise.errors import ConfigError
from latentrevise.hull import Mixture


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
        "completion_ids": list(range(20)),
        "before_answer": 15,
        "plain_logprobs": [-0.5] * 20,
    }
    return Candidate(**{**fields, **changes})


def test_guards_admit_a_sound_sample_and_name_what_is_wrong():
    config = GuardConfig()
    assert guard(_candidate(), config) == []
    assert guard(_candidate(answer_ids=[9]), config) == ["prefix-leak"]
    assert guard(_candidate(before_answer=2), config) == ["bare-answer"]
    assert guard(_candidate(plain_logprobs=[-4.0] * 20), config) == ["implausible"]
    assert guard(_candidate(completion_ids=[1], before_answer=0), config) == ["bare-answer", "short"]
    assert guard(_candidate(answer_ids=[9], before_answer=0), GuardConfig(None, None, None, None)) == []


def test_an_answer_token_of_the_prompt_or_of_a_light_atom_is_no_leak():
    config = GuardConfig()
    assert guard(_candidate(answer_ids=[9], prompt_ids=[9]), config) == []
    light = Mixture(torch.tensor([[3, 9]]), torch.tensor([[0.97, 0.03]]))
    assert guard(_candidate(answer_ids=[9], mixture=light), config) == []


def test_markers_count_texts_not_words():
    found = markers(["wait, wait", "so 4", "let me double-check", "Actually"])
    assert (found["wait"], found["check"], found["however"], found["again"]) == (0.25, 0.25, 0.25, 0.0)
