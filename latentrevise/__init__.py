"""Recover zero-hit prompts by revising failed reasoning in embedding space (LatentRevise, arXiv 2606.29938)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentrevise import kernels as kernels
    from latentrevise.model.branches import Branch, BranchScores
    from latentrevise.model.compute import Compute
    from latentrevise.recovery.pipeline import Recovered, recover
    from latentrevise.recovery.settings import RecoverConfig
    from latentrevise.revise.hull import Mixture, VocabularyHull
    from latentrevise.revise.reviser import Reviser
    from latentrevise.revise.revision import Evaluation, FailedRollout, ReviseConfig, Revision, Trace

__version__ = "0.1.0.dev0"

__all__ = [
    "Branch",
    "BranchScores",
    "Compute",
    "Evaluation",
    "FailedRollout",
    "Mixture",
    "RecoverConfig",
    "Recovered",
    "ReviseConfig",
    "Reviser",
    "Revision",
    "Trace",
    "VocabularyHull",
    "recover",
]

_HOME = {
    "Branch": "model.branches",
    "BranchScores": "model.branches",
    "Mixture": "revise.hull",
    "VocabularyHull": "revise.hull",
    "Reviser": "revise.reviser",
    "RecoverConfig": "recovery.settings",
    "Recovered": "recovery.pipeline",
    "recover": "recovery.pipeline",
}


if not TYPE_CHECKING:  # type checkers take the imports above, and know what is not there

    def __getattr__(name: str) -> Any:
        # Imported on first use: `latentrevise.kernels` alone must not cost the import of transformers.
        if name == "kernels":
            return importlib.import_module("latentrevise.kernels")
        if name not in __all__:
            raise AttributeError(f"module 'latentrevise' has no attribute {name!r}")
        return getattr(importlib.import_module(f"latentrevise.{_HOME.get(name, 'revise.revision')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "kernels"})
