"""Continuous batched decoding: rows enter and leave at any step; a shared prompt runs once.

mlx-lm provides the caches and the ragged prefill. mlx-lm's `BatchGenerator` is not used, because it
returns log-probabilities of the whole vocabulary in the model's dtype, before temperature and
truncation, and because it draws all rows from one global random state. Training needs the float32
log-probability of each sampled token, and a row must not depend on the rows beside it.
"""

from collections import deque
from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from jaxtyping import Float
from mlx_lm.models.cache import ArraysCache, make_prompt_cache

from textpolicy.adapters.adapter_state import AdapterState
from textpolicy.device_sizes import device_sizes
from textpolicy.fast_cpu.bfloat16_copies import keep_copies
from textpolicy.fast_cpu.weight_values import WeightValues, keep_weight_values
from textpolicy.generation.decode_step import launch_step, logits_by_model, record_details
from textpolicy.generation.decoding_batch import (
    DecodingBatch,
    DecodingRow,
    DrawnTokens,
    merge_batches,
)
from textpolicy.generation.prefill import prefill_prompts, prefill_replies
from textpolicy.generation.prefix_cache import PrefixCache
from textpolicy.machine import most_copied_bytes
from textpolicy.types import Sampling, StopReason

NewestVersion = Callable[[], int]
"""May put newer adapters into the model; returns the version of those that are in the model."""

_STEPS_TO_WAIT = 3
"""The number of steps for which a late reply waits for others to share its forward pass."""


class Engine:
    """Decodes rows together. Up to rounding, a row's results depend on nothing but the row.

    `submit` adds a group of rows with one prompt. `step` appends a token to every row that
    decodes, and returns the rows that end with it. Before the next step, `reply` continues such a
    row from its own KV cache, and `hold` keeps its cache until a later `reply` or `cancel`.
    `cancel` ends a row at any time.

    A group starts as soon as its rows fit into `max_rows` beside the rows that still decode; by
    default `max_rows` is that of `DeviceSizes`. A group larger than `max_rows` decodes alone. If
    not `batched`, each row decodes alone. With `launch_ahead`, the device starts the next step
    before Python reads the tokens of this step, unless a penalty needs these tokens first. With
    `prefixes`, prompts continue from texts that were read before, and the texts of rows with
    `keep_prefix` are kept for later prompts.

    `newest_version` is called before each step. Then each token of a row has a version: that of the
    adapters that computed its distribution. Keys and values in the cache stay as older versions
    have computed them, and no later prompt begins with a text that older versions have read. A step
    that was launched ahead has the version from before the call.

    Values that depend on weights alone, such as DoRA's norms, are kept until no row decodes.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        max_rows: int | None = None,
        batched: bool = True,
        launch_ahead: bool = False,
        prefixes: PrefixCache | None = None,
        newest_version: NewestVersion | None = None,
    ) -> None:
        self._prefixes = prefixes
        self._newest_version = newest_version
        self._version: int | None = None
        self._model = model
        self._weight_values: WeightValues = {}
        keep_copies(model, most_copied_bytes())
        self._max_rows = (max_rows or device_sizes().decoding_rows) if batched else 1
        self._batched = batched
        self._launch_ahead = launch_ahead
        self._waiting: deque[list[DecodingRow]] = deque()
        self._batch: DecodingBatch | None = None
        # The caches of ended rows that may continue, and the next turns of those with a reply.
        self._resting: DecodingBatch | None = None
        self._next_turns: dict[DecodingRow, DecodingRow | None] = {}
        self._has_cancelled = False
        # The number of steps that the oldest reply to a held row has waited.
        self._late: int | None = None

    @property
    def can_step(self) -> bool:
        """Whether a step would do anything: not if only held rows could make it do something."""
        if (self._batch and self._batch.unfinished) or any(self._next_turns.values()):
            return True
        room = self._max_rows - len(self._next_turns)
        return bool(self._waiting) and (not self._next_turns or len(self._waiting[0]) <= room)

    def submit(self, rows: Sequence[DecodingRow]) -> None:
        """Add rows that have one and the same context, which is read once for all of them."""
        self._waiting.extend([list(rows)] if self._batched else [[row] for row in rows])

    def hold(self, row: DecodingRow) -> None:
        """Keep the cache of a row that has just ended, until its reply is known."""
        self._next_turns[row] = None

    def reply(self, row: DecodingRow, tokens: list[int]) -> DecodingRow:
        """Return the next turn of a row that has just ended or is held; the turn decodes next."""
        if row in self._next_turns and self._late is None:
            self._late = 0
        turn = self._next_turns[row] = row.next_turn(tokens)
        return turn

    def cancel(self, row: DecodingRow) -> None:
        """End a row that waits, decodes or is held; its place is free from the next step on."""
        if row.stop_reason is None:
            row.stop_reason = StopReason.CANCELLED
            self._has_cancelled = True
        for before in [old for old, turn in self._next_turns.items() if row in (old, turn)]:
            del self._next_turns[before]
        self._forget_weights()

    def step(self) -> list[DecodingRow]:
        """Append one token to every row that decodes; return the rows that end now."""
        if self._newest_version:
            self._take_version(self._newest_version())
        self._rest_ended_rows()
        self._drop_ended_rows()
        decoding = self._batch.unfinished if self._batch else 0
        self._admit_groups()
        self._merge_replies(decoding)
        ended = self._decode_step(self._batch) if self._batch else []
        self._forget_weights()
        return ended

    def _forget_weights(self) -> None:
        # Whoever changes the weights after the last row would otherwise keep old ones in memory.
        if not self.can_step:
            self._weight_values.clear()

    def _take_version(self, version: int) -> None:
        if version != self._version and self._prefixes:
            self._prefixes.use_adapters(AdapterState.of(self._model))
        self._version = version

    def _rest_ended_rows(self) -> None:
        """Copy the caches of the rows that ended in the last step and may continue."""
        if not self._next_turns:
            self._resting = None
        if not self._next_turns or self._batch is None:
            return
        resting = {*self._resting.rows} if self._resting else set[DecodingRow]()
        new = [
            index
            for index, row in enumerate(self._batch.rows)
            if row in self._next_turns and row not in resting
        ]
        if new:
            self._resting = merge_batches(self._resting, self._batch.copy_rows(new))

    def _drop_ended_rows(self) -> None:
        if self._batch is None:
            return
        # Dropping rows copies the whole cache, so it waits until half of the rows have ended.
        if self._has_cancelled or 2 * self._batch.unfinished <= len(self._batch.rows):
            self._batch = self._batch.drop_finished()
        self._has_cancelled = False

    def _admit_groups(self) -> None:
        room = self._max_rows - len(self._next_turns)
        room -= len(self._batch.rows) if self._batch else 0
        admitted: list[list[DecodingRow]] = []
        while self._waiting:
            group = [row for row in self._waiting[0] if row.stop_reason is None]
            alone = not (admitted or self._batch or self._next_turns)
            if len(group) > room and not alone:
                break
            self._waiting.popleft()
            room -= len(group)
            admitted += [group] if group else []
        if admitted:
            self._enter(prefill_prompts(self._model, admitted, self._prefixes))

    def _merge_replies(self, decoding: int) -> None:
        """Read the replies, once there are so many that few rows wait for the forward pass."""
        replied = [row for row, turn in self._next_turns.items() if turn]
        if self._late is not None:
            self._late += 1
        overdue = self._late is not None and self._late > _STEPS_TO_WAIT
        if not replied or (len(replied) < decoding and not overdue):
            return
        self._late = None
        assert self._resting is not None
        indices = [i for i, row in enumerate(self._resting.rows) if self._next_turns.get(row)]
        held = [
            index
            for index, row in enumerate(self._resting.rows)
            if row in self._next_turns and not self._next_turns[row]
        ]
        if held:
            turns = self._resting.copy_rows(indices)
            self._resting = self._resting.keep_rows(held)
        else:
            whole = len(indices) == len(self._resting.rows)
            turns = self._resting if whole else self._resting.keep_rows(indices)
            self._resting = None
        turns.rows = [turn for row in turns.rows if (turn := self._next_turns.pop(row))]
        self._enter(prefill_replies(self._model, turns))

    def _enter(self, fresh: DecodingBatch) -> None:
        """Let rows decode whose contexts are in the cache.

        This is a function of its own so that none of its names keeps an old cache alive.
        """
        if self._batch and self._batch.pending:
            fresh.pending = self._launch(fresh)
        self._batch = merge_batches(self._batch, fresh)

    def _decode_step(self, batch: DecodingBatch) -> list[DecodingRow]:
        drawn = batch.pending or self._launch(batch)
        batch.pending = self._launch(batch) if self._can_launch(batch) else None
        # One transfer to numpy for all rows.
        numbers = zip(batch.rows, np.array(drawn.tokens), np.array(drawn.logprobs), strict=True)
        record_details(drawn.details)
        ended: list[DecodingRow] = []
        for index, (row, token, logprob) in enumerate(numbers):
            if row.stop_reason is None:
                if drawn.versions:
                    row.versions.append(drawn.versions[index])
                if row.append(int(token), float(logprob)):
                    ended.append(row)
                    if self._prefixes and self._can_keep(row, batch):
                        self._prefixes.keep(*batch.read_text(index))
                if row.on_token:
                    row.on_token(row)
        return ended

    def _launch(self, batch: DecodingBatch) -> DrawnTokens:
        with keep_weight_values(self._weight_values):
            drawn = launch_step(self._model, batch)
        if self._version is not None:
            drawn.versions = [self._version] * len(batch.rows)
        return drawn

    def _can_keep(self, row: DecodingRow, batch: DecodingBatch) -> bool:
        """Return whether later prompts may begin with the cache of a row, which has just ended."""
        of_one_version = all(version == self._version for version in row.versions)
        return row.keep_prefix and of_one_version and batch.can_take_back

    def _can_launch(self, batch: DecodingBatch) -> bool:
        """Return whether the next step may start before the tokens of this step are read."""
        if not self._launch_ahead or batch.plan.penalises:
            return False
        rows = [row for row in batch.rows if row.stop_reason is None]
        if any(row.may_continue for row in rows) and not batch.can_take_back:
            return False
        return any(len(row.tokens) < row.sampling.max_tokens - 1 for row in rows)


def can_launch_ahead() -> bool:
    """Return whether an engine should start the next step before Python reads this one."""
    # On a CPU the next step would compete with Python for the same cores.
    return mx.default_device().type == mx.gpu


def can_decode_together(model: nn.Module) -> bool:
    """Return whether rows of unequal length decode together as each row does alone.

    With mlx-lm 0.32 some architectures cannot: gemma2 applies the batch's mask to its heads, and
    recurrent states take in the padding. The check is a prompt and a reply of two rows.
    """
    prompts, replies = [[1, 2, 3, 4], [2]], [[3], [1, 4, 2]]
    try:
        together = _two_turn_logits(model, prompts, replies)
    except ValueError:
        return False
    pairs = zip(prompts, replies, strict=True)
    each = [_two_turn_logits(model, [prompt], [reply]) for prompt, reply in pairs]
    alone = mx.concatenate(each, axis=1)
    tolerance = 1e-3 if alone.dtype == mx.float32 else 0.1
    equal = float(mx.abs(together - alone).astype(mx.float32).mean()) < tolerance
    return equal and _states_leave_padding_out(model)


def _states_leave_padding_out(model: nn.Module) -> bool:
    """Return whether the states of recurrent layers are those of a row that reads alone.

    In half precision, the logits of two short rows differ by no more than rounding, where padding
    has changed the states altogether.
    """
    if not any(isinstance(layer, ArraysCache) for layer in make_prompt_cache(model)):
        return True
    short, long = [2, 3], [*range(1, 12)]
    together = prefill_prompts(model, [[_probe_row(text)] for text in (short, long)])
    alone = prefill_prompts(model, [[_probe_row(short)]])
    for ours, theirs in zip(together.cache, alone.cache, strict=True):
        states = zip(ours.cache, theirs.cache, strict=True) if isinstance(ours, ArraysCache) else ()
        for state, expected in states:
            assert state is not None and expected is not None
            difference = (state[:1] - expected).astype(mx.float32)
            if mx.linalg.norm(difference) > 0.1 * mx.linalg.norm(expected.astype(mx.float32)):
                return False
    return True


def _probe_row(context: list[int]) -> DecodingRow:
    return DecodingRow(
        context=context,
        sampling=Sampling(max_tokens=1),
        stop=lambda tokens: None,
        key=np.zeros(2, np.uint32),
        tokens=[0],
    )


def _two_turn_logits(
    model: nn.Module, prompts: list[list[int]], replies: list[list[int]]
) -> Float[mx.array, "turns rows vocab"]:
    """Return the logits after each prompt, and after a reply to the answer of one token 0."""
    rows = [_probe_row(prompt) for prompt in prompts]
    batch = prefill_prompts(model, [[row] for row in rows])
    first = logits_by_model(model, batch)
    turns = batch.copy_rows([*range(len(rows))])
    turns.rows = [row.next_turn(reply) for row, reply in zip(rows, replies, strict=True)]
    return mx.stack([first, logits_by_model(model, prefill_replies(model, turns))])
