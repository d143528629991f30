"""Verdicts, and workers that are killed when an expression takes too long."""

import os
import subprocess
import sys
import threading
import time

import pytest

from latentrevise.errors import ConfigError, RunError
from latentrevise.recovery.settings import RecoverConfig
from latentrevise.verify.verifier import Verifier, last_boxed

SLOW = (
    sys.executable,
    "-c",
    """
import json, os, sys, time
replies = os.fdopen(int(os.environ["LATENTREVISE_JUDGE_CHANNEL"]), "w")
if len(sys.argv) > 1:
    open(sys.argv[1], "a").write(f"{os.getpid()}\\n")
print(json.dumps({"ready": True}), file=replies, flush=True)
for line in sys.stdin:
    task = json.loads(line)
    if "60" in task["answer"]:
        time.sleep(60)
    if "3" in task["answer"]:
        sys.exit(3)
    print(json.dumps({"correct": "4" in task["answer"]}), file=replies, flush=True)
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
        ("34 1,071", "\\boxed{34.0 1071}", "correct", "34.0 1071"),
        ("34 71", "\\boxed{ 71 34 }", "wrong", "71 34"),
        ("3 0", "\\boxed{ 5 0 }", "wrong", "5 0"),
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


def test_a_slow_expression_is_unknown_and_its_worker_replaced():
    with Verifier(timeout=0.4, workers=1, command=SLOW) as it:
        pairs = [
            ("g", "\\boxed{\\sqrt{60}}"),
            ("g", "\\boxed{\\sqrt{4}}"),
            ("g", "\\boxed{\\sqrt{5}}"),
            ("g", "\\boxed{\\sqrt{3}}"),
            ("h", "\\boxed{\\sqrt{4}}"),
        ]
        assert [j.verdict for j in it.verify(pairs)] == ["unknown", "correct", "wrong", "unknown", "correct"]


def test_a_hundred_poisonous_rows_do_not_starve_the_rest():
    with Verifier(timeout=0.05, workers=2, command=SLOW) as it:
        pairs = [(f"g_{i}", "\\boxed{\\sqrt{60}}") for i in range(100)] + [("g", "\\boxed{\\sqrt{4}}")]
        began = time.monotonic()
        found = it.verify(pairs)
        assert [j.verdict for j in found] == ["unknown"] * 100 + ["correct"]
        assert time.monotonic() - began < 60


def test_equal_questions_are_asked_once():
    with Verifier(timeout=0.3, workers=1, command=SLOW) as it:
        began = time.monotonic()
        assert {j.verdict for j in it.verify([("g", "\\boxed{\\sqrt{60}}")] * 500)} == {"unknown"}
        assert time.monotonic() - began < 10


def test_what_was_not_decided_in_time_is_asked_again(tmp_path):
    late = """
import json, os, pathlib, sys, time
replies = os.fdopen(int(os.environ["LATENTREVISE_JUDGE_CHANNEL"]), "w")
print(json.dumps({"ready": True}), file=replies, flush=True)
for line in sys.stdin:
    seen = pathlib.Path(sys.argv[1])
    if not seen.exists():
        seen.touch()
        time.sleep(60)
    print(json.dumps({"correct": True}), file=replies, flush=True)
"""
    with Verifier(timeout=0.5, workers=1, command=(sys.executable, "-c", late, str(tmp_path / "seen"))) as it:
        found = [it.verify([("g", "\\boxed{\\sqrt{4}}")])[0].verdict for _ in range(2)]
    assert found == ["unknown", "correct"]


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr("latentrevise.verify.verifier._REMEMBERED", 3)
    with Verifier(timeout=20, workers=1, command=SLOW) as it:
        for k in range(4):
            pairs = [(f"g_{{{k}{i}}}", "\\boxed{\\sqrt{4}}") for i in range(3)]
            assert {j.verdict for j in it.verify(pairs)} == {"correct"}
        assert len(it._known) <= 6


def test_from_a_thread_and_again_after_closing():
    it = Verifier(timeout=5, workers=1, command=SLOW)
    results = []
    thread = threading.Thread(target=lambda: results.append(it.verify([("g", "\\boxed{\\sqrt{4}}")])[0].verdict))
    thread.start()
    thread.join()
    it.close()
    assert results == ["correct"]
    assert it.verify([("g_2", "\\boxed{\\sqrt{5}}")])[0].verdict == "wrong"
    it.close()


def test_closing_leaves_no_process(tmp_path):
    pids = tmp_path / "pids"
    with Verifier(timeout=0.5, workers=2, command=(*SLOW, str(pids))) as it:
        it.verify([("a", "\\boxed{\\sqrt{4}}"), ("b", "\\boxed{\\sqrt{60}}"), ("c", "\\boxed{\\sqrt{5}}")])
        started = [int(line) for line in pids.read_text().split()]
        assert started
    for pid in started:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_worker_that_does_not_start_is_named():
    with Verifier(workers=1, command=[sys.executable, "-c", "1"]) as it, pytest.raises(RunError, match="did not start"):
        it.verify([("x", "\\boxed{y}")])


def test_golds(verifier):
    good = ["12", "\\frac{1}{3}", "$x^2$", "\\text{(B)}", "\\boxed{5}", "[0, 1)"]
    bad = ["", "x^", "\\frac{", "?", "1, 2, \\ldots, n", "f(x"]
    troubles = verifier.check_golds([*good, *bad])
    assert troubles[: len(good)] == [None] * len(good)
    assert all("no answer is understood" in trouble for trouble in troubles[len(good) :])


def test_a_real_expression_without_end_is_unknown():
    with Verifier(timeout=1.5, workers=1) as it:
        began = time.monotonic()
        pairs = [("2", "\\boxed{9^{9^{9^{9}}}}"), ("2", "\\boxed{\\sqrt{4}}")]
        assert [j.verdict for j in it.verify(pairs)] == ["unknown", "correct"]
        assert time.monotonic() - began < 100


def test_the_worker_keeps_within_its_memory():
    code = (
        "import latentrevise.verify.judge as j\n"
        "def judge(task):\n"
        "    print('noise', flush=True)\n"
        "    bytearray(task['answer'].count('x') << 30)\n"
        "    return {'correct': True}\n"
        "j.judge = judge\n"
        "j.main()"
    )
    with Verifier(timeout=20, workers=1, command=(sys.executable, "-c", code)) as it:
        replies = it._ask([{"answer": "x"}, {"answer": "x" * 8}, {"answer": ""}])
    assert replies[0] == replies[2] == {"correct": True}
    assert "MemoryError" in replies[1]["error"]


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc, and prctl is Linux's")
def test_a_killed_parent_leaves_no_worker_behind():
    code = """
import glob, os, threading, time
from latentrevise.recovery.settings import RecoverConfig
from latentrevise.verify.verifier import Verifier
it = Verifier(timeout=600, workers=1)
threading.Thread(target=it.verify, args=([("2", "\\\\boxed{9^{9^{9^{9}}}}")],), daemon=True).start()
while not (found := "".join(open(p).read() for p in glob.glob("/proc/self/task/*/children")).split()):
    time.sleep(0.05)
time.sleep(3)
print(found[0], flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        worker = int(parent.stdout.readline())
        os.kill(worker, 0)
        parent.kill()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and _runs(worker):
        time.sleep(0.05)
    assert not _runs(worker)


def _runs(pid):
    """Not gone, and not a zombie that nobody has reaped yet."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_worker_imports_no_torch():
    code = (
        "import sys, latentrevise.verify.judge, math_verify;"
        " print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.split() == ["False", "False"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\\boxed{a{b}c}", "a{b}c"),
        ("\\boxed{1} \\boxed{2", None),
        ("\\boxed{1} then \\boxed{}", ""),
        ("none", None),
        ("\\boxed{ x }", "x"),
        ("\\boxed {5}", "5"),
        ("\\boxed5.", "5"),
        ("$\\boxed 3$", "3"),
        ("\\fbox{7}", "7"),
        ("put it in \\boxed notation", None),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{\\boxed{5}}", "\\boxed{5}"),
        ("$\\boxed{1}$ and $\\boxed{2}$", "1, 2"),
        ("$x=\\boxed{1}$, $y = \\boxed{2}$", "x=1, y=2"),
        ("\\boxed{1}, no, \\boxed{2}", "2"),
        ("\\boxed{5}. So again \\boxed{5}", "5"),
    ],
)
def test_last_boxed(text, expected):
    assert last_boxed(text) == expected


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan"), float("inf"), 1e12, "5"])
def test_bad_timeout(timeout):
    with pytest.raises(ConfigError, match="positive"):
        Verifier(timeout=timeout)
    with pytest.raises(ConfigError, match="verify_timeout"):
        RecoverConfig(verify_timeout=timeout)


@pytest.mark.parametrize("workers", [0, -1, float("nan"), 1.5, True])
def test_bad_workers(workers):
    with pytest.raises(ConfigError, match="workers"):
        Verifier(workers=workers)
