"""Engines that sample completions from token ids or from embeddings."""

from latentrevise.engines.base import Completion, Engine, Progress, Request, SamplingParams
from latentrevise.engines.hf import HFEngine

__all__ = ["Completion", "Engine", "HFEngine", "Progress", "Request", "SamplingParams"]
