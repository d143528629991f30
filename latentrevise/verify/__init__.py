"""Verdicts: is the answer in a completion the gold answer? Mathematics is judged in a process of its own."""
