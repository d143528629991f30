"""``python -m latentrevise``: the command line."""

from latentrevise.cli import main

main()
