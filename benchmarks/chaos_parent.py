"""Imported by the process that the workers of ``chaos`` are forked from: with the model loaded and no thread begun."""

from benchmarks.chaos import policy

policy()
