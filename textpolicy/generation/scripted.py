"""A policy that answers from a script, with a model's tokens: its rollouts are demonstrations."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from mlx_lm.tokenizer_utils import TokenizerWrapper

from textpolicy.errors import ConfigError
from textpolicy.generation.prompts import encode_prompt, encode_reply
from textpolicy.types import Completion, Message, Prompt, RespondFn, Sampling, StopReason


class ScriptedPolicy:
    """A `ConversingPolicy` that answers prompt p with `scripts[p]`, one text for each turn.

    With `first`, prompt p is answered with `scripts[first + p]`. After the last text of a script,
    the policy repeats the last text. The rollouts have the tokens and the mask that a model's
    rollouts would have, and log-probabilities of 0: they are for supervised training, never for a
    policy loss.
    """

    version = 0

    def __init__(self, tokenizer: TokenizerWrapper, scripts: Sequence[Sequence[str]]) -> None:
        self.tokenizer = tokenizer
        self.scripts = scripts

    def reload(self, path: str | Path) -> int:
        raise ConfigError(f"a scripted policy has no model, so it cannot load adapters from {path}")

    def generate(
        self, prompts: Sequence[Prompt], *, n: int = 1, seed: int | None = None, first: int = 0
    ) -> list[list[Completion]]:
        turns = self.converse(prompts, lambda prompt, member, completion: None, n=n, first=first)
        return [[completion for (completion,) in group] for group in turns]

    def converse(
        self,
        prompts: Sequence[Prompt],
        respond: RespondFn,
        *,
        n: int = 1,
        seed: int | None = None,
        first: int = 0,
    ) -> list[list[list[Completion]]]:
        return [
            [
                self._play_script(self.scripts[first + p], prompt, partial(respond, p, member))
                for member in range(n)
            ]
            for p, prompt in enumerate(prompts)
        ]

    def _play_script(
        self,
        script: Sequence[str],
        prompt: Prompt,
        respond: Callable[[Completion], Sequence[Message] | None],
    ) -> list[Completion]:
        context = encode_prompt(self.tokenizer, prompt)
        turns: list[Completion] = []
        while True:
            text = script[min(len(turns), len(script) - 1)]
            turns.append(completion := self._complete(context, text))
            replies = respond(completion)
            if replies is None:
                return turns
            history = context + completion.tokens
            context = history + encode_reply(self.tokenizer, replies, history[-1])

    def _complete(self, context: list[int], text: str) -> Completion:
        answer = self.tokenizer.encode(text, add_special_tokens=False)
        tokens = [*answer, self.tokenizer.eos_token_id]
        return Completion(
            prompt_tokens=context,
            tokens=tokens,
            logprobs=[0.0] * len(tokens),
            text=text,
            stop_reason=StopReason.STOP_TOKEN,
            sampling=Sampling(temperature=0, max_tokens=len(tokens)),
            version=self.version,
        )
