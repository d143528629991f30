"""Which process is at work on what, among processes that share a folder and nothing else.

A lease is a file that its holder made (O_EXCL), keeps locked and touches every few seconds: ``NAME.0.lease``. Who finds
its holder dead makes ``NAME.1.lease``, and so on: one process alone can make each, so nobody removes what is another's,
and the number says how many holders have died. The holder is taken for dead when

- it ran under this kernel and its lock is free: at once, and whoever has its process number now;
- or the file's time, whatever it says, has stood still for ``seconds`` of the observer's own monotonic clock. No two
  clocks are compared, so none that jumps, here or elsewhere, makes a holder look dead or alive.

A holder that was only stopped may go on later. So a lease saves work and protects nothing: what is done under it must
come to the same when it is done twice.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentrevise.errors import RunError

log = logging.getLogger(__name__)
BEATS = 6  # touches in the time after which silence means death


@dataclass(frozen=True)
class Held:
    """A lease as it stands on disk. holder: what it says of itself; empty while it is being made."""

    path: Path
    name: str
    deaths: int
    holder: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Held | None:
        """None: it was given back meanwhile, or it is no lease."""
        name, _, number = path.name.removesuffix(".lease").rpartition(".")
        if not path.name.endswith(".lease") or not number.isdecimal():
            return None
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        try:
            holder = json.loads(text) if text.endswith("\n") else {}
        except ValueError:  # damaged; what it says is for readers, and silence tells as well
            holder = {}
        return cls(path, name, int(number), holder)

    def __str__(self) -> str:
        return f"process {self.holder.get('pid', '?')} on {self.holder.get('host', '?')}"


class Leases:
    """The leases in a folder, and what this process has seen of their holders. seconds: of silence that mean death."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder, self.seconds = folder, seconds
        self._seen: dict[Path, tuple[int, float]] = {}

    def held(self, name: str | None = None) -> list[Held]:
        """All that are there, or those of a name, the dead ones included."""
        some = "*.lease" if name is None else f"{glob.escape(name)}.*.lease"
        found = (Held.read(path) for path in sorted(self.folder.glob(some)))
        return [lease for lease in found if lease is not None]

    @contextmanager
    def claim(self, name: str) -> Iterator[list[Held] | None]:
        """The lease of ``name`` for the length of a ``with``: those whose holders died over it; None where it is
        another's. Raises RunError where the folder can't be written to."""
        before = [lease for lease in self.held(name) if lease.name == name]
        newest = max(before, key=lambda lease: lease.deaths, default=None)
        if newest is not None and self.alive(newest):
            yield None
            return
        path = self.folder / f"{name}.{0 if newest is None else newest.deaths + 1}.lease"
        try:
            file = self._made(path)
        except FileExistsError:
            yield None  # another was faster
            return
        except OSError as error:
            raise RunError(
                f"cannot write {path}: {error.strerror or error}; the run directory must be writable and have space"
            ) from error
        stop = threading.Event()
        beating = threading.Thread(target=self._beat, args=(path, stop), name=f"lease of {name}", daemon=True)
        beating.start()
        try:
            yield sorted(before, key=lambda lease: lease.deaths)
        finally:
            stop.set()
            beating.join()
            for own in (path, *(lease.path for lease in before)):
                own.unlink(missing_ok=True)
            os.close(file)

    def alive(self, lease: Held) -> bool:
        """Whether its holder is, as far as can be told by now."""
        try:
            with lease.path.open("rb") as file:  # opened, NFS asks its server for the time
                touched = os.fstat(file.fileno()).st_mtime_ns
                if lease.holder.get("kernel") == kernel() and _free(file.fileno()):
                    return False
        except FileNotFoundError:
            return True  # given back a moment ago: look again
        known, since = self._seen.get(lease.path, (None, 0.0))
        if known != touched:
            since = time.monotonic()
            self._seen[lease.path] = (touched, since)
        return time.monotonic() - since < self.seconds

    def sweep(self) -> None:
        """Remove all leases. Only for who knows that no holder lives."""
        for lease in self.held():
            lease.path.unlink(missing_ok=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _made(self, path: Path) -> int:
        self.folder.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o644)
        try:
            holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                holder["kernel"] = kernel()
            except OSError:  # no locks on this file system: silence alone will tell
                log.info("%s: cannot be locked", path)
            # After the lock: a lease that says its kernel is locked.
            text = json.dumps(holder).encode() + b"\n"
            if os.write(file, text) < len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except BaseException:
            path.unlink(missing_ok=True)
            os.close(file)
            raise
        return file

    def _beat(self, path: Path, stop: threading.Event) -> None:
        while not stop.wait(self.seconds / BEATS):
            try:
                os.utime(path)
            except FileNotFoundError:
                return  # taken over and finished while this process stood still
            except OSError as error:
                log.warning("%s cannot be touched (%s); without a sign of life another will take it over", path, error)


def kernel() -> str:
    """Tells this kernel's run from any other's; the same in all its containers."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _free(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
