"""What a kill, Ctrl-C and an unforeseen error leave behind, and what they say."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from latentrevise.data.leftovers import sweep
from latentrevise.data.storage import atomic_write, write_jsonl
from latentrevise.recovery.rundir import RunDirectory
from latentrevise.report import page
from tests.tiny import tiny_model, tiny_tokenizer

ROWS = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(6)]


def python(code, *words):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


HALF = """
    import os, signal, sys, time
    from latentrevise.data.storage import atomic_write
    with atomic_write(sys.argv[1]) as temporary:
        temporary.write_text("half")
        print("half", flush=True)
        os.kill(os.getpid(), signal.SIGKILL) if sys.argv[2] == "die" else time.sleep(60)
"""


def test_only_what_no_living_process_owns_is_swept(tmp_path):
    figures = tmp_path / "report" / "figures"
    python(HALF, figures / "w.png", "die").wait()
    python(HALF, tmp_path / "run.json", "die").wait()
    living = python(HALF, figures / "x.png", "live")
    assert living.stdout.readline() == "half\n"
    strangers = [figures / name for name in (".mine.tmp", "w.png.1-12345678.tmp", ".w.png.1-1234.tmp")]
    for stranger in strangers:
        stranger.write_text("")
    assert len(list(figures.iterdir())) == 5
    with atomic_write(figures / "own.png") as own:
        sweep(tmp_path)
        assert len(list(figures.iterdir())) == 6, "only the folder itself"
        with RunDirectory(tmp_path).locked():
            assert own.exists()
    (kept,) = (p for p in figures.iterdir() if p.name.startswith(".x.png."))
    assert {p.name for p in figures.iterdir()} == {kept.name, "own.png", *(p.name for p in strangers)}
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".tmp"] == []
    # A process of another machine: its number is nobody's here, its lock holds.
    elsewhere = kept.with_name(".x.png.999999999-12345678.tmp")
    kept.rename(elsewhere)
    sweep(figures)
    assert elsewhere.exists()
    living.kill()
    living.wait()
    sweep(figures)
    assert not elsewhere.exists()


def test_a_leftover_under_the_number_of_a_living_process_is_swept_when_it_is_old(tmp_path):
    """In a container the main process has the same number every time."""
    old, young = (tmp_path / f".w.png.{os.getpid()}-{name}.tmp" for name in ("12345678", "87654321"))
    for path in (old, young):
        path.write_text("")
    os.utime(old, (time.time() - 3600,) * 2)
    with atomic_write(tmp_path / "own.png") as own:
        os.utime(own, (time.time() - 3600,) * 2)
        sweep(tmp_path)
        assert own.exists(), "it is locked"
    assert not old.exists()
    assert young.exists(), "its maker may be about to lock it"


def test_a_report_sweeps_its_figures(tmp_path, monkeypatch):
    swept = []
    monkeypatch.setattr(page, "sweep", lambda folder: swept.append(folder))
    monkeypatch.setattr(page.FinishedRun, "open", lambda path: pytest.fail("read too early"))
    with pytest.raises(BaseException, match="read too early"):
        page.write_report([tmp_path], tmp_path / "report")
    assert swept == [tmp_path / "report", tmp_path / "report" / "figures"]


@pytest.fixture
def place(tmp_path):
    tiny_model().save_pretrained(tmp_path / "mm")
    tiny_tokenizer().save_pretrained(tmp_path / "mm")
    write_jsonl(tmp_path / "p.jsonl", ROWS)
    return tmp_path


FAST = ("rollouts=1", "samples=1", "max_new_tokens=4", "strategies=resample", "equal_compute=false", "chunk=2")


def command(place, *, before="", name="recover"):
    words = [name, "--model", place / "mm", "--prompts", place / "p.jsonl", "--out", place / "run", "--quiet"]
    words += [word for setting in FAST for word in ("--set", setting)]
    # A shell's background job ignores Ctrl-C, and so would a process that it starts.
    code = f"""
        import signal, sys
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv[0] = "latentrevise"
        from latentrevise import cli
        {before}
        cli.main()
    """
    return python(code, *words)


SLOW = """
        from latentrevise.engines import HFEngine
        own, count = HFEngine.generate, []
        def generate(*a, **k):
            count.append(1)
            if len(count) > 2: ACTION
            return own(*a, **k)
        HFEngine.generate = generate
"""


def test_ctrl_c_says_that_the_same_command_goes_on(place):
    process = command(place, before=SLOW.replace("ACTION", "import time; time.sleep(60)").strip())
    until = time.monotonic() + 60
    while not (place / "run" / "rollouts" / "part-00001.parquet").exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=300)
    assert process.returncode == 130
    assert told.splitlines()[-1] == "latentrevise: interrupted; the same command goes on from here"
    assert "Traceback" not in told
    again = command(place)
    out, told = again.communicate(timeout=300)
    assert again.returncode == 0, told
    assert "report" in out


def test_an_unforeseen_error_keeps_its_traceback_and_says_what_is_kept(place):
    process = command(place, before=SLOW.replace("ACTION", "raise KeyError('nobody foresaw this')").strip())
    _, told = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "Traceback (most recent call last)" in told
    assert "KeyError: 'nobody foresaw this'" in told
    assert f"{place / 'run'} keeps its prompts, 2 parts of rollouts; the same command goes on from there." in told
    assert "please report it" in told
    assert told.count("nobody foresaw this') ") == 0
    assert sorted(os.listdir(place / "run" / "rollouts")) == ["part-00000.parquet", "part-00001.parquet"]
