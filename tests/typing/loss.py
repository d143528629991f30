"""A user's loss: checked by mypy --strict and pyright, not run."""

from typing import assert_type

import torch
from torch import Tensor

import latentrevise
from latentrevise.kernels import linear_logprob


def loss(hidden: Tensor, head: torch.nn.Linear, labels: Tensor) -> Tensor:
    logp = linear_logprob(hidden, head.weight, labels, ignore_index=-100)
    assert_type(logp, Tensor)
    return -logp.sum() / (labels != -100).sum()


def with_entropy(hidden: Tensor, head: torch.nn.Linear, labels: Tensor) -> Tensor:
    logp, entropy = linear_logprob(hidden, head.weight, labels, entropy=True)
    return logp.mean() + 0.01 * entropy.mean()


def by_attribute(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return latentrevise.kernels.linear_logprob(hidden, weight, labels)
