"""Verdicts, and workers that are killed when an expression takes too long."""

import subprocess
import sys
import threading
import time

import pytest

from latentrevise.errors import ConfigError, RunError
from latentrevise.verify import Verifier, last_boxed

SLOW = (
    sys.executable,
    "-c",
    """
import json, sys, time
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    task = json.loads(line)
    if task.get("answer") == "sleep":
        time.sleep(60)
    if task.get("answer") == "die":
        sys.exit(3)
    print(json.dumps({"correct": task.get("answer") == "yes", "extracted": None}), flush=True)
""",
)


@pytest.fixture(scope="module")
def verifier():
    with Verifier(timeout=20, workers=1) as it:
        yield it


@pytest.mark.parametrize(
    ("gold", "completion", "verdict", "extracted"),
    [
        ("952", "so \\boxed{ 952 }", "correct", "952"),
        ("952", "so \\boxed{ 951 }", "wrong", "951"),
        ("952", "\\boxed{1} wait \\boxed{952}", "correct", "952"),
        ("1,234.50", "\\boxed{1234.5}", "correct", "1234.5"),
        ("952", "the answer is 952", "wrong", None),
        ("952", "\\boxed{952", "wrong", None),
        ("952", "\\boxed{}", "wrong", ""),
    ],
)
def test_texts_and_numbers_need_no_worker(gold, completion, verdict, extracted):
    with Verifier(command=["/nonexistent"]) as it:
        (found,) = it.verify([(gold, completion)])
    assert (found.verdict, found.extracted) == (verdict, extracted)


@pytest.mark.parametrize(
    ("gold", "completion", "verdict"),
    [
        ("\\frac{1}{2}", "\\boxed{0.5}", "correct"),
        ("\\frac{1}{2}", "\\boxed{\\dfrac{2}{4}}", "correct"),
        ("\\{1,2\\}", "\\boxed{\\{2,1\\}}", "correct"),
        ("x+1", "\\boxed{1+x}", "correct"),
        ("x+1", "\\boxed{x+2}", "wrong"),
        ("3", "\\boxed{\\sqrt{9}}", "correct"),
        ("3", "\\boxed{\\text{none}}", "wrong"),
    ],
)
def test_mathematics_goes_to_math_verify(verifier, gold, completion, verdict):
    (found,) = verifier.verify([(gold, completion)])
    assert found.verdict == verdict


def test_answers_without_a_box_only_on_request():
    with Verifier(anchorless=True, workers=1, timeout=20) as it:
        (found,) = it.verify([("7", "The final answer is $7$. I hope it is correct.")])
    assert (found.verdict, found.extracted) == ("correct", "7")


def test_a_slow_expression_is_unknown_and_its_worker_replaced():
    with Verifier(timeout=0.4, workers=1, command=SLOW) as it:
        pairs = [("g", "\\boxed{sleep}"), ("g", "\\boxed{yes}"), ("g", "\\boxed{no}"), ("g", "\\boxed{die}"), ("h", "\\boxed{yes}")]
        assert [j.verdict for j in it.verify(pairs)] == ["unknown", "correct", "wrong", "unknown", "correct"]


def test_a_hundred_poisonous_rows_do_not_starve_the_rest():
    with Verifier(timeout=0.05, workers=2, command=SLOW) as it:
        pairs = [(f"g{i}", "\\boxed{sleep}") for i in range(100)] + [("g", "\\boxed{yes}")]
        began = time.monotonic()
        found = it.verify(pairs)
        assert [j.verdict for j in found] == ["unknown"] * 100 + ["correct"]
        assert time.monotonic() - began < 60


def test_equal_questions_are_asked_once():
    with Verifier(timeout=0.3, workers=1, command=SLOW) as it:
        began = time.monotonic()
        assert {j.verdict for j in it.verify([("g", "\\boxed{sleep}")] * 500)} == {"unknown"}
        assert time.monotonic() - began < 10


def test_from_a_thread_and_again_after_closing():
    it = Verifier(timeout=5, workers=1, command=SLOW)
    results = []
    thread = threading.Thread(target=lambda: results.append(it.verify([("g", "\\boxed{yes}")])[0].verdict))
    thread.start()
    thread.join()
    it.close()
    assert results == ["correct"]
    assert it.verify([("g2", "\\boxed{no}")])[0].verdict == "wrong"
    it.close()


def test_closing_leaves_no_process():
    with Verifier(timeout=5, workers=2, command=SLOW) as it:
        it.verify([("a", "\\boxed{yes}"), ("b", "\\boxed{yes}"), ("c", "\\boxed{no}")])
        found = subprocess.run(["pgrep", "-fc", "task.get"], capture_output=True, text=True).stdout
        assert int(found) >= 1
    assert int(subprocess.run(["pgrep", "-fc", "task.get"], capture_output=True, text=True).stdout) == 0


def test_a_worker_that_does_not_start_is_named():
    with Verifier(workers=1, command=[sys.executable, "-c", "1"]) as it, pytest.raises(RunError, match="did not start"):
        it.verify([("x", "\\boxed{y}")])


def test_golds(verifier):
    troubles = verifier.check_golds(["12", "\\frac{1}{3}", "", "x^"])
    assert troubles[0] is None
    assert troubles[1] is None
    assert "no mathematical answer" in troubles[2]


def test_the_worker_imports_no_torch():
    code = "import sys, latentrevise.judge, math_verify; print('torch' in sys.modules, 'transformers' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.split() == ["False", "False"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("\\boxed{a{b}c}", "a{b}c"), ("\\boxed{1} \\boxed{2", "1"), ("none", None), ("\\boxed{ x }", "x")],
)
def test_last_boxed(text, expected):
    assert last_boxed(text) == expected


def test_bad_timeout():
    with pytest.raises(ConfigError, match="positive"):
        Verifier(timeout=0)
