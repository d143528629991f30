"""Learning from what was recovered: thin trainers on TRL, a registry of losses over the same rollouts.

Needs the extra ``train`` (``pip install '.[train]'`` in a clone), except for ``latentrevise.train.losses``.
"""
