"""The errors a user can meet. Each message names the input, says what is wrong with it and what to do about it."""

from __future__ import annotations


class LatentReviseError(Exception):
    """Base of all errors that this package raises on purpose."""


class InputError(LatentReviseError):
    """Prompts, rollouts, requests or records that cannot be used as they are."""


class ModelError(LatentReviseError):
    """A model or tokenizer that cannot be loaded, is not supported, or computes nonsense."""


class ConfigError(LatentReviseError):
    """A setting that does not exist, has the wrong type, or contradicts another one."""


class RunError(LatentReviseError):
    """A run that cannot go on: unwritable output, a directory of another run, memory that does not suffice."""
