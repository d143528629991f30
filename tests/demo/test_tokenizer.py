"""The word-level tokenizer: lossless both ways, the same after saving, and readable by math-verify."""

import random

import pytest
from math_verify import parse, verify
from transformers import AutoTokenizer

from latentrevise.demo import get_family
from latentrevise.demo.tokenizer import SPECIAL, build_tokenizer


@pytest.fixture(scope="module", params=["rule", "chain"])
def family(request):
    return get_family(request.param)


@pytest.fixture(scope="module")
def tokenizer(family, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(family).save_pretrained(directory)
    return AutoTokenizer.from_pretrained(directory)


def test_every_word_is_one_token_and_survives(family, tokenizer):
    words = family.vocabulary()
    assert len(words) == len(set(words)) == len(tokenizer) - len(SPECIAL)
    ids = tokenizer(" ".join(words))["input_ids"]
    assert len(ids) == len(words)
    assert tokenizer.decode(ids) == " ".join(words)
    assert set(ids) == set(range(len(SPECIAL), len(tokenizer)))


def test_text_and_ids_round_trip(family, tokenizer):
    rng = random.Random(0)
    for _ in range(100):
        problem = family.sample_problem(rng)
        trace = " ".join(family.sample_trace(problem, rng).words[:-1])
        both = family.prompt_text(problem) + " " + trace
        ids = tokenizer(both)["input_ids"]
        assert tokenizer.decode(ids) == both
        assert ids == tokenizer(family.prompt_text(problem))["input_ids"] + tokenizer(trace)["input_ids"]
        assert ids == tokenizer(both, add_special_tokens=False)["input_ids"]
    noise = [rng.randrange(len(SPECIAL), len(tokenizer)) for _ in range(300)]
    assert tokenizer(tokenizer.decode(noise))["input_ids"] == noise


def test_special_tokens(tokenizer):
    named = (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token)
    assert named == SPECIAL
    assert sorted(tokenizer.all_special_ids) == [0, 1, 2, 3]
    assert tokenizer.chat_template is None
    assert tokenizer("so <eos>")["input_ids"][-1] == tokenizer.eos_token_id
    assert tokenizer.decode(tokenizer("so <eos>")["input_ids"], skip_special_tokens=True) == "so"
    assert tokenizer("nonsense")["input_ids"] == [tokenizer.unk_token_id]


def test_longest_traces_fit_the_recommended_budget(family):
    rng = random.Random(1)
    longest = 0
    for _ in range(5000):
        longest = max(longest, len(family.sample_trace(family.sample_problem(rng), rng).words))
    assert 0.6 * family.settings.max_new_tokens < longest <= family.settings.max_new_tokens


def test_settings_are_words_of_the_family(family, tokenizer):
    template = tokenizer(family.settings.answer_template)["input_ids"]
    assert tokenizer.unk_token_id not in template
    assert len(tokenizer(family.settings.step_boundary)["input_ids"]) == 1


def test_math_verify_reads_the_answers(family):
    rng = random.Random(2)
    for _ in range(60):
        problem = family.sample_problem(rng)
        gold = family.answer(problem)
        wrong = str((int(gold) + rng.randrange(1, family.modulus)) % family.modulus)
        stated = parse(" ".join(family.solution(problem)))
        assert verify(parse(gold), stated)
        assert not verify(parse(wrong), stated)
