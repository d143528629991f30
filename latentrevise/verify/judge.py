"""The verifier's worker process: one JSON object a line in, one out. Run as ``python -m latentrevise.verify.judge``.

It is a plain child process, not a ``multiprocessing`` one, so that it can be killed at any moment without harm, never
imports the caller's ``__main__``, and never forks a process that has threads. math-verify's own timeouts need signals
of the main thread
and cannot stop every expression, so they are off: the parent kills instead.
"""

from __future__ import annotations

import ctypes
import json
import logging
import signal
import sys
from typing import Any

MEMORY = 4 << 30  # bytes of address space


def judge(task: dict[str, Any]) -> dict[str, Any]:
    """``{"gold"}``: can it be parsed? ``{"gold", "answer"}`` or ``{"gold", "text"}``: does the answer equal the gold
    one?"""
    from math_verify import parse, verify

    gold = parse(rf"\boxed{{{task['gold']}}}", parsing_timeout=None)
    if "answer" not in task and "text" not in task:
        # What cannot be parsed comes back as bare text.
        return {"parsed": any(not isinstance(found, str) for found in gold)}
    # An answer is boxed text; a text without a box is searched for anything that looks like an answer.
    given = rf"\boxed{{{task['answer']}}}" if "answer" in task else task["text"]
    found = parse(given, parsing_timeout=None)
    # The order matters: `verify` is not symmetric, the gold answer comes first.
    return {
        "correct": verify(gold, found, strict=True, timeout_seconds=None),
        "extracted": str(found[-1]) if found else None,
    }


def limit_memory() -> None:
    """An expression that asks for more fails with a MemoryError, and the machine goes on."""
    try:
        import resource
    except ImportError:  # not on every platform; the time limit still holds
        return
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY if most < 0 else min(MEMORY, most), most))


def die_with_the_parent() -> None:
    """A parent that is killed cannot end its workers, and an expression without end would be computed for ever."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def main() -> None:
    die_with_the_parent()
    logging.disable(logging.CRITICAL)  # math-verify warns of the missing timeouts at every call
    import math_verify  # noqa: F401  (imported now, so that no task's time includes it)

    limit_memory()
    replies, sys.stdout = sys.stdout, sys.stderr  # a library that prints must not get between the replies
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in sys.stdin:
        try:
            reply = judge(json.loads(line))
        except Exception as error:  # whatever an expression provokes is that expression's verdict, not the worker's end
            reply = {"error": f"{type(error).__name__}: {error}"[:200]}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
