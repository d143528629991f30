"""The judge, and every process that is started here, executes nothing of the working directory."""

import json
import multiprocessing
import os
import subprocess
import sys

import pytest

from latentrevise.verify.processes import safe_path
from latentrevise.verify.verifier import Verifier, worker_command

NAMES = (
    "numbers",
    "random",
    "tokenize",
    "string",
    "sympy",
    "math_verify",
    "mpmath",
    "json",
    "sitecustomize",
    "ast",
    "selectors",
)
PLANTED = "open({mark!r}, 'a').write({name!r} + '\\n')\nprint('{{\"ready\": false}}')\nraise SystemExit('planted')\n"


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A working directory with files named like libraries', and one like ours; each leaves a mark when it runs."""
    mark = tmp_path / "mark"
    place = tmp_path / "work"
    place.mkdir()
    for name in NAMES:
        (place / f"{name}.py").write_text(PLANTED.format(mark=str(mark), name=name))
    (place / "latentrevise" / "verify").mkdir(parents=True)
    (place / "latentrevise" / "__init__.py").write_text(PLANTED.format(mark=str(mark), name="latentrevise"))
    monkeypatch.chdir(place)
    return mark


def test_the_judge_runs_nothing_of_the_working_directory(trap):
    with Verifier(timeout=60, workers=1) as it:
        found = it.verify([(r"\frac12", r"\boxed{\sin 30^\circ}"), (r"x+1", r"\boxed{1+x}"), ("x", r"\boxed{x^2}")])
    assert [j.verdict for j in found] == ["correct", "correct", "wrong"]
    assert not trap.exists()


def test_nor_where_the_environment_or_the_caller_puts_it_on_the_path(trap, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    monkeypatch.setenv("PYTHONSTARTUP", os.path.join(os.getcwd(), "random.py"))
    monkeypatch.syspath_prepend(os.getcwd())
    with Verifier(timeout=60, workers=1) as it:
        assert it.verify([("x+1", r"\boxed{1+x}")])[0].verdict == "correct"
    assert not trap.exists()


def test_the_trap_works(trap):
    done = subprocess.run([sys.executable, "-c", "import random"], capture_output=True, check=False)
    assert done.returncode != 0
    assert "random" in trap.read_text()


def test_what_is_printed_is_no_reply():
    noisy = "import sys; print('{\"correct\": true}', flush=True); from latentrevise.verify.judge import main; main()"
    with Verifier(timeout=60, workers=1, command=(sys.executable, "-c", noisy)) as it:
        assert it.verify([("x+1", r"\boxed{x+2}")])[0].verdict == "wrong"


def test_the_command_is_isolated():
    command = worker_command()
    assert command[:2] == [sys.executable, "-I"]
    assert all(os.path.isabs(path) for path in json.loads(command[-1]))


def _meet(queue):
    queue.put(os.environ.get("PYTHONSAFEPATH"))


def test_spawned_processes_come_up_without_it_too(trap):
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    bare = context.Process(target=_meet, args=(queue,))
    bare.start()
    bare.join()
    assert "selectors" in trap.read_text()  # what safe_path is for
    trap.unlink()
    with safe_path():
        child = context.Process(target=_meet, args=(queue,))
        child.start()
    child.join()
    assert child.exitcode == 0
    assert queue.get() == "1"
    assert not trap.exists()
    assert "PYTHONSAFEPATH" not in os.environ
