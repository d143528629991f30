"""Mistakes that type checkers must find, one on each line that says so."""

import latentrevise
from latentrevise import ReviseConfig
from latentrevise.kernels import linear_logprob

_ = latentrevise.nope  # wrong
ReviseConfig(step=3)  # wrong
linear_logprob(1, 2, 3)  # wrong
