"""Recover zero-hit prompts by revising failed reasoning in embedding space (LatentRevise, arXiv 2606.29938)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import kernels as kernels  # latentrevise.kernels, where type checkers find it in the source tree
    from latentrevise.model.branches import Branch, BranchScores
    from latentrevise.revise.hull import Mixture, VocabularyHull
    from latentrevise.recover.pipeline import Recovered, recover
    from latentrevise.revise.reviser import Reviser
    from latentrevise.revise.revision import Compute, Evaluation, FailedRollout, ReviseConfig, Revision, Trace
    from latentrevise.recover.settings import RecoverConfig

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
    "Branch": "branches",
    "BranchScores": "branches",
    "Mixture": "hull",
    "VocabularyHull": "hull",
    "Reviser": "reviser",
    "RecoverConfig": "settings",
    "Recovered": "pipeline",
    "recover": "pipeline",
}


def __getattr__(name: str) -> Any:
    # Imported on first use: `latentrevise.kernels` alone must not cost the import of transformers.
    if name not in __all__:
        raise AttributeError(f"module 'latentrevise' has no attribute {name!r}")
    return getattr(importlib.import_module(f"latentrevise.{_HOME.get(name, 'revision')}"), name)
