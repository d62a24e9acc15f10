"""`LocalJudge`: a model on this machine that answers a judge's questions."""

from collections.abc import Sequence
from dataclasses import dataclass

from textpolicy.rewards.endpoint import JudgeReply
from textpolicy.types import Completion, Policy


@dataclass(frozen=True)
class LocalJudge:
    """A policy over another model, which answers all questions in one batch with a fixed seed."""

    policy: Policy
    name: str = "local"

    def __call__(self, questions: Sequence[str]) -> list[JudgeReply]:
        """Return the replies to the questions, in order."""
        groups = self.policy.generate(list(questions), n=1, seed=0)
        return [
            JudgeReply(_reply_of(completion), len(completion.prompt_tokens), len(completion.tokens))
            for (completion,) in groups
        ]


def _reply_of(completion: Completion) -> str:
    """Return what the judge says after its thought."""
    return completion.text if completion.answer is None else completion.answer
