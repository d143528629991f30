"""Hostile prompt rows and pathological expressions: each is read, or refused with a reason; none ends the process."""

from decimal import Decimal

import pytest

from benchmarks import fuzz, hostile_expressions
from latentrevise.data.golds import unwrap
from latentrevise.data.prompts import load_prompts
from latentrevise.errors import InputError
from latentrevise.verify.patterns import last_boxed
from latentrevise.verify.plainforms import words
from latentrevise.verify.text import closing
from latentrevise.verify.verifier import Verifier

GOOD = '{"prompt": "1+1=", "answer": "2"}'


@pytest.fixture(scope="module")
def verifier():
    with Verifier(1.0, 1) as found:
        yield found


def test_hostile_rows_are_read_or_refused_with_a_reason(tmp_path, verifier):
    tally = fuzz.Fuzz(fuzz.tokenizer(), verifier, tmp_path).run(12, 0)
    assert sum(tally.rows.values()) > 300
    assert len(tally.outcomes) > 15, "most kinds should have been drawn"
    assert tally.outcomes["good"]["read"] > 0


def loaded(source, verifier):
    return load_prompts(source, tokenizer=fuzz.tokenizer(), verifier=verifier)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": "1", "answer": ' + b"1" * 5000 + b"}", "huge-number"),
        (b'{"prompt": "1", "answer": ' + b"[" * 20000 + b"]" * 20000 + b"}", "too-deep"),
        (b'{"prompt": "1", "answer": ' + b"[" * 200 + b"]" * 200 + b"}", "too-deep"),
        (b'{"prompt": "\xff", "answer": "1"}', "bad-text"),
        (b"\x00", "bad-json"),
        (b"[1]", "not-a-row"),
    ],
    ids=["integer", "unreadable", "nested", "bytes", "broken", "list"],
)
def test_a_bad_line_of_jsonl_is_left_out_and_the_rest_goes_on(tmp_path, verifier, line, reason):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD.encode() + b"\n" + line + b"\n" + GOOD.replace("1+1", "2-0").encode())
    prompts, errors = loaded(path, verifier)
    assert [prompt.text for prompt in prompts] == ["1+1=", "2-0="]
    assert [(error.row, error.reason) for error in errors] == [(2, reason)]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (10**5000, "huge-number"),
        (Decimal("sNaN"), "missing-answer"),
        (b"7", "bad-text"),
        ("{[]: 1}", "unparsable-answer"),
        ("\\boxed{" * 3000 + "1" + "}" * 3000, "unparsable-answer"),
    ],
    ids=["integer", "decimal", "bytes", "set", "boxes"],
)
def test_a_bad_answer_is_refused(verifier, answer, reason):
    (error,) = loaded([{"prompt": "1+1=", "answer": answer}], verifier)[1]
    assert error.reason == reason
    assert len(error.message) < 400


def test_a_row_that_holds_itself_is_refused(verifier):
    row = {"prompt": "1+1=", "answer": "2"}
    row["more"] = [row]
    assert loaded([row], verifier)[1][0].reason == "too-deep"


@pytest.mark.parametrize("answer", ["{[1,2]}", "{{1,2}}"])
def test_a_gold_that_python_reads_as_a_set_of_lists_is_text(verifier, answer):
    (prompt,), errors = loaded([{"prompt": "1+1=", "answer": answer}], verifier)
    assert (prompt.answer, errors) == (answer, [])


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("rows.json", b"[" * 100000),
        ("rows.json", b'[{"prompt": "1", "answer": ' + b"1" * 5000 + b"}]"),
        ("rows.jsonl", GOOD.encode("utf-16")),
        ("rows.csv", b"prompt,answer,answer\n1,2,3\n"),
    ],
    ids=["nested", "integer", "utf-16", "columns"],
)
def test_a_file_that_cannot_be_read_is_named_with_a_remedy(tmp_path, verifier, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=rf"{name}.*;"):
        loaded(tmp_path / name, verifier)


# Each of these took longer than anyone waits; the suite's time limit is what tells.


def test_long_words_and_nested_boxes_take_no_time():
    for unit in ("7", "a ", "aa' ", "a'", "1 cm ", "1 1/2 "):
        assert words(unit * 100 + "\\pi") is None
    assert words("Plan B, Smith's 2nd").key == ("plan", "B,", "smith's", "2nd")
    nested = "\\boxed{" * 2000 + "1" + "}" * 2000
    assert last_boxed(nested) == nested[len("\\boxed{") : -1]
    assert unwrap("\\boxed{" * 9 + "1" + "}" * 9) == "1"


def test_known_pairs_of_braces_are_skipped():
    text = r"{a\}{b{c}}\\}"
    pairs = {i: closing(text, i) for i, c in enumerate(text) if c == "{"}
    assert pairs == {0: len(text) - 1, 4: 9, 6: 8}
    assert closing(text, 0, {4: 9}) == len(text) - 1
    assert closing(text[:-1], 0) is None


@pytest.mark.slow
def test_pathological_expressions_leave_the_verdicts_of_good_ones_as_they_are():
    found = hostile_expressions.expressions(
        len(hostile_expressions.PATHOLOGICAL), 30, timeout=1.0, workers=1
    )  # raises for a wrong verdict
    assert found["false_positives"] == {}
    assert sum(sum(count.values()) for count in found["verdicts"].values()) == len(hostile_expressions.PATHOLOGICAL)
