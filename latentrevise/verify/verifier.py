"""Verdicts: does a completion give the gold answer? ``correct``, ``wrong``, or ``unknown``: not decided in time.

Most pairs are settled here: both answers are read as forms (``forms``), or as nothing but text, and compared
(``compare``). Expressions are computed in worker processes (``judge``) that are killed and replaced when one takes too
long: such a verdict is ``unknown``, never ``wrong``.
"""

from __future__ import annotations

import json
import math
import os
import queue
import selectors
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NoReturn

from latentrevise.errors import ConfigError, RunError
from latentrevise.verify.compare import equal, same_numbers
from latentrevise.verify.forms import expressions
from latentrevise.verify.patterns import BOXED, AnswerPattern, last_boxed
from latentrevise.verify.plainforms import Number
from latentrevise.verify.reading import read
from latentrevise.verify.text import plain

__all__ = ["Judgement", "VerdictName", "Verifier", "last_boxed", "worker_command"]

VerdictName = Literal["correct", "wrong", "unknown"]

_CHANNEL = "LATENTREVISE_JUDGE_CHANNEL"
_TIMEOUT = {"error": "timeout"}
_REMEMBERED = 1 << 16  # replies that are kept: a training asks about new completions for ever
_START_SECONDS = 120.0  # a worker imports sympy first; on a busy machine that takes its time
_LONGEST_TIMEOUT = 86400.0  # seconds


@dataclass(frozen=True)
class Judgement:
    """``extracted``: the answer found in the completion, None without one. unparsed: it, or the gold answer, is not
    understood, so that only the same text would have been correct."""

    verdict: VerdictName
    extracted: str | None
    unparsed: bool = False


class Verifier:
    """Judges completions; use it as a context manager, or call ``close``.

    timeout: seconds for one pair. workers: processes; by default one for every two cores. answer_pattern: where a
    completion says its answer, see ``AnswerPattern``; without one it is wrong, with nothing extracted.
    command: how to start a worker; by default isolated from the working directory. Processes start when the first pair
    needs one. Safe to call from several threads.
    """

    def __init__(
        self,
        timeout: float = 5.0,
        workers: int | None = None,
        answer_pattern: str = BOXED,
        command: Sequence[str] | None = None,
    ) -> None:
        check_timeout("verifier timeout", timeout)
        if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 1):
            raise ConfigError(f"verifier workers = {workers!r}: it must be a whole number, at least 1, or None")
        self.timeout = float(timeout)
        self.pattern = AnswerPattern(answer_pattern)
        self._command = list(worker_command() if command is None else command)
        self._count = workers or max(1, (os.cpu_count() or 2) // 2)
        self._idle: queue.SimpleQueue[_Worker | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._known: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the workers. The verifier can be used again; it then starts new ones."""
        with self._lock:
            pool, self._pool = self._pool, None
            if pool is None:
                return
            pool.shutdown(wait=True)
            for _ in range(self._count):
                worker = self._idle.get()
                if worker is not None:
                    worker.kill()

    def verify(self, pairs: Sequence[tuple[str, str]]) -> list[Judgement]:
        """One judgement for each ``(gold answer, completion)``, in order. Equal questions are asked once."""
        found = [self.pattern.find(completion) for _, completion in pairs]
        return self.compare([(gold, at.answer if at else None) for (gold, _), at in zip(pairs, found, strict=True)])

    def compare(self, pairs: Sequence[tuple[str, str | None]]) -> list[Judgement]:
        """One judgement for each ``(gold answer, answer)``, in order; an answer of None is wrong."""
        settled = [_settled(gold, answer) for gold, answer in pairs]
        tasks = {
            i: {"gold": gold, "answer": answer}
            for i, ((gold, answer), known) in enumerate(zip(pairs, settled, strict=True))
            if known is None
        }
        for (i, task), reply in zip(tasks.items(), self._ask(list(tasks.values())), strict=True):
            verdict: VerdictName = "unknown"
            if "correct" in reply or "unparsed" in reply:
                verdict = "correct" if reply.get("correct") else "wrong"
            settled[i] = Judgement(verdict, task["answer"], "unparsed" in reply)
        return [judgement for judgement in settled if judgement is not None]

    def check_golds(self, answers: Sequence[str]) -> list[str | None]:
        """Why each gold answer cannot be compared with anything but its own text, or None where it can."""
        asked = [i for i, answer in enumerate(answers) if read(answer) is not None]
        troubles: list[str | None] = ["no answer is understood in it; give the bare result"] * len(answers)
        for i, reply in zip(asked, self._ask_golds([answers[i] for i in asked]), strict=True):
            if "parsed" not in reply:
                troubles[i] = f"it can't be parsed in {self.timeout:g} s ({reply.get('error', 'timeout')}); simplify it"
            elif reply["parsed"]:
                troubles[i] = None
        return troubles

    def _ask_golds(self, answers: Sequence[str]) -> list[dict[str, Any]]:
        """Only expressions need a worker."""
        replies: list[dict[str, Any]] = [{"parsed": True}] * len(answers)
        asked = [i for i, answer in enumerate(answers) if _has_expression(read(answer))]
        for i, reply in zip(asked, self._ask([{"gold": answers[i]} for i in asked]), strict=True):
            replies[i] = reply
        return replies

    def _ask(self, tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
        lines = [json.dumps(task, sort_keys=True) for task in tasks]
        replies = {line: self._known[line] for line in lines if line in self._known}
        new = [line for line in dict.fromkeys(lines) if line not in replies]
        if new:
            replies |= zip(new, self._workers().map(self._ask_one, new), strict=True)
            if len(self._known) > _REMEMBERED:
                self._known.clear()
            # What was not decided in time may be another time.
            self._known |= {line: reply for line in new if (reply := replies[line]) != _TIMEOUT}
        return [replies[line] for line in lines]

    def _workers(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None:
                for _ in range(self._count):
                    self._idle.put(None)  # a place for a process that is not started yet
                self._pool = ThreadPoolExecutor(self._count, thread_name_prefix="verifier")
            return self._pool

    def _ask_one(self, line: str) -> dict[str, Any]:
        worker = self._idle.get()
        try:
            if worker is None:
                worker = _Worker(self._command)
            reply = worker.ask(line, self.timeout)
            if reply is None:
                worker.kill()
                worker = None
                return _TIMEOUT
            return reply
        finally:
            self._idle.put(worker)


class _Worker:
    """A child process that answers one line at a time."""

    def __init__(self, command: list[str]) -> None:
        self._replies, channel = os.pipe()
        # One thread: sympy needs no more, and the workers share the machine with the model.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", _CHANNEL: str(channel)}
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                env=environment,
                close_fds=True,
                pass_fds=(channel,),
                cwd=os.path.abspath(os.sep),
            )
        except OSError as error:
            os.close(self._replies)
            raise RunError(
                f"the verifier's worker can't be started ({error}); its command is {' '.join(command)}"
            ) from error
        finally:
            os.close(channel)
        assert self._process.stdin is not None
        self._stdin = self._process.stdin
        self._buffer = b""
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._replies, selectors.EVENT_READ)
        if self._read(_START_SECONDS) != {"ready": True}:
            self.kill()
            raise RunError(
                f"the verifier's worker did not start ({' '.join(command)}); what it wrote to standard error says why"
            )

    def ask(self, line: str, timeout: float) -> dict[str, Any] | None:
        """The reply, or None if there is none within ``timeout`` seconds or the process died."""
        try:
            self._stdin.write(line.encode() + b"\n")
            self._stdin.flush()
        except OSError:
            return None
        return self._read(timeout)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._selector.close()
        os.close(self._replies)
        with suppress(BrokenPipeError):  # a question that a dead process never read
            self._stdin.close()

    def _read(self, timeout: float) -> dict[str, Any] | None:
        while b"\n" not in self._buffer:
            if not self._selector.select(timeout):
                return None
            data = os.read(self._replies, 1 << 16)
            if not data:
                return None
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        return json.loads(line)


def worker_command() -> list[str]:
    """Starts a judge to which the working directory and the caller's script mean nothing.

    ``-I`` leaves them, and the environment's paths, out. What holds this package and the installed ones stands last, so
    that a file beside the package shadows no module.
    """
    root = str(Path(__file__).resolve().parents[2])
    installed = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    start = (
        "import json, sys; sys.path += [p for p in json.loads(sys.argv[1]) if p not in sys.path];"
        " from latentrevise.verify.judge import main; main()"
    )
    return [sys.executable, "-I", "-c", start, json.dumps([*installed, root])]


def check_timeout(name: str, seconds: float) -> None:
    """Raises ConfigError unless it is a number of seconds that can be waited."""
    if not isinstance(seconds, (int, float)) or not 0 < seconds <= _LONGEST_TIMEOUT or not math.isfinite(seconds):
        raise ConfigError(f"{name} = {seconds!r}: it must be a positive number of seconds, at most a day (86400)")


def understood(answer: str | None) -> bool:
    """Whether an answer is one of the forms; none at all is not misunderstood."""
    return not answer or read(answer) is not None


class _Undecided(Exception):
    pass


class _Later:
    """Leaves all mathematics to a worker."""

    def same(self, gold: object, answer: object) -> NoReturn:
        raise _Undecided

    equivalent = same


@lru_cache(maxsize=1 << 14)
def _settled(gold: str, answer: str | None) -> Judgement | None:
    """The judgement where texts and forms settle it; None where expressions have to be computed."""
    if not answer:
        return Judgement("wrong", answer)
    a, b = read(gold), read(answer)
    if isinstance(a, Number) and isinstance(b, Number):
        return Judgement("correct" if same_numbers(a, b) else "wrong", answer)
    unparsed = a is None or b is None
    if " ".join(gold.split()) == " ".join(answer.split()) or plain(gold) == plain(answer):
        return Judgement("correct", answer, unparsed)
    if a is None or b is None:
        return Judgement("wrong", answer, True)
    try:
        return Judgement("correct" if equal(a, b, _Later()) else "wrong", answer)
    except _Undecided:
        return None


def _has_expression(form: object) -> bool:
    return next(expressions(form), None) is not None
