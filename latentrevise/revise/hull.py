"""The feasible set of a revision: the convex hull of the vocabulary's embeddings, and a point in it.

A latent prefix ``z [T, d]`` is never stored as such. It is stored as its *atoms*, ``z_t = sum_j w_tj E[i_tj]`` with
``w_t`` on the simplex, so that hull membership holds by construction and not up to a tolerance, the revised prefix can
be read as text, and a revision takes ``T x (K + 1)`` numbers instead of ``T x d`` (arXiv 2606.29938 fixes the hull;
the sparse record is our own decision).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from latentrevise import kernels
from latentrevise.errors import ConfigError, InputError

TextRule = Literal["inner-product", "nearest", "heaviest"]


@dataclass(frozen=True)
class Mixture:
    """``T`` points of the hull, each a convex combination of at most ``A`` vertices.

    ids: int32 ``[T, A]``, row numbers of the embedding table. A free slot repeats the position's first atom.
    weights: float32 ``[T, A]``, on the simplex; a free slot has weight 0.
    offset: float32 ``[T, d]``, added to the combination: how far the ``adam`` solver, an ablation, has left
    the hull. None for a point of the hull.
    """

    ids: Tensor
    weights: Tensor
    offset: Tensor | None = None

    @classmethod
    def from_tokens(cls, token_ids: Tensor, atoms: int = 1) -> Mixture:
        """The vertices themselves: one atom a position, and ``atoms - 1`` free slots."""
        ids = token_ids.to(torch.int32).unsqueeze(-1).expand(-1, atoms).contiguous()
        weights = torch.zeros(ids.shape, dtype=torch.float32, device=ids.device)
        weights[:, 0] = 1.0
        return cls(ids, weights)

    @classmethod
    def spread(cls, token_ids: Tensor, candidates: Tensor, mass: float) -> Mixture:
        """``1 - mass`` on the original token and ``mass`` spread evenly over the position's candidates.

        The start of entropic mirror descent, whose multiplicative update can never raise a weight of zero.
        token_ids: ``[T]``; candidates: int64 ``[T, C]``, padded with -1, each row containing the original token.
        """
        listed = candidates >= 0
        original = candidates == token_ids.unsqueeze(-1)
        weights = mass * listed / listed.sum(-1, keepdim=True) + (1.0 - mass) * original
        ids = torch.where(listed, candidates, token_ids.unsqueeze(-1))
        return cls(ids.to(torch.int32), weights.to(torch.float32))

    def __len__(self) -> int:
        return self.ids.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> Mixture:
        return self.map(lambda x: x[rows])

    def map(self, change: Callable[[Tensor], Tensor]) -> Mixture:
        """The same with each of its tensors changed."""
        return Mixture(change(self.ids), change(self.weights), None if self.offset is None else change(self.offset))

    def behind(self, token_ids: Sequence[int]) -> Mixture:
        """The same points, and those tokens themselves in front."""
        tokens = torch.tensor(list(token_ids), dtype=torch.long, device=self.ids.device)
        front = Mixture.from_tokens(tokens, self.ids.shape[1])
        offset = self.offset
        if offset is not None:
            offset = torch.cat([offset.new_zeros(len(tokens), offset.shape[1]), offset])
        return Mixture(torch.cat([front.ids, self.ids]), torch.cat([front.weights, self.weights]), offset)

    def to(self, device: torch.device | str) -> Mixture:
        """The same mixture with its tensors on ``device``."""
        return self.map(lambda x: x.to(device))

    def step(self, vertex: Tensor, gamma: Tensor, slot: int) -> Mixture:
        """The Frank-Wolfe move ``z <- (1 - gamma) z + gamma E[vertex]``, recorded on the atoms.

        vertex: int64 ``[T]``; gamma: float32 ``[T]`` in [0, 1]; slot: the free column that takes a new atom. A vertex
        that is an atom already gains weight in its own column, so atoms stay distinct.
        """
        ids, weights = self.ids.clone(), self.weights * (1.0 - gamma).unsqueeze(-1)
        match = (ids == vertex.unsqueeze(-1)) & (self.weights > 0)
        known = match.any(-1)
        column = torch.where(known, match.to(torch.int8).argmax(-1), slot)
        moved = gamma > 0
        new = moved & ~known
        ids[new, slot] = vertex[new].to(torch.int32)
        weights.scatter_add_(1, column.unsqueeze(-1), gamma.unsqueeze(-1))
        return Mixture(ids, weights)

    def embed(self, table: Tensor) -> Tensor:
        """``z [T, d]`` in the table's dtype, accumulated in float32 and rounded once (twice with an offset)."""
        z = kernels.mixture_embed(self.ids, self.weights, table)
        return z if self.offset is None else (z.float() + self.offset).to(z.dtype)

    def argmax_ids(self) -> Tensor:
        """The heaviest atom of each position, int64 ``[T]`` (the first of equals): the prefix as text."""
        return self.ids.gather(1, self.weights.argmax(-1, keepdim=True)).squeeze(1).long()

    def entropy(self) -> Tensor:
        """Entropy of each position's weights in nats, float32 ``[T]``."""
        return torch.special.entr(self.weights).sum(-1)

    def compact(self, most: int | None = None) -> Mixture:
        """The same points with the free slots dropped as far as every position allows; heaviest atom first.

        most: keep that many atoms at most, their weights scaled to 1 again: no longer quite the same points.
        """
        weights, order = self.weights.sort(dim=-1, descending=True, stable=True)
        used = max(int((weights > 0).sum(-1).max()), 1) if len(self) else 1
        ids = self.ids.gather(1, order)[:, :used]
        if most is not None and most < used:
            ids, weights = ids[:, :most], weights[:, :most] / weights[:, :most].sum(-1, keepdim=True)
        return Mixture(ids.contiguous(), weights[:, :used].contiguous(), self.offset)


@dataclass(frozen=True)
class VocabularyHull:
    """The convex hull of the allowed rows of an embedding table.

    table: ``E [V, d]`` *as the model's embedding module outputs it* (Gemma scales its rows, for instance).
    allowed: bool ``[V]``; the vertices. In the paper every row of the tokenizer is one, special tokens too.
    """

    table: Tensor
    allowed: Tensor

    def __post_init__(self) -> None:
        if self.table.ndim != 2 or self.allowed.shape != self.table.shape[:1] or self.allowed.dtype != torch.bool:
            raise InputError(
                f"hull: table {tuple(self.table.shape)} and allowed {tuple(self.allowed.shape)} {self.allowed.dtype} do"
                " not fit; pass a [V, d] table and a bool [V] mask"
            )
        if not bool(self.allowed.any()):
            raise InputError("hull: no vertex is allowed; leave at least one True in `allowed`")

    @property
    def vocabulary(self) -> int:
        return self.table.shape[0]

    def text_ids(self, mixture: Mixture, rule: TextRule = "inner-product") -> Tensor:
        """A mixture written as tokens, int64 ``[T]``.

        rule: ``inner-product``, ``argmax_v <z_t, E_v>`` (arXiv 2606.29938, Eq. 8); ``nearest``, the row at the least
        Euclidean distance, exact; ``heaviest``, the atom of most weight. Only vertices are written; lowest id on ties.
        Memory is linear in ``T`` and in ``V``: no ``[T, V]``.
        """
        if rule == "heaviest":
            return mixture.argmax_ids()
        z = mixture.embed(self.table)
        if rule == "inner-product":
            ids, _ = kernels.vertex_oracle(-z, self.table, self.allowed)
        elif rule == "nearest":
            # |z - E_v|^2 is |z|^2 and this: one more column beside <z, E_v>.
            norms = self.table.float().square().sum(-1, keepdim=True)
            ones = torch.ones(len(z), 1, device=z.device)
            ids, _ = kernels.vertex_oracle(-2.0 * z.float(), self.table.float(), self.allowed, Q2=ones, W2=norms)
        else:
            raise ConfigError(f"text rule {rule!r}: choose inner-product, nearest or heaviest")
        return ids

    def plausible(self, token_ids: Tensor, ids: Tensor) -> Tensor:
        """Candidates of the plausible hull: the tokens listed for each position, and the original one.

        token_ids: ``[T]``, the original prefix; ids: int64 ``[T, C]`` padded with -1, from ``plausible_vertices``.
        Returns int64 ``[T, C + 1]`` padded with -1 at the end, ascending (so that the lowest id wins a tie).
        """
        original = token_ids.unsqueeze(-1)
        others = ids.masked_fill(ids == original, -1)
        joined = torch.cat([others, original], dim=-1)
        last = torch.iinfo(joined.dtype).max
        ordered = joined.masked_fill(joined < 0, last).sort(dim=-1).values
        return ordered.masked_fill(ordered == last, -1)
