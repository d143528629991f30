"""Which leading positions requests share: a trie of their rows, each node computed by one request alone."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# A shared prefix of fewer positions, or of fewer than stand behind it, is run again: rows of one line are decoded
# together, each scored against all tokens there, and prompts that have no more in common than the beginning of a chat
# template (25 of 85 tokens, 8 rollouts of each of 8 prompts: benchmarks forks) are sampled in 0.57 of the time apart.
WORTH = 4, 1


@dataclass(frozen=True)
class Shared:
    """owner: the request whose keys and values are taken over. length: of how many leading positions (0: none).

    level: how many owners it takes to come to the root. same: the owner is the same request, and nothing is run.
    """

    owner: int
    length: int
    level: int
    same: bool = False


def shared_prefixes(rows: Sequence[Sequence[Hashable]]) -> list[Shared]:
    """What each of ``rows`` takes over from another. Our own decision; the published method has no counterpart.

    A row that is the beginning of another runs its last position again, for the logits behind it. All other nodes of
    the trie are computed once, but for prefixes that are not ``WORTH`` it. The order of rows makes no difference to
    what is shared: the longest are inserted first. O(total positions) dictionary operations.
    """
    nodes: dict[tuple[int, Hashable], tuple[int, int]] = {}  # parent node and key: node and the row that owns it
    found: dict[int, Shared] = {}
    for index in sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i)):
        node, depth, owner = 0, 0, index
        for key in rows[index]:
            known = nodes.get((node, key))
            if known is None:
                break
            (node, owner), depth = known, depth + 1
        if depth == len(rows[index]) == len(rows[owner]) and owner != index:
            found[index] = Shared(owner, depth, found[owner].level, same=True)
            continue
        for key in rows[index][depth:]:
            fresh = len(nodes) + 1
            nodes[node, key] = (fresh, index)
            node = fresh
        length = min(depth, len(rows[index]) - 1)
        if length < WORTH[0] or length * WORTH[1] < len(rows[index]) - length:
            found[index] = Shared(index, 0, 0)
        else:
            found[index] = Shared(owner, length, found[owner].level + 1)
    return [found[index] for index in range(len(rows))]


def row_keys(rows: Sequence[Tensor]) -> list[list[bytes]]:
    """A key for each position of embeddings ``rows`` (``[L, d]`` each, any dtype): equal where it is bitwise equal."""
    keys = []
    for row in rows:
        data = row.detach().contiguous().view(torch.uint8).cpu().numpy()
        keys.append([position.tobytes() for position in data])
    return keys
