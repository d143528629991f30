"""The command line in processes of its own, forked from one that has imported torch: where only the process matters,
and not its start, which takes longer than what it does here."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from tqdm import tqdm

from benchmarks import chaos
from latentrevise import cli


def enter(words: list[str], told: str) -> None:
    """In the child: ``latentrevise WORDS``, with what it prints in files of the folder ``told``."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        with open(Path(told, name), "wb") as file:
            os.dup2(file.fileno(), number)
    tqdm.set_lock(threading.RLock())  # as in chaos.work: a killed process would keep the shared one for ever
    sys.argv = ["latentrevise", *words]
    cli.main()


def begin(*words: object, told: str) -> ForkServerProcess:
    """Begin a command; the process's exit code is the command's."""
    with chaos.warm() as context:
        process = context.Process(target=enter, args=([str(word) for word in words], told))
        process.start()
    return process


def command(*words: object) -> subprocess.CompletedProcess[str]:
    """A command to its end."""
    with tempfile.TemporaryDirectory() as told:
        process = begin(*words, told=told)
        process.join()
        printed = (Path(told, name).read_text() for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess(words, process.exitcode, *printed)
