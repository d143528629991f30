"""Checkers of derivations, for the setting ``checker``: is the right answer derived, or only stated?

``latentrevise.checkers.arithmetic:check`` reads word problems solved by equations (GSM8K and its like).
"""
