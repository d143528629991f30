"""Prompts in, rows out: what a prompts file may look like, the records of a run directory, exports for trainers."""
