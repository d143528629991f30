"""Checkers of derivations, for the setting ``checker``: is the right answer derived, or only stated?

``latentrevise.checkers.arithmetic:check`` reads word problems solved by equations (GSM8K and its like);
``latentrevise.checkers.arithmetic:check_step``, for the setting ``step_checker``, one step of such a derivation.
"""
