"""What a computation cost, in tokens: the unit in which all strategies are charged."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Compute:
    """Compute in tokens: each token that went forward, backward, or was decoded; what a cache gave is not counted."""

    forward: int = 0
    backward: int = 0
    decoded: int = 0
    seconds: float = 0.0

    @property
    def passes(self) -> int:
        """Token passes: a forward pass is 1, a backward pass 2, a decoded token 1."""
        return self.forward + 2 * self.backward + self.decoded

    def __add__(self, other: Compute) -> Compute:
        return Compute(
            self.forward + other.forward,
            self.backward + other.backward,
            self.decoded + other.decoded,
            self.seconds + other.seconds,
        )
