"""Where the tokens of requests that share prefixes lie: one row a family, each distinct token once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from latentrevise.engines.prefixes import Shared


@dataclass(frozen=True)
class Family:
    """The requests of one trie that are run (each differs from all others), owners before those who take over."""

    members: list[int]
    tokens: int  # distinct ones


def families(lengths: Sequence[int], shared: Sequence[Shared]) -> list[Family]:
    """The tries, in the order of their roots. O(requests)."""
    root: dict[int, int] = {}
    members: dict[int, list[int]] = defaultdict(list)
    for i in sorted(range(len(shared)), key=lambda i: (shared[i].level, i)):
        if not shared[i].same:
            root[i] = root[shared[i].owner] if shared[i].length else i
            members[root[i]].append(i)
    return [Family(own, sum(lengths[i] - shared[i].length for i in own)) for _, own in sorted(members.items())]


@dataclass(frozen=True)
class Layout:
    """``G`` families as lines of ``K`` columns, each of their ``U`` members' own tokens once.

    The last ``wanted`` columns are the members' last tokens, whose logits are wanted; the others stand before them,
    owners first, so that nothing sees what lies to its right. Lines are padded between the two, and on the left.

    members: the requests that are run; same: of each request, its place among them. places: line and columns of each
    member's own tokens. line, slot: int64 ``[U]``, the line and which of the last columns. owner, position: int64
    ``[G, K]``, whose token lies there (-1: padding) and where it stands in the request. sees: bool ``[U, K]``, what a
    member's last token sees of its line.
    """

    members: list[int]
    same: dict[int, int]
    places: list[tuple[int, Tensor]]
    line: Tensor
    slot: Tensor
    owner: Tensor
    position: Tensor
    sees: Tensor
    wanted: int

    def to(self, device: torch.device) -> Layout:
        moved = {name: getattr(self, name).to(device) for name in ("line", "slot", "owner", "position", "sees")}
        return replace(self, places=[(line, columns.to(device)) for line, columns in self.places], **moved)

    def mask(self, start: int, stop: int) -> Tensor:
        """Which of the columns ``[0, stop)`` those in ``[start, stop)`` see: bool ``[G, stop - start, stop]``."""
        owner, position = self.owner[:, start:stop], self.position[:, start:stop, None]
        seen = self.sees[owner.clamp(min=0), :stop] & (self.position[:, None, :stop] <= position)
        return seen & (owner >= 0)[:, :, None]


def lay_out(found: Sequence[Family], shared: Sequence[Shared], lengths: Sequence[int]) -> Layout:
    """Lines for the families of ``found``; index arrays and ``U x K`` bytes, on the CPU."""
    members = [i for family in found for i in family.members]
    place = {i: u for u, i in enumerate(members)}
    wanted = max(len(family.members) for family in found)
    inner = max(family.tokens - len(family.members) for family in found)
    owner = torch.full((len(found), inner + wanted), -1)
    position = torch.zeros_like(owner)
    sees = torch.zeros(len(members), inner + wanted, dtype=torch.bool)
    places, slots = [], []
    for g, family in enumerate(found):
        stop = inner - (family.tokens - len(family.members))
        for j, i in enumerate(family.members):
            taken = shared[i].length
            start, stop = stop, stop + lengths[i] - taken - 1
            own = torch.tensor([*range(start, stop), inner + j])
            owner[g, own] = place[i]
            position[g, own] = torch.arange(taken, lengths[i])
            sees[place[i], own] = True
            if taken:
                sees[place[i]] |= sees[place[shared[i].owner]] & (position[g] < taken)
            places.append((g, own))
            slots.append(j)
    same = {i: place[s.owner if s.same else i] for i, s in enumerate(shared)}
    line = torch.tensor([g for g, _ in places])
    return Layout(members, same, places, line, torch.tensor(slots), owner, position, sees, wanted)
