"""Several processes on one run: leases, takeovers, parts that kill, full and read-only disks."""

import fcntl
import json
import os
import resource
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks import chaos
from latentrevise import RecoverConfig
from latentrevise.cli import app
from latentrevise.engines import HFEngine
from latentrevise.errors import ConfigError, InputError, RunError
from latentrevise.recovery.leases import Leases, kernel
from latentrevise.recovery.pipeline import Recovery
from latentrevise.recovery.progress import Progress
from latentrevise.recovery.rundir import RunDirectory
from latentrevise.recovery.schedule import Alone, Joint, terminable
from latentrevise.recovery.stages import Continue, Judge, Mine, Propose
from tests.tiny import tiny_model, tiny_tokenizer

ROWS = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(5)]
FAST = {
    "rollouts": 1, "samples": 2, "max_new_tokens": 4, "strategies": ("latent", "resample"), "equal_compute": False,
    "chunk": 1, "chat": "never",
}  # fmt: skip


def recovery(out, scheduler=None, *, engine=None, **changes):
    config = RecoverConfig(**(FAST | changes))
    return Recovery(tiny_model(), tiny_tokenizer(), config, out, engine=engine, progress=False, scheduler=scheduler)


def joint(out, rows=ROWS, **more):
    run = recovery(out, Joint(0, 1), **more)
    with run.session():
        run.work(rows)
    return run


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "out"
    recovery(out).recover(ROWS)
    return chaos.content(out)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_one_of_them_killed_give_the_rows_of_one(tmp_path):
    expected = chaos.undisturbed(tmp_path / "one", 9)
    assert any(name.startswith("verdicts/latent") for name in expected), "nothing was revised"
    with chaos.warm() as context:
        before = chaos.marked()
        workers, out = chaos.Workers(context, tmp_path / "two", 2, 9), tmp_path / "two"
        until = time.monotonic() + 600
        while not (out / "rollouts" / "part-00000.parquet").exists():
            assert time.monotonic() < until
            assert not workers.wait(0.02)
        assert workers.hit(1, "kills") == "kills"
        assert workers.hit(0, "terminations") == "terminations"
        workers.end()
        assert [workers.hit(0, kind) for kind in chaos.SIGNALS] == ["late"] * 3, "what is done is not struck"
        with pytest.raises(RunError, match="other settings"):
            recovery(out, Joint(0, 2))
        chaos.recovery(out, chaos.settings(), Alone()).recover()
        assert chaos.differences(out, expected, before) == []


# Leases

HOLD = """
import sys, time
from pathlib import Path
from latentrevise.recovery.leases import Leases
with Leases(Path(sys.argv[1]), 60.0).claim("x") as dead:
    print(len(dead), flush=True)
    time.sleep(600)
"""


@contextmanager
def holding(folder):
    """A process that holds the lease ``x``."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() in ("0\n", "1\n")
        yield process
    finally:
        process.kill()
        process.wait()


def claimed(folder, seconds=60.0, name="x"):
    """How many holders died before us; None: it is another's."""
    with Leases(folder, seconds).claim(name) as dead:
        return None if dead is None else len(dead)


def test_a_lease_is_one_processs_and_goes_with_it(tmp_path):
    with holding(tmp_path):
        assert claimed(tmp_path) is None
        assert claimed(tmp_path, name="y") == 0
    (left,) = tmp_path.iterdir()
    with holding(tmp_path):
        assert claimed(tmp_path) is None
        assert {p.name for p in tmp_path.iterdir()} == {"x.0.lease", "x.1.lease"}
    # Its number is a living process's now: ours.
    left.write_text(json.dumps(json.loads(left.read_text()) | {"pid": os.getpid()}) + "\n")
    with Leases(tmp_path, 60.0).claim("x") as dead:
        assert (dead[0].deaths, dead[0].holder["pid"]) == (0, os.getpid())
        assert len(dead) == 2
        assert claimed(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_a_holder_elsewhere_is_dead_when_its_file_stands_still_whatever_clocks_say(tmp_path):
    path = tmp_path / "x.0.lease"
    path.write_text(json.dumps({"kernel": "another", "pid": 1, "host": "elsewhere"}) + "\n")
    leases = Leases(tmp_path, 0.6)
    began = time.monotonic()
    for jump in (0, 10**6, -(10**6), 1):  # any other time is a sign of life
        os.utime(path, (time.time() + jump,) * 2)
        with leases.claim("x") as dead:
            assert dead is None
        time.sleep(0.2)
    while True:
        with leases.claim("x") as dead:
            if dead is not None:
                break
        time.sleep(0.02)
    assert [str(lease) for lease in dead] == ["process 1 on elsewhere"]
    assert time.monotonic() - began >= 0.6 + 0.6, "three looks, then silence"


def test_a_holder_gives_signs_of_life(tmp_path):
    with Leases(tmp_path, 0.3).claim("x"):
        path = tmp_path / "x.0.lease"
        first, until = path.stat().st_mtime_ns, time.monotonic() + 30
        while path.stat().st_mtime_ns == first:
            assert time.monotonic() < until
            time.sleep(0.01)
        path.unlink()  # taken over and finished by another: no error
        time.sleep(0.2)


def test_a_lease_that_is_being_made_or_is_damaged_counts_as_held(tmp_path):
    for text in ("", '{"kernel": "' + kernel(), "{broken\n"):
        (tmp_path / "x.0.lease").write_text(text)
        assert claimed(tmp_path) is None
    (tmp_path / "strange.lease").write_text("")
    Leases(tmp_path, 60.0).sweep()
    assert [p.name for p in tmp_path.iterdir()] == ["strange.lease"]


# Runs


def died(run, name, count):
    """The leases that ``count`` processes of this machine left when they died over a part."""
    run.leases.mkdir(exist_ok=True)
    for i in range(count):
        holder = {"pid": 10**8 + i, "host": "here", "kernel": kernel()}
        (run.leases / f"{name}.{i}.lease").write_text(json.dumps(holder) + "\n")


def test_a_part_that_kills_is_set_aside_and_the_run_goes_on(tmp_path, alone):
    out = tmp_path / "run"
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    with (run := recovery(out, Joint(0, 2))).session():
        run.job.take_prompts(ROWS)
        died(run.run, "mine..00001", 3)
        died(run.run, "mine..00002", 2)
        died(run.run, "continue.resample.00000", 3)
        run.work(ROWS)
    assert sorted(p.name for p in (out / "rollouts").iterdir()) == [f"part-0000{i}.parquet" for i in (0, 2, 3, 4)]
    metrics = recovery(out).recover().metrics
    assert [(n["stage"], n["arm"], n["part"], len(n["prompts"])) for n in metrics["set_aside"]] == [
        ("mine", "", 1, 1),
        ("continue", "resample", 0, 1),
    ]
    assert "process 100000002 on here died over it" in metrics["set_aside"][0]["reasons"]
    assert metrics["prompts"] == 4
    assert metrics["arms"]["latent"]["prompts"] == metrics["zero_hit"]
    assert metrics["arms"]["resample"]["prompts"] == metrics["zero_hit"] - 1
    assert not (out / "leases").exists()
    told = CliRunner().invoke(app, ["collect", "--out", str(out), "--model", str(tmp_path / "model"), "--quiet"])
    assert told.exit_code == 3, told.exception
    assert "set aside: part 1 in mine (1 prompts): process 100000000 on here died over it" in told.output
    # What is mined stays; what came after is done again without the notes.
    for name in ("aside", "starts", "samples", "verdicts", "plan", "targets.parquet"):
        subprocess.run(["rm", "-r", str(out / name)], check=True)
    assert recovery(out).recover().metrics["set_aside"] == []
    found = chaos.content(out)
    assert {name: found[name] for name in alone if name != "trajectories.parquet"} == {
        name: rows for name, rows in alone.items() if name != "trajectories.parquet"
    }


def test_who_works_alone_and_who_works_together_keep_apart(tmp_path):
    first = joint(tmp_path / "run")
    with first.session():
        with pytest.raises(RunError, match=r"another process works on .* --shard"):
            recovery(tmp_path / "run").recover(ROWS)
        joint(tmp_path / "run", deaths=7, lease_seconds=3.0)  # who computes, not what
        with pytest.raises(RunError, match="other settings"):
            joint(tmp_path / "run", samples=3)
        with pytest.raises(RunError, match="other prompts"):
            joint(tmp_path / "run", ROWS[:2])
    with recovery(tmp_path / "run").session(), pytest.raises(RunError, match="another process"):
        joint(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"0/4 to 3/4"):
        Joint(4, 4)
    for wrong in ("1", "a/b", "1/", "-1/2"):
        words = ["recover", "--model", "m", "--prompts", "p", "--out", str(tmp_path / "o"), "--shard", wrong]
        assert "write it as I/N" in str(CliRunner().invoke(app, words).exception)


@pytest.mark.timeout(120)
def test_who_would_wait_for_samples_verifies_those_that_are_there(tmp_path, alone):
    run, verified = recovery(tmp_path / "run", Joint(0, 2), lease_seconds=6.0), tmp_path / "run" / "verdicts"
    with run.session():
        run.mine(ROWS)
        run.revise()
        parts = {path.relative_to(run.run.path / "starts") for path in (run.run.path / "starts").rglob("*.parquet")}
        held = Path("resample/part-00000.parquet")
        with Leases(run.run.leases, 6.0).claim("continue.resample.00000") as dead:  # another is at it
            assert dead == []
            work = threading.Thread(target=run.sample, args=(True,))
            work.start()
            until = time.monotonic() + 60
            while {path.relative_to(verified) for path in verified.rglob("*.parquet")} != parts - {held}:
                assert time.monotonic() < until
                assert work.is_alive()
                time.sleep(0.05)
            assert work.is_alive(), "the samples that it waits for are not there"
        work.join()
        assert not (verified / held).exists(), "nobody waited for it any more"
        run.verify()
    recovery(tmp_path / "run").recover()
    assert chaos.content(tmp_path / "run") == alone


def test_a_part_that_kills_while_it_is_verified_ahead_is_set_aside(tmp_path):
    run = recovery(tmp_path / "run", Joint(0, 2), lease_seconds=6.0)
    with run.session():
        run.mine(ROWS)
        run.revise()
        died(run.run, "verify.latent.00001", 3)
        with Leases(run.run.leases, 6.0).claim("continue.resample.00000"):
            work = threading.Thread(target=run.sample, args=(True,))
            work.start()
            until = time.monotonic() + 60
            while not run.run.aside("verdicts", 1, "latent").exists():
                assert time.monotonic() < until
                time.sleep(0.05)
        work.join()
        run.verify()
    (note,) = recovery(tmp_path / "run").recover().metrics["set_aside"]
    assert (note["stage"], note["arm"], note["part"]) == ("verify", "latent", 1)


def test_one_process_ends_each_stage_before_the_next_and_sleeps_between_them(tmp_path, monkeypatch):
    done, engine = [], HFEngine(tiny_model(), tiny_tokenizer())
    monkeypatch.setattr(engine, "sleep", lambda: done.append("sleep"))
    for stage in (Mine, Propose, Continue, Judge):
        own = stage.run
        monkeypatch.setattr(stage, "run", lambda self, *a, own=own: (done.append(self.name), own(self, *a)))
    recovery(tmp_path / "run", engine=engine, strategies=("resample",)).recover(ROWS)
    each = [name for name in ("mine", "revise", "continue", "verify") for name in ("sleep", *5 * [name])]
    assert done == each


def test_sigterm_ends_by_an_exception_and_is_as_before_afterwards():
    before, told = signal.getsignal(signal.SIGTERM), []
    with pytest.raises(SystemExit) as ended, terminable(lambda: told.append(1)):
        signal.raise_signal(signal.SIGTERM)
    assert (ended.value.code, told) == (143, [1])
    assert signal.getsignal(signal.SIGTERM) is before


def test_every_process_begins_with_its_own_share():
    orders = [Joint(i, 3)._preferred(range(8)) for i in range(3)]
    assert [order[: len(range(i, 8, 3))] for i, order in enumerate(orders)] == [[0, 3, 6], [1, 4, 7], [2, 5]]
    assert all(sorted(order) == list(range(8)) for order in orders)
    assert orders[0][3] == 7, "of another's share the last, which its owner comes to last"


def test_a_part_that_two_have_done_stays_as_the_first_left_it(tmp_path, alone):
    run = joint(tmp_path / "run")
    before = {p: p.stat().st_mtime_ns for p in run.run.path.rglob("part-*") if p.is_file()}
    from latentrevise.recovery.stages import Continue, Judge, Mine, Part, Propose

    with run.session():
        Mine().run(run.job, Part(0, range(1)), Progress())
        for stage in (Propose(), Continue(), Judge()):
            stage.run(run.job, run.parts(run.arms()[0])[0], Progress())
    assert {p: p.stat().st_mtime_ns for p in run.run.path.rglob("part-*") if p.is_file()} == before
    recovery(tmp_path / "run").recover()
    assert chaos.content(tmp_path / "run") == alone


@contextmanager
def no_space():
    """No file of this process can grow, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_named_and_nothing_done_is_lost(tmp_path, alone, monkeypatch):
    own, full, calls = HFEngine.generate, ExitStack(), []

    def generate(*args, **kwargs):
        found = own(*args, **kwargs)
        calls.append(1)
        if len(calls) == 3:
            full.enter_context(no_space())
        return found

    monkeypatch.setattr(HFEngine, "generate", generate)
    with full, pytest.raises(RunError, match=r"cannot write .*rollouts/part-00002\.parquet: .*has space"):
        joint(tmp_path / "run")
    assert list((tmp_path / "run" / "leases").iterdir()) == [], "it was given back"
    with no_space(), pytest.raises(RunError, match=r"cannot write .*mine\.\.00002\.0\.lease: .*have space"):
        joint(tmp_path / "run")
    assert list((tmp_path / "run" / "leases").iterdir()) == []
    joint(tmp_path / "run")
    recovery(tmp_path / "run").recover()
    assert chaos.content(tmp_path / "run") == alone


@pytest.mark.parametrize("scheduler", [Alone(), Joint(0, 1)])
def test_a_read_only_directory_is_named(scheduler):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        out = Path(folder) / "run"
        run = recovery(out, scheduler)
        out.chmod(stat.S_IRUSR | stat.S_IXUSR | stat.S_IROTH | stat.S_IXOTH)
        user = os.geteuid()
        try:
            if user == 0:
                os.seteuid(65534)  # the superuser writes anywhere
            with pytest.raises(RunError, match=r"run/\.lock cannot be locked \(Permission denied\); .* writable"):
                run.recover(ROWS)
        finally:
            os.seteuid(user)


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(95, "Operation not supported")

    run = RunDirectory(tmp_path)
    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.raises(RunError, match="must have locks"), run.locked(shared=True):
        pass
    monkeypatch.undo()
    with pytest.raises(OSError, match="its own"), run.locked():
        raise OSError("its own")


def test_processes_aim_alike_whatever_one_decides_in_time(tmp_path, monkeypatch):
    first = joint(tmp_path / "run")
    aimed = [case.wrong for case in first.cases()]
    assert any(aimed)
    monkeypatch.setattr("latentrevise.recovery.targets._shuffled", lambda answers, seed: [])  # nothing is decided
    again = recovery(tmp_path / "run")
    assert [case.wrong for case in again.cases()] == aimed
    assert [case.wrong_ids for case in again.cases()] == [case.wrong_ids for case in first.cases()]
    path = tmp_path / "run" / "targets.parquet"
    path.write_bytes(path.read_bytes().replace(aimed[0].encode(), b"77", 1))
    with pytest.raises(InputError, match=r"targets\.parquet: not a readable parquet file .*; restore it, or delete it"):
        recovery(tmp_path / "run").cases()


def test_one_process_at_a_time_and_nothing_is_left(tmp_path):
    run, order = RunDirectory(tmp_path), []

    def enter(name):
        with RunDirectory(tmp_path).once():
            order.append(f"{name} in")
            time.sleep(0.05)
            order.append(f"{name} out")

    threads = [threading.Thread(target=enter, args=(name,)) for name in "abcd"]
    with run.once():
        for thread in threads:
            thread.start()
        time.sleep(0.1)
        assert order == [], "the others wait"
    for thread in threads:
        thread.join()
    assert [a.split()[0] for a in order[::2]] == [b.split()[0] for b in order[1::2]], "no two at once"
    assert [p.name for p in tmp_path.iterdir()] == []
