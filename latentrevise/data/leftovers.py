"""Temporary files that a killed process left behind."""

from __future__ import annotations

import fcntl
import os
import re
import time
from contextlib import suppress
from pathlib import Path

_TEMPORARY = re.compile(r"\..+\.(\d+)-[0-9a-f]{8}\.tmp")
_UNLOCKED_SECONDS = 60.0  # far more than it takes from making a file to locking it


def sweep(folder: str | os.PathLike[str], *, below: bool = False) -> None:
    """Remove the temporary files of ``atomic_write`` in ``folder``, and ``below`` it, that no living process owns.

    Its lock says whether a file is owned, also by a process of another machine. A young file of a living process may
    not be locked yet; an old one is a leftover of another process that had its number.
    """
    for path in Path(folder).glob("**/.*.tmp" if below else ".*.tmp"):
        found = _TEMPORARY.fullmatch(path.name)
        if found is None:
            continue
        with suppress(OSError), path.open("rb") as file:  # gone meanwhile, or locked
            if _alive(int(found[1])) and time.time() - os.fstat(file.fileno()).st_mtime < _UNLOCKED_SECONDS:
                continue
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
