"""A policy that samples from an MLX language model: prompts in, completions out."""

import secrets
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, Literal

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from textpolicy.activity import doing
from textpolicy.adapters.adapter import digest_of
from textpolicy.adapters.adapter_state import AdapterState
from textpolicy.adapters.container import AdapterContainer, adapted_copy
from textpolicy.adapters.merged_copy import MergedCopy
from textpolicy.adapters.publishing import AdapterWatcher
from textpolicy.chat_template import check_arguments
from textpolicy.errors import ConfigError
from textpolicy.generation.decode import LateReply, RespondToRow, decode
from textpolicy.generation.decoding_batch import DecodingRow
from textpolicy.generation.engine import (
    Engine,
    NewestVersion,
    can_decode_together,
    can_launch_ahead,
)
from textpolicy.generation.prefix_cache import PrefixCache
from textpolicy.generation.prompts import (
    check_prompt,
    decode_text,
    encode_prompt,
    encode_reply,
    has_room,
)
from textpolicy.generation.sampling import random_keys
from textpolicy.generation.stop_rules import StopAtStrings
from textpolicy.generation.streamed_text import StreamedText
from textpolicy.generation.thinking import ThoughtReader
from textpolicy.machine import memory_bytes, size_text
from textpolicy.runs import find_adapter
from textpolicy.types import Completion, Message, Prompt, RespondFn, Sampling, StopReason
from textpolicy.user_code import WaitingCalls

# Measured with 512 rollouts of 20 tokens: Python objects, at the most that are held at once.
_ROLLOUT_BYTES, _TOKEN_BYTES = 1000, 60


def rollout_bytes(tokens: int) -> int:
    """Return the bytes that a completion takes as Python objects, with the prompt's tokens."""
    return _ROLLOUT_BYTES + _TOKEN_BYTES * tokens


class ModelPolicy:
    """A `ConversingPolicy` that samples with the adapters that its model has at that moment.

    With `follow`, the policy reloads the adapter file at that path before a generation whenever
    the file is new. With `swap="tokens"`, it does so before each step of a generation too, and
    completions have `versions`; if `load_newer` is set, it is called there instead. With `seed`,
    the sequence of generations is repeatable. With `allow_special_tokens`, prompts and replies may
    spell control tokens such as <|im_end|>.
    `chat_template_kwargs` are arguments of the chat template, such as {"enable_thinking": False}.
    With `merge_adapters`, the policy samples from a copy of the model whose float32 weights include
    the adapters. The weights are merged anew for each version of the adapters. The samples are the
    same up to rounding, and the adapted weights take their memory once more.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: TokenizerWrapper,
        sampling: Sampling,
        *,
        follow: Path | None = None,
        swap: Literal["completions", "tokens"] = "completions",
        seed: int | None = None,
        max_rows: int | None = None,
        allow_special_tokens: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        merge_adapters: bool = False,
    ) -> None:
        check_arguments(tokenizer, chat_template_kwargs)
        # With dropout, the policy would sample from another distribution than the trained one.
        model.eval()
        self.model = model
        self.tokenizer = tokenizer
        self.sampling = sampling
        self._watcher = AdapterWatcher(follow) if follow else None
        self._swap = swap
        self.load_newer: Callable[[], bool] | None = None
        """Loads newer adapters if there are any, and returns whether there were."""
        self._seed = secrets.randbits(32) if seed is None else seed
        self._generations = 0
        self._max_rows = max_rows
        self.allow_special_tokens = allow_special_tokens
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self._thoughts = ThoughtReader(tokenizer, chat_template_kwargs)
        self._replies = WaitingCalls()
        self._prefixes = PrefixCache()
        self._merged = MergedCopy(model) if merge_adapters else None

    def __call__(self, prompt: Prompt) -> Completion:
        """Return one completion of one prompt."""
        return self.generate([prompt])[0][0]

    def encode(self, prompt: Prompt) -> list[int]:
        """Return the tokens that the model reads before its answer to a prompt."""
        return encode_prompt(
            self.tokenizer,
            prompt,
            allow_special_tokens=self.allow_special_tokens,
            chat_template_kwargs=self.chat_template_kwargs,
        )

    @cached_property
    def _batched(self) -> bool:
        return can_decode_together(self.model)

    def sampled_model(self) -> nn.Module:
        """Return the model that computes the tokens: `model`, or its copy with merged weights.

        The copy has new merged weights if the adapters of `model` are new.
        """
        return self._merged.refresh() if self._merged else self.model

    @property
    def version(self) -> int:
        container = AdapterContainer.of(self.model)
        return container.version if container else 0

    @doing("reloading the adapters")
    def reload(self, path: str | Path) -> int:
        container = AdapterContainer.of(self.model)
        if container is None:
            return AdapterContainer.from_directory(path).load(self.model).version
        return container.swap(path)

    @property
    def newest_version(self) -> NewestVersion | None:
        """What an engine calls before each step, or None if it must keep the adapters it has."""
        if self._swap == "completions":
            return None
        load_newer = self.load_newer or partial(self._load_followed, between_tokens=True)
        # Finding the adapters goes through all layers of the model.
        version = self.version

        def newest() -> int:
            nonlocal version
            if load_newer():
                version = self.version
                # The engine decodes with the model that this call changes.
                _ = self.sampled_model()
            return version

        return newest

    def _load_followed(self, *, between_tokens: bool = False) -> bool:
        """Load the followed file if it is new, and return whether it was."""
        watcher = self._watcher
        if not watcher or not (path := watcher.poll(at_a_glance=between_tokens)):
            return False
        self.reload(path)
        watcher.accept()
        return True

    def with_adapter(self, source: str | Path | None) -> "ModelPolicy":
        """Return a policy that samples alike over the same base, with another adapter or none.

        `source` is a file, a folder, a run, or a version of a run, as `find_adapter` takes it. The
        policies share the base arrays, and neither changes the other.
        """
        return ModelPolicy(
            adapted_copy(self.model, None if source is None else find_adapter(source)),
            self.tokenizer,
            self.sampling,
            seed=self._seed,
            max_rows=self._max_rows,
            allow_special_tokens=self.allow_special_tokens,
            chat_template_kwargs=self.chat_template_kwargs,
            merge_adapters=self._merged is not None,
        )

    def with_sampling(self, sampling: Sampling) -> "ModelPolicy":
        """Return a policy that samples in another way from the same (merged) weights.

        It follows no file: it has the adapters that the model has.
        """
        made = ModelPolicy(
            self.model,
            self.tokenizer,
            sampling,
            seed=self._seed,
            max_rows=self._max_rows,
            allow_special_tokens=self.allow_special_tokens,
            chat_template_kwargs=self.chat_template_kwargs,
        )
        made._merged = self._merged
        return made

    def adapter_digest(self) -> str:
        """Return a hash of the tensors of the adapter, which is the same for no adapters."""
        container = AdapterContainer.of(self.model)
        return digest_of(container.parameters() if container else {})

    def generate(
        self, prompts: Sequence[Prompt], *, n: int = 1, seed: int | None = None, first: int = 0
    ) -> list[list[Completion]]:
        groups = self._decode(prompts, n, seed, first, None)
        version = self.version
        return [[self._completion(row, version) for row in group] for group in groups]

    def converse(
        self,
        prompts: Sequence[Prompt],
        respond: RespondFn,
        *,
        n: int = 1,
        seed: int | None = None,
        first: int = 0,
    ) -> list[list[list[Completion]]]:
        """See `ConversingPolicy`. A row also ends when its context has no room for an answer."""
        turns_P_N: list[list[list[Completion]]] = [[[] for _ in range(n)] for _ in prompts]
        # Read once, after the reload: finding the adapters goes through all layers of the model.
        version = cache(lambda: self.version)

        def respond_to_row(row: DecodingRow) -> list[int] | LateReply | None:
            completion = self._completion(row, version())
            turns_P_N[row.prompt][row.member].append(completion)
            future = self._replies.start(respond, row.prompt, row.member, completion)
            late = LateReply(future, lambda: self._reply_tokens(row, future.result()))
            return late.read() if future.done() else late

        try:
            self._decode(prompts, n, seed, first, respond_to_row)
        finally:
            self._replies.drop()
        return turns_P_N

    def stream(
        self, prompt: Prompt, *, seed: int | None = None
    ) -> Generator[str, None, StopReason]:
        """Yield the text of one completion piece by piece, the completion of `generate`.

        The generator returns why the completion has ended. What the model has read of an earlier
        prompt or answer of `stream` is not read again.
        """
        ((prompt_tokens,), seed) = self._prepare([prompt], 1, seed)
        self._prefixes.use_adapters(AdapterState.of(self.model))
        engine = Engine(
            self.sampled_model(), launch_ahead=can_launch_ahead(), prefixes=self._prefixes
        )
        row = DecodingRow(
            context=prompt_tokens,
            sampling=self.sampling,
            stop=StopAtStrings(self.tokenizer, self.sampling.stop),
            key=random_keys(seed, [(0, 0)])[0],
            keep_prefix=True,
        )
        engine.submit([row])
        text = StreamedText(self.tokenizer)
        with doing("sampling", 1, begins=True):
            while engine.can_step:
                engine.step()
                if piece := text.next_piece(row.tokens, ended=row.stop_reason is not None):
                    yield piece
        assert row.stop_reason is not None
        return row.stop_reason

    def _reply_tokens(
        self, row: DecodingRow, replies: Sequence[Message] | None
    ) -> list[int] | None:
        if replies is None:
            return None
        reply = encode_reply(
            self.tokenizer,
            replies,
            row.tokens[-1],
            allow_special_tokens=self.allow_special_tokens,
            chat_template_kwargs=self.chat_template_kwargs,
        )
        length = len(row.context) + len(row.tokens) + len(reply)
        return reply if has_room(self.model, length, self.sampling.max_tokens) else None

    def _decode(
        self,
        prompts: Sequence[Prompt],
        n: int,
        seed: int | None,
        first: int,
        respond: RespondToRow | None,
    ) -> list[list[DecodingRow]]:
        prompt_tokens, seed = self._prepare(prompts, n, seed)
        with doing("sampling", n * len(prompts), begins=True) as activity:
            return decode(
                self.sampled_model(),
                prompt_tokens,
                n=n,
                sampling=self.sampling,
                stop=StopAtStrings(self.tokenizer, self.sampling.stop),
                seed=seed,
                first=first,
                max_rows=self._max_rows,
                batched=self._batched,
                launch_ahead=can_launch_ahead(),
                newest_version=self.newest_version,
                respond=respond,
                on_ended=activity.advance,
            )

    def _prepare(
        self, prompts: Sequence[Prompt], n: int, seed: int | None
    ) -> tuple[list[list[int]], int]:
        """Reload changed adapters; return the checked tokens of the prompts, and the seed."""
        if n < 1:
            raise ConfigError(f"n is {n}; expected at least 1 completion of each prompt")
        self._check_memory(n * len(prompts))
        self._load_followed()
        prompt_tokens = [self.encode(prompt) for prompt in prompts]
        for tokens in prompt_tokens:
            check_prompt(self.model, tokens, self.sampling.max_tokens)
        if seed is None:
            self._generations += 1
            seed = (self._seed << 32) + self._generations
        return prompt_tokens, seed

    def _check_memory(self, completions: int) -> None:
        """Raise `ConfigError` if so many completions do not fit into memory as Python objects."""
        needed, there = completions * rollout_bytes(self.sampling.max_tokens), memory_bytes()
        if needed > there:
            raise ConfigError(
                f"{completions:,} completions of up to {self.sampling.max_tokens:,} tokens need "
                f"about {size_text(needed)} of memory, and this machine has {size_text(there)}. "
                "Sample fewer at once, or fewer tokens"
            )

    def _completion(self, row: DecodingRow, version: int) -> Completion:
        assert row.stop_reason is not None
        text = decode_text(self.tokenizer, row.tokens)
        in_thought = self._thoughts.begins_inside(row.context)
        thought, answer = self._thoughts.split(row.tokens, text, in_thought=in_thought)
        return Completion(
            prompt_tokens=row.context,
            tokens=row.tokens,
            logprobs=row.logprobs,
            text=text,
            stop_reason=row.stop_reason,
            sampling=self.sampling,
            version=min(row.versions, default=version),
            versions=row.mixed_versions,
            in_thought=in_thought,
            thought=thought,
            answer=answer,
        )
