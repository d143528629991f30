"""Starting processes of our own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def safe_path() -> Iterator[None]:
    """Python processes that are started within import nothing from the working directory as they come up: a user's
    ``random.py`` there is none of theirs. (``multiprocessing`` hands its children the parent's own path afterwards.)"""
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = before
