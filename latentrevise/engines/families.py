"""Where the tokens of requests that share prefixes lie: one row a family, each distinct token once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from latentrevise.engines.prefixes import Shared


def families(shared: Sequence[Shared]) -> list[list[int]]:
    """The requests of each trie that are run (each differs from all others), owners before those who take over; the
    tries in the order of their roots. O(requests)."""
    root: dict[int, int] = {}
    members: dict[int, list[int]] = defaultdict(list)
    for i in sorted(range(len(shared)), key=lambda i: (shared[i].level, i)):
        if not shared[i].same:
            root[i] = root[shared[i].owner] if shared[i].length else i
            members[root[i]].append(i)
    return [own for _, own in sorted(members.items())]


@dataclass(frozen=True)
class Layout:
    """``G`` families as lines of ``K`` columns, each of their ``U`` members' own tokens once.

    The first ``held`` columns are those whose keys and values are there already, from calls before; the last ``wanted``
    are the members' last tokens, whose logits are wanted; the others stand between, owners first, so that nothing sees
    what lies to its right. Each of the first two parts is padded on the left.

    members: the requests that are run; same: of each request, its place among them. places: line and columns of those
    of each member's own tokens that are run. slots: int64 ``[G, held]``, where the others are held. line, slot: int64
    ``[U]``, the line and which of the last columns. owner, position: int64 ``[G, K]``, whose token lies there (-1:
    padding) and where it stands in the request. sees: bool ``[U, K]``, what a member's last token sees of its line.
    """

    members: list[int]
    same: dict[int, int]
    places: list[tuple[int, Tensor]]
    slots: Tensor
    line: Tensor
    slot: Tensor
    owner: Tensor
    position: Tensor
    sees: Tensor
    wanted: int

    @property
    def held(self) -> int:
        return self.slots.shape[1]

    def to(self, device: torch.device) -> Layout:
        moved = {
            name: getattr(self, name).to(device) for name in ("slots", "line", "slot", "owner", "position", "sees")
        }
        return replace(self, places=[(line, columns.to(device)) for line, columns in self.places], **moved)

    def mask(self, start: int, stop: int) -> Tensor:
        """Which of the columns ``[0, stop)`` those in ``[start, stop)`` see: bool ``[G, stop - start, stop]``."""
        owner, position = self.owner[:, start:stop], self.position[:, start:stop, None]
        seen = self.sees[owner.clamp(min=0), :stop] & (self.position[:, None, :stop] <= position)
        return seen & (owner >= 0)[:, :, None]


def lay_out(
    found: Sequence[Sequence[int]], shared: Sequence[Shared], lengths: Sequence[int], known: Sequence[Sequence[int]]
) -> Layout:
    """Lines for the families of ``found``; index arrays and ``U x K`` bytes, on the CPU. known: of each request the
    slots of its leading positions that are held, never its last one."""
    members = [i for family in found for i in family]
    place = {i: u for u, i in enumerate(members)}
    run_from = {i: max(shared[i].length, len(known[i])) for i in members}  # of a member's own tokens, the first to run

    def widest(of: Callable[[int], int]) -> int:
        return max(sum(map(of, family)) for family in found)

    wanted = widest(lambda _: 1)
    held = widest(lambda i: run_from[i] - shared[i].length)
    inner = held + widest(lambda i: lengths[i] - 1 - run_from[i])
    owner = torch.full((len(found), inner + wanted), -1)
    position = torch.zeros_like(owner)
    slots = torch.zeros(len(found), held, dtype=torch.long)
    sees = torch.zeros(len(members), inner + wanted, dtype=torch.bool)
    places, last = [], []
    for g, family in enumerate(found):
        there = held - sum(run_from[i] - shared[i].length for i in family)
        stop = inner - sum(lengths[i] - 1 - run_from[i] for i in family)
        for j, i in enumerate(family):
            taken = shared[i].length
            before, there = there, there + run_from[i] - taken
            start, stop = stop, stop + lengths[i] - 1 - run_from[i]
            slots[g, before:there] = torch.tensor(known[i][taken : run_from[i]], dtype=torch.long)
            run = [*range(start, stop), inner + j]
            own = torch.tensor([*range(before, there), *run])
            owner[g, own] = place[i]
            position[g, own] = torch.arange(taken, lengths[i])
            sees[place[i], own] = True
            if taken:
                sees[place[i]] |= sees[place[shared[i].owner]] & (position[g] < taken)
            places.append((g, torch.tensor(run)))
            last.append(j)
    same = {i: place[s.owner if s.same else i] for i, s in enumerate(shared)}
    line = torch.tensor([g for g, _ in places])
    return Layout(members, same, places, slots, line, torch.tensor(last), owner, position, sees, wanted)
