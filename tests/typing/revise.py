"""A user's revision: checked by mypy --strict and pyright, not run."""

from typing import assert_type

from transformers import PreTrainedModel

from latentrevise import FailedRollout, ReviseConfig, Reviser, Revision


def revise(model: PreTrainedModel, prompt: list[int], failed: list[int], rest: list[int]) -> list[Revision]:
    reviser = Reviser(model, ReviseConfig(steps=4))
    revisions = reviser.revise([FailedRollout(prompt, failed, rest, [7], id="a")])
    assert_type(revisions, list[Revision])
    return revisions
