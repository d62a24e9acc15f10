"""`ServedEngine`: requests of other threads, decoded by the one thread that may use mlx."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Lock
from typing import Any, TypeVar

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from textpolicy.generation.engine import (
    Engine,
    NewestVersion,
    can_decode_together,
    can_launch_ahead,
)
from textpolicy.generation.prefix_cache import PREFIX_BYTES, PrefixCache
from textpolicy.machine import size_text
from textpolicy.serving.cache_size import CacheSize, default_cache_bytes
from textpolicy.serving.faults import attempt_step
from textpolicy.serving.generation_request import (
    Generation,
    GenerationRequest,
    Weights,
    stop_rule_for,
)
from textpolicy.serving.refusal import (
    RefusalError,
    server_failure,
    stopping_server,
    unknown_model,
)
from textpolicy.types import StopReason

_T = TypeVar("_T")
SERVED_PREFIX_BYTES = PREFIX_BYTES // 4
"""The memory of the caches that a version of a model keeps for the next turns of conversations."""

MAX_OPEN_ROWS = 1024
"""The number of rows that may wait or decode at once; further requests are told to come later."""


@dataclass(eq=False, kw_only=True, slots=True)
class ServedModel:
    """One version of a model that requests can name. Only the engine's thread uses the engine."""

    name: str
    version: int
    parent: str | None
    model: nn.Module
    prefixes: PrefixCache
    newest_version: NewestVersion | None
    engine: Engine
    generations: list[Generation] = field(default_factory=list[Generation])

    @property
    def weights(self) -> Weights:
        """The name and the version."""
        return Weights(self.name, self.version)


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
        max_rows: int | None = None,
        max_open_rows: int = MAX_OPEN_ROWS,
        max_cache_bytes: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.model = model
        self.counts = EngineCounts()
        self._max_rows = max_rows
        self._max_open_rows = max_open_rows
        self._batched = can_decode_together(model)
        self._cache_size = CacheSize.of(model)
        self._max_cache_bytes = max_cache_bytes or default_cache_bytes()
        # Requests for which there is no memory yet, in the order in which they came.
        self._waiting: deque[Generation] = deque()
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
        self._check_size(request)
        rule = stop_rule_for(self.tokenizer, request)
        generation = Generation(request, rule, on_change, each_token=each_token)
        with self._lock:
            if self._closed:
                raise stopping_server()
            if self._open_rows + len(generation.rows) > self._max_open_rows:
                raise _full_queue(self._open_rows, len(generation.rows), self._max_open_rows)
            self._open_rows += len(generation.rows)
            self._inbox.put(lambda: self._waiting.append(generation))
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

    @property
    def _all(self) -> list[ServedModel]:
        """The versions that rows may still be sampled with, the oldest first."""
        return [*self._retiring, *self._models.values()]

    def put(
        self,
        name: str,
        model: nn.Module,
        *,
        version: int,
        parent: str | None = None,
        newest_version: NewestVersion | None = None,
    ) -> None:
        """Serve a model under a name from now on. Rows that have begun keep what they began with.

        The model may share its arrays with the other ones, as `shared_copy` makes it. See `Engine`
        for `newest_version`, which changes the adapters of the model itself, for all of its rows.
        """
        model.eval()
        self._retire(name)
        self.counts.swaps += name in self._models
        prefixes = PrefixCache(SERVED_PREFIX_BYTES)
        self._models = {
            **self._models,
            name: ServedModel(
                name=name,
                version=version,
                parent=parent,
                model=model,
                prefixes=prefixes,
                newest_version=newest_version,
                engine=self._new_engine(model, prefixes, newest_version),
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
            self._admit()

    def close(self) -> None:
        """Refuse all requests that are open, and all later ones."""
        with self._lock:
            self._closed = True
        while not self._inbox.empty():
            self._inbox.get()()
        while self._waiting:
            self._finish(self._waiting.popleft(), stopping_server())
        for served in self._all:
            self._fail_all(served, stopping_server())

    def _check_size(self, request: GenerationRequest) -> None:
        """Refuse a request that would not fit into memory if nothing else were sampled."""
        rows = len(request.prompts) * request.n
        needed = self._cache_size.bytes_of(rows, request.longest)
        if needed > self._max_cache_bytes:
            raise RefusalError(
                f"{rows} answers of up to {request.longest} tokens with their prompts need "
                f"{size_text(needed)} of memory, and this server uses at most "
                f"{size_text(self._max_cache_bytes)}. Lower max_tokens or n, or send fewer prompts",
                param="max_tokens",
                code="too_large",
            )

    def _admit(self) -> None:
        """Begin the requests that fit into memory, in the order in which they came."""
        while self._waiting and self._fits(self._waiting[0]):
            self._begin(self._waiting.popleft())

    def _fits(self, new: Generation) -> bool:
        """Return whether the caches fit into memory if every row became as long as it may."""
        needed = 0
        for served in self._all:
            together = [*served.generations]
            if served is self._models.get(new.request.model):
                together.append(new)
            rows = sum(len(one.rows) for one in together)
            # Rows that decode together are padded to the longest one.
            longest = max((one.request.longest for one in together), default=0)
            needed += self._cache_size.bytes_of(rows, longest)
        return needed <= self._max_cache_bytes

    def _begin(self, generation: Generation) -> None:
        if generation.done:
            return
        name = generation.request.model
        served = self._models.get(name)
        if served is None:
            self._finish(generation, unknown_model(name, list(self._models)))
            return
        generation.weights = served.weights
        served.generations.append(generation)
        self.counts.prompt_tokens += sum(map(len, generation.request.prompts))
        for group in generation.groups():
            served.engine.submit(group)

    def _cancel(self, generation: Generation) -> None:
        if generation.done:
            return
        served = next((one for one in self._all if generation in one.generations), None)
        for row in generation.rows:
            if served is not None:
                served.engine.cancel(row)
            row.stop_reason = row.stop_reason or StopReason.CANCELLED
        if served is not None:
            served.generations.remove(generation)
            self._free_if_idle(served)
        self._finish(generation)

    def _step_all(self) -> bool:
        """Step each engine that has something to do; return whether one had."""
        stepped = False
        for served in self._all:
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
            served.engine = self._new_engine(served.model, served.prefixes, served.newest_version)

    def _new_engine(
        self, model: nn.Module, prefixes: PrefixCache, newest_version: NewestVersion | None
    ) -> Engine:
        return Engine(
            model,
            max_rows=self._max_rows,
            batched=self._batched,
            launch_ahead=can_launch_ahead(),
            prefixes=prefixes,
            newest_version=newest_version,
        )

    def _retire(self, name: str) -> None:
        if (old := self._models.get(name)) and old.generations:
            self._retiring.append(old)


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
