"""How far a stage is: a bar, JSON lines, or nothing; it moves every few seconds, also while a part runs."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torch import nn
from tqdm.auto import tqdm

Shown = Literal["bar", "json"] | None
_SECONDS = {"bar": 2.0, "json": 5.0}


class Progress:
    """A stage of ``total`` prompts, ``there`` of which need no work.

    shown: a bar or JSON lines on standard error, or None. The rate is that of this stage since it began, by all who
    work on it; the part that this process is at counts by the share of its sequences that are finished, where that is
    known, and else by the tokens a second.
    """

    def __init__(self, stage: str = "", total: int = 0, there: int = 0, shown: Shown = None) -> None:
        self.stage, self.total, self.there, self.shown = stage, total, there, shown
        self.done, self.tokens, self.arm = there, 0, ""
        self._size, self._share = 0, 0.0
        self._began = self._counted = time.monotonic()
        self._rate = 0.0

    @contextmanager
    def showing(self, body: nn.Module | None = None) -> Iterator[Progress]:
        """Shown for the length of a ``with``; body: the model's decoder, whose passes are counted in tokens."""
        if self.shown is None:
            yield self
            return
        stop, bar = threading.Event(), None
        if self.shown == "bar":
            bar = tqdm(total=self.total, initial=self.there, desc=self.stage, unit="prompt", dynamic_ncols=True)
        hook = None if body is None else body.register_forward_pre_hook(self._count, with_kwargs=True)
        ticking = threading.Thread(target=self._tick, args=(bar, stop), name="progress", daemon=True)
        ticking.start()
        try:
            yield self
        finally:
            stop.set()
            ticking.join()
            if hook is not None:
                hook.remove()
            self.arm = ""
            self._show(bar)
            if bar is not None:
                bar.close()

    def begin(self, arm: str, size: int) -> None:
        """This process is at a part of so many prompts."""
        self.arm, self._size, self._share = arm, size, 0.0

    def within(self, share: float) -> None:
        """So much of the part is done; it is believed only where it goes forward."""
        self._share = max(self._share, min(share, 1.0))

    def end(self, size: int) -> None:
        """A part of so many prompts is there, whoever ran it."""
        self.done += size
        self._size, self._share = 0, 0.0

    def passed(self, tokens: int) -> None:
        """So many tokens went through the model."""
        self.tokens += tokens

    def state(self) -> dict[str, Any]:
        """What a JSON line says. rate: prompts a second; eta_seconds: of this stage; None: not known yet."""
        now = time.monotonic()
        reached = self.done + self._size * self._share
        rate = (reached - self.there) / max(now - self._began, 1e-9)
        if now > self._counted:
            self._rate, self.tokens, self._counted = self.tokens / (now - self._counted), 0, now
        return {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "stage": self.stage,
            "arm": self.arm,
            "done": round(reached, 2),
            "total": self.total,
            "rate": round(rate, 4),
            "eta_seconds": round((self.total - reached) / rate, 1) if rate > 0 else None,
            "tokens_per_second": round(self._rate, 1),
        }

    def _tick(self, bar: tqdm | None, stop: threading.Event) -> None:
        while not stop.wait(_SECONDS[self.shown or "bar"]):
            self._show(bar)

    def _show(self, bar: tqdm | None) -> None:
        state = self.state()
        if bar is None:
            print(json.dumps(state), file=sys.stderr, flush=True)
            return
        bar.n = state["done"] if state["done"] % 1 else int(state["done"])
        bar.set_description(f"{self.stage} ({self.arm})" if self.arm else self.stage, refresh=False)
        bar.set_postfix_str(f"{state['tokens_per_second']:,.0f} tokens/s" if self.arm else "", refresh=False)
        bar.refresh()

    def _count(self, _: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        fed = next((named[k] for k in ("inputs_embeds", "input_ids") if named.get(k) is not None), None)
        fed = positional[0] if fed is None else fed
        self.passed(fed.shape[0] * fed.shape[1])
