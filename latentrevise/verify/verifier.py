"""Verdicts: does a completion give the gold answer? ``correct``, ``wrong``, or ``unknown``: not decided in time.

Most pairs are settled here, by comparing texts and plain numbers. The rest goes to math-verify in worker processes that
are killed and replaced when an expression takes too long: such a verdict is ``unknown``, never ``wrong``.
"""

from __future__ import annotations

import json
import os
import queue
import re
import selectors
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from types import TracebackType
from typing import Any

from latentrevise.data.records import VerdictName
from latentrevise.errors import ConfigError, RunError

_NUMBER = re.compile(r"[+-]?(\d+(,\d{3})*|\d*)(\.\d+)?")
_TIMEOUT = {"error": "timeout"}
_REMEMBERED = 1 << 16  # replies that are kept: a training asks about new completions for ever
_START_SECONDS = 120.0  # a worker imports sympy first; on a busy machine that takes its time


@dataclass(frozen=True)
class Judgement:
    """``extracted``: the answer found in the completion, None without one."""

    verdict: VerdictName
    extracted: str | None


class Verifier:
    """Judges completions; use it as a context manager, or call ``close``.

    timeout: seconds for one pair. workers: processes; by default one for every two cores. anchorless: look for an
    answer in completions without a ``\\boxed{}``; otherwise they are wrong, with nothing extracted.
    command: how to start a worker. Processes start when the first pair needs one. Safe to call from several threads.
    """

    def __init__(
        self,
        timeout: float = 5.0,
        workers: int | None = None,
        anchorless: bool = False,
        command: Sequence[str] = (sys.executable, "-m", "latentrevise.verify.judge"),
    ) -> None:
        if timeout <= 0:
            raise ConfigError(f"verifier timeout = {timeout!r}: it must be a positive number of seconds")
        self.timeout = timeout
        self.anchorless = anchorless
        self._command = list(command)
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
        settled: list[Judgement | None] = []
        tasks: dict[int, dict[str, Any]] = {}
        for i, (gold, completion) in enumerate(pairs):
            answer = last_boxed(completion)
            if answer is None:
                settled.append(None if self.anchorless else Judgement("wrong", None))
                if self.anchorless:
                    tasks[i] = {"gold": gold, "text": completion}
                continue
            quick = _compare(gold, answer)
            settled.append(None if quick is None else Judgement("correct" if quick else "wrong", answer))
            if quick is None:
                tasks[i] = {"gold": gold, "answer": answer}
        replies = self._ask(list(tasks.values()))
        for (i, task), reply in zip(tasks.items(), replies, strict=True):
            extracted = task.get("answer") or reply.get("extracted")
            verdict: VerdictName = "unknown"
            if "correct" in reply:
                verdict = "correct" if reply["correct"] else "wrong"
            settled[i] = Judgement(verdict, extracted)
        return [judgement for judgement in settled if judgement is not None]

    def check_golds(self, answers: Sequence[str]) -> list[str | None]:
        """Why each gold answer cannot be compared with anything, or None where it can."""
        asked = [i for i, answer in enumerate(answers) if _number(answer) is None]
        troubles: list[str | None] = [None] * len(answers)
        for i, reply in zip(asked, self._ask([{"gold": answers[i]} for i in asked]), strict=True):
            if "parsed" not in reply:
                troubles[i] = f"it can't be parsed in {self.timeout:g} s ({reply.get('error', 'timeout')}); simplify it"
            elif not reply["parsed"]:
                troubles[i] = "math-verify finds no mathematical answer in it; give the bare result"
        return troubles

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
        # One thread: sympy needs no more, and the workers share the machine with the model.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, close_fds=True
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self._buffer = b""
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._stdout, selectors.EVENT_READ)
        if self._read(_START_SECONDS) != {"ready": True}:
            self.kill()
            raise RunError(
                f"the verifier's worker did not start ({' '.join(command)}); run that command by hand to see why"
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
        for pipe in (self._stdin, self._stdout):
            with suppress(BrokenPipeError):  # a question that a dead process never read
                pipe.close()

    def _read(self, timeout: float) -> dict[str, Any] | None:
        while b"\n" not in self._buffer:
            if not self._selector.select(timeout):
                return None
            data = os.read(self._stdout.fileno(), 1 << 16)
            if not data:
                return None
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        return json.loads(line)


def last_boxed(text: str) -> str | None:
    """The content of the last complete ``\\boxed{...}``, braces balanced; None without one."""
    opening = "\\boxed{"
    end = len(text)
    while (start := text.rfind(opening, 0, end)) >= 0:
        depth = 0
        for i in range(start + len(opening) - 1, len(text)):
            depth += (text[i] == "{") - (text[i] == "}")
            if depth == 0:
                return text[start + len(opening) : i].strip()
        end = start
    return None


def _compare(gold: str, answer: str) -> bool | None:
    """Equal or not, where texts or plain numbers settle it; None where only mathematics can."""
    if not answer:
        return False
    if " ".join(gold.split()) == " ".join(answer.split()):
        return True
    # Numbers side by side are a list: read as LaTeX they were a product, and "3 0" the same as "5 0".
    a, b = [_number(part) for part in gold.split()], [_number(part) for part in answer.split()]
    return None if None in a or None in b or len(a) != len(b) else a == b


def _number(text: str) -> Decimal | None:
    """A plain decimal number such as -1,234.50; None for anything else."""
    text = text.strip()
    if not text or not _NUMBER.fullmatch(text):
        return None
    try:
        return Decimal(text.replace(",", ""))
    except InvalidOperation:
        return None
