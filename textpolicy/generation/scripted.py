"""A policy that says what it is told to, token by token as a model would: for demonstrations."""

from collections.abc import Sequence
from pathlib import Path

from mlx_lm.tokenizer_utils import TokenizerWrapper

from textpolicy.errors import ConfigError
from textpolicy.generation.prompts import encode_prompt, encode_reply
from textpolicy.types import Completion, Prompt, RespondFn, Sampling, StopReason


class ScriptedPolicy:
    """A `ConversingPolicy` whose row of prompt p says `scripts[p]`, an answer a turn.

    Its rollouts have the tokens and the mask that a model's would have, and log-probabilities of 0:
    they are for imitation, never for a policy loss. After the last answer, the last again.
    """

    version = 0

    def __init__(self, tokenizer: TokenizerWrapper, scripts: Sequence[Sequence[str]]) -> None:
        self.tokenizer = tokenizer
        self.scripts = scripts

    def reload(self, path: str | Path) -> int:
        raise ConfigError(f"a scripted policy has no adapters to take from {path}")

    def generate(
        self, prompts: Sequence[Prompt], *, n: int = 1, seed: int | None = None
    ) -> list[list[Completion]]:
        turns = self.converse(prompts, lambda prompt, member, said: None, n=n)
        return [[said for (said,) in group] for group in turns]

    def converse(
        self,
        prompts: Sequence[Prompt],
        respond: RespondFn,
        *,
        n: int = 1,
        seed: int | None = None,
    ) -> list[list[list[Completion]]]:
        return [
            [self._talk(p, member, prompt, respond) for member in range(n)]
            for p, prompt in enumerate(prompts)
        ]

    def _talk(self, p: int, member: int, prompt: Prompt, respond: RespondFn) -> list[Completion]:
        context = encode_prompt(self.tokenizer, prompt)
        turns: list[Completion] = []
        while True:
            said = self._say(context, self.scripts[p][min(len(turns), len(self.scripts[p]) - 1)])
            turns.append(said)
            replies = respond(p, member, said)
            if replies is None:
                return turns
            spoken = context + said.tokens
            context = spoken + encode_reply(self.tokenizer, replies, spoken[-1])

    def _say(self, context: list[int], text: str) -> Completion:
        tokens = [*self.tokenizer.encode(text, add_special_tokens=False), self._stop_token]
        return Completion(
            prompt_tokens=context,
            tokens=tokens,
            logprobs=[0.0] * len(tokens),
            text=text,
            stop_reason=StopReason.STOP_TOKEN,
            sampling=Sampling(temperature=0, max_tokens=len(tokens)),
            version=self.version,
        )

    @property
    def _stop_token(self) -> int:
        return self.tokenizer.eos_token_id
