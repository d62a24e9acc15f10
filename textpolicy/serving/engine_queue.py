"""`ServedEngine`: requests of other threads, decoded by the one thread that may use mlx."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Lock
from typing import Any, TypeVar

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from textpolicy.generation.decoding_batch import DecodingRow, StopRule
from textpolicy.generation.engine import (
    MAX_DECODING_ROWS,
    Engine,
    can_decode_together,
    can_launch_ahead,
)
from textpolicy.generation.prefix_cache import PREFIX_BYTES, PrefixCache
from textpolicy.generation.sampling import random_keys
from textpolicy.generation.stop_rules import StopAtStrings
from textpolicy.serving.faults import attempt_step
from textpolicy.serving.refusal import (
    RefusalError,
    server_failure,
    stopping_server,
    unknown_model,
)
from textpolicy.types import Sampling, StopReason

_T = TypeVar("_T")
MAX_OPEN_ROWS = 1024
"""The number of rows that may wait or decode at once; further requests are told to come later."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """What a client wants to be sampled: `n` rows for each prompt, as token ids, already checked.

    The rows are those that `ModelPolicy.generate` samples for the same prompts, `n` and seed.
    """

    model: str
    prompts: Sequence[list[int]]
    sampling: Sampling
    seed: int
    n: int = 1
    stop_tokens: frozenset[int] = frozenset()
    top_logprobs: int | None = None


class Generation:
    """A request in the engine. The engine's thread writes it, and all other threads only read it.

    The first `lengths[i]` tokens of `rows[i]` may be read at any time. `served` is the model and
    the version that the rows sample with, once they have begun. When `done`, all rows have ended,
    or `refusal` says why they have not.
    """

    def __init__(
        self,
        request: GenerationRequest,
        rule: StopRule,
        on_change: "Callable[[Generation], None]",
        *,
        each_token: bool,
    ) -> None:
        self.request = request
        self.on_change = on_change
        self.each_token = each_token
        self.served: ServedModel | None = None
        self.refusal: RefusalError | None = None
        self.done = False
        self.changed = False
        n = request.n
        numbers = [(p, m) for p in range(len(request.prompts)) for m in range(n)]
        keys = random_keys(request.seed, numbers)
        self.rows = [
            DecodingRow(
                context=request.prompts[prompt],
                sampling=request.sampling,
                stop=rule,
                key=key,
                prompt=prompt,
                member=member,
                top_logprobs=request.top_logprobs,
                on_token=self._advance,
                keep_prefix=n == 1,
            )
            for (prompt, member), key in zip(numbers, keys, strict=True)
        ]
        self.lengths = [0] * len(self.rows)
        self.unfinished = len(self.rows)

    def groups(self) -> list[list[DecodingRow]]:
        """Return the rows of each prompt."""
        n = self.request.n
        return [self.rows[start : start + n] for start in range(0, len(self.rows), n)]

    def _advance(self, row: DecodingRow) -> None:
        self.lengths[row.prompt * self.request.n + row.member] = len(row.tokens)
        self.unfinished -= row.stop_reason is not None
        self.changed = True


@dataclass(eq=False, kw_only=True, slots=True)
class ServedModel:
    """One version of a model that requests can name. Only the engine's thread uses the engine."""

    name: str
    version: int
    parent: str | None
    model: nn.Module
    prefixes: PrefixCache
    engine: Engine
    generations: list[Generation] = field(default_factory=list[Generation])


@dataclass(slots=True)
class EngineCounts:
    """What the engine has done since its start; one thread writes, others may read."""

    steps: int = 0
    prompt_tokens: int = 0
    sampled_tokens: int = 0
    finished_rows: int = 0
    failed_steps: int = 0
    swaps: int = 0


class ServedEngine:
    """Decodes the requests of all threads in the thread that calls `run`.

    Each version of each model has an engine of its own over arrays that all share, and the engines
    step by turns: rows of one version decode in one batch, and every version advances. A new
    version changes nothing for rows that have begun, and the old one is dropped with its last row.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: TokenizerWrapper,
        *,
        max_rows: int = MAX_DECODING_ROWS,
        max_open_rows: int = MAX_OPEN_ROWS,
    ) -> None:
        self.tokenizer = tokenizer
        self.model = model
        self.counts = EngineCounts()
        self._max_rows = max_rows
        self._max_open_rows = max_open_rows
        self._batched = can_decode_together(model)
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._lock = Lock()
        self._open_rows = 0
        self._closed = False
        # Replaced as a whole, so that other threads may read it at any time.
        self._models: dict[str, ServedModel] = {}
        self._retiring: list[ServedModel] = []

    # Any thread

    @property
    def models(self) -> dict[str, ServedModel]:
        """The newest version of each model, by name."""
        return self._models

    @property
    def open_rows(self) -> int:
        """The number of rows that wait or decode."""
        return self._open_rows

    def submit(
        self,
        request: GenerationRequest,
        on_change: Callable[[Generation], None],
        *,
        each_token: bool = False,
    ) -> Generation:
        """Queue a request. Raise `RefusalError` if its model is unknown or the queue is full.

        The engine's thread calls `on_change` when the request is done, and with `each_token` also
        after each step that sampled a token of it.
        """
        if request.model not in self._models:
            raise unknown_model(request.model, list(self._models))
        rule = _stop_rule(self.tokenizer, request)
        generation = Generation(request, rule, on_change, each_token=each_token)
        with self._lock:
            if self._closed:
                raise stopping_server()
            if self._open_rows + len(generation.rows) > self._max_open_rows:
                raise _full_queue(self._open_rows, len(generation.rows), self._max_open_rows)
            self._open_rows += len(generation.rows)
        self._inbox.put(lambda: self._begin(generation))
        return generation

    def cancel(self, generation: Generation) -> None:
        """End a request that nobody waits for any more; its places are free at the next step."""
        self._inbox.put(lambda: self._cancel(generation))

    def call(self, function: Callable[[], _T]) -> "Future[_T]":
        """Let the engine's thread call a function between two steps; return its future result."""
        future: Future[_T] = Future()
        self._inbox.put(lambda: _fill(future, function))
        return future

    def wake(self) -> None:
        """Let `run` look at its `until` again."""
        self._inbox.put(lambda: None)

    # The thread that owns mlx

    def put(self, name: str, model: nn.Module, *, version: int, parent: str | None = None) -> None:
        """Serve a model under a name from now on. Rows that have begun keep what they began with.

        The model may share its arrays with the other ones, as `shared_copy` makes it.
        """
        model.eval()
        self._retire(name)
        self.counts.swaps += name in self._models
        prefixes = PrefixCache(PREFIX_BYTES // 4)
        self._models = {
            **self._models,
            name: ServedModel(
                name=name,
                version=version,
                parent=parent,
                model=model,
                prefixes=prefixes,
                engine=self._new_engine(model, prefixes),
            ),
        }

    def remove(self, name: str) -> None:
        """Serve a name no more. Rows that have begun go on to their end."""
        self._retire(name)
        self._models = {known: one for known, one in self._models.items() if known != name}

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        """Decode until `until()` is true. It is asked after each step, and when `wake` is called.

        While nothing is to be decoded the thread sleeps.
        """
        while not until():
            if not self._step_all():
                self._inbox.get()()
            while not self._inbox.empty():
                self._inbox.get()()

    def close(self) -> None:
        """Refuse all requests that are open, and all later ones."""
        with self._lock:
            self._closed = True
        while not self._inbox.empty():
            self._inbox.get()()
        for served in [*self._models.values(), *self._retiring]:
            self._fail_all(served, stopping_server())

    def _begin(self, generation: Generation) -> None:
        served = self._models.get(generation.request.model)
        if generation.done:
            return
        if served is None or self._closed:
            name = generation.request.model
            gone = stopping_server() if served else unknown_model(name, list(self._models))
            self._finish(generation, gone)
            return
        generation.served = served
        served.generations.append(generation)
        self.counts.prompt_tokens += sum(map(len, generation.request.prompts))
        for group in generation.groups():
            served.engine.submit(group)

    def _cancel(self, generation: Generation) -> None:
        if generation.done:
            return
        for row in generation.rows:
            if generation.served:
                generation.served.engine.cancel(row)
            row.stop_reason = row.stop_reason or StopReason.CANCELLED
        if served := generation.served:
            served.generations.remove(generation)
            self._free_if_idle(served)
        self._finish(generation)

    def _step_all(self) -> bool:
        """Step each engine that has something to do; return whether one had."""
        stepped = False
        for served in [*self._retiring, *self._models.values()]:
            if served.engine.can_step:
                self._step(served)
                stepped = True
        self._retiring = [served for served in self._retiring if served.generations]
        return stepped

    def _step(self, served: ServedModel) -> None:
        _, failure = attempt_step(served.engine.step)
        self.counts.steps += 1
        if failure:
            self.counts.failed_steps += 1
            self._fail_all(served, server_failure(f"sampling failed: {failure}"))
        for generation in [one for one in served.generations if one.changed]:
            generation.changed = False
            if not generation.unfinished:
                served.generations.remove(generation)
                self._finish(generation)
            elif generation.each_token:
                generation.on_change(generation)
        self._free_if_idle(served)

    def _fail_all(self, served: ServedModel, refusal: RefusalError) -> None:
        while served.generations:
            self._finish(served.generations.pop(), refusal)

    def _finish(self, generation: Generation, refusal: RefusalError | None = None) -> None:
        generation.refusal = refusal
        generation.done = True
        self.counts.finished_rows += len(generation.rows)
        self.counts.sampled_tokens += sum(len(row.tokens) for row in generation.rows)
        with self._lock:
            self._open_rows -= len(generation.rows)
        generation.on_change(generation)

    def _free_if_idle(self, served: ServedModel) -> None:
        """Drop the KV cache of the last batch when no row is left."""
        if not served.generations:
            served.engine = self._new_engine(served.model, served.prefixes)

    def _new_engine(self, model: nn.Module, prefixes: PrefixCache) -> Engine:
        return Engine(
            model,
            max_rows=self._max_rows,
            batched=self._batched,
            launch_ahead=can_launch_ahead(),
            prefixes=prefixes,
        )

    def _retire(self, name: str) -> None:
        if (old := self._models.get(name)) and old.generations:
            self._retiring.append(old)


def _stop_rule(tokenizer: TokenizerWrapper, request: GenerationRequest) -> StopRule:
    ends = StopAtStrings(tokenizer, request.sampling.stop)
    if not request.stop_tokens:
        return ends

    def rule(tokens: list[int]) -> StopReason | None:
        return StopReason.STOP_TOKEN if tokens[-1] in request.stop_tokens else ends(tokens)

    return rule


def _fill(future: "Future[Any]", function: Callable[[], Any]) -> None:
    """Put into the future what the function returns or raises."""
    if future.set_running_or_notify_cancel():
        result, failure = attempt_step(function)
        if failure is None:
            future.set_result(result)
        else:
            future.set_exception(RefusalError(failure))


def _full_queue(open_rows: int, rows: int, most: int) -> RefusalError:
    if rows > most:
        return RefusalError(
            f"the request asks for {rows} completions at once; at most {most} are possible. Lower "
            "n, or send fewer prompts in a request",
            param="n",
        )
    return RefusalError(
        f"{open_rows} completions wait or are being sampled, and at most {most} may. Ask again "
        "in a second",
        status=429,
        kind="rate_limit_error",
        code="queue_full",
        headers={"Retry-After": "1"},
    )
