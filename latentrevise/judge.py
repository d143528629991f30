"""The verifier's worker process: one JSON object a line in, one out. Run as ``python -m latentrevise.judge``.

It is a plain child process, not a ``multiprocessing`` one, so that it can be killed at any moment without harm, never imports the
caller's ``__main__``, and never forks a process that has threads. math-verify's own timeouts need signals of the main thread
and cannot stop every expression, so they are off: the parent kills instead.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import Any


def judge(task: dict[str, Any]) -> dict[str, Any]:
    """``{"gold"}``: can it be parsed? ``{"gold", "answer"}`` or ``{"gold", "text"}``: does the answer equal the gold one?"""
    from math_verify import parse, verify

    gold = parse(rf"\boxed{{{task['gold']}}}", parsing_timeout=None)
    if "answer" not in task and "text" not in task:
        return {"parsed": bool(gold)}
    # An answer is boxed text; a text without a box is searched for anything that looks like an answer.
    given = rf"\boxed{{{task['answer']}}}" if "answer" in task else task["text"]
    found = parse(given, parsing_timeout=None)
    # The order matters: `verify` is not symmetric, the gold answer comes first.
    return {
        "correct": verify(gold, found, strict=True, timeout_seconds=None),
        "extracted": str(found[-1]) if found else None,
    }


def main() -> None:
    logging.disable(logging.CRITICAL)  # math-verify warns of the missing timeouts at every call
    import math_verify  # noqa: F401  (imported now, so that no task's time includes it)

    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        try:
            reply = judge(json.loads(line))
        except Exception as error:  # whatever an expression provokes is that expression's verdict, not the worker's end
            reply = {"error": f"{type(error).__name__}: {error}"[:200]}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
