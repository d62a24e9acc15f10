"""`LocalJudge`: a model on this machine that answers a judge's questions."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from textpolicy.errors import ConfigError
from textpolicy.rewards.endpoint import JudgeReply
from textpolicy.types import AdaptablePolicy, Completion, Policy


@dataclass(frozen=True)
class LocalJudge:
    """A policy that answers all questions in one batch with a fixed seed.

    The cache of answers tells judges apart by `name`, so judges of different models need different
    names.
    """

    policy: Policy
    name: str = "local"

    def __call__(self, questions: Sequence[str]) -> list[JudgeReply]:
        """Return the replies to the questions, in order."""
        groups = self.policy.generate(list(questions), n=1, seed=0)
        return [
            JudgeReply(_reply_of(completion), len(completion.prompt_tokens), len(completion.tokens))
            for (completion,) in groups
        ]

    def with_adapter(self, adapter: str | Path | None) -> "LocalJudge":
        """Return a judge with another adapter, or with none, over the same base arrays.

        This judge and its policy stay as they are. The tensors of the adapter are part of the name.
        """
        if not isinstance(self.policy, AdaptablePolicy):
            raise ConfigError(
                f"{type(self.policy).__name__} has no with_adapter, so the judge cannot use the "
                f"adapter {adapter}. Pass a policy that create_policy has made"
            )
        policy = self.policy.with_adapter(adapter)
        return LocalJudge(policy, f"{self.name} with {policy.adapter_digest()}")


def _reply_of(completion: Completion) -> str:
    """Return what the judge says after its thought."""
    return completion.text if completion.answer is None else completion.answer
