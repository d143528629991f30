"""The settings of verification: one way to set them for mining, recovery, repair and evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from latentrevise.verify.patterns import BOXED, AnswerPattern
from latentrevise.verify.verifier import Verifier, check_timeout


@dataclass(frozen=True, kw_only=True)
class VerifySettings:
    """verify_timeout: seconds for one answer. answer_pattern: where a completion says its answer: ``boxed``,
    ``answer-line`` (``Answer: x``), ``gsm8k`` (``#### x``), ``the-answer-is``, or a regular expression of which the
    only group is the answer; its last match counts.
    """

    verify_timeout: float = 5.0
    answer_pattern: str = BOXED

    def verifier(self) -> Verifier:
        """A new one; the caller closes it."""
        return Verifier(timeout=self.verify_timeout, answer_pattern=self.answer_pattern)

    def pattern(self) -> AnswerPattern:
        return AnswerPattern(self.answer_pattern)

    def check_verification(self) -> None:
        """Raises ConfigError for a value that is none."""
        check_timeout(f"{type(self).__name__}.verify_timeout", self.verify_timeout)
        self.pattern()
