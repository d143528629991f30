"""The job: mine zero-hit prompts, propose, continue, judge, collect; the run directory, guards and metrics."""
