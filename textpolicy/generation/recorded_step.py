"""Decode steps that build their graph from a record, without running the model's Python code.

On a CPU, Python takes up to a third of a decode step of a small model to call some thousand
operations, which are the same in each step. Once steps look alike, `mx.compile` records them, and
then builds the same graph from the record. Nothing in a record depends on how much of the cache is
used: new keys and values go to a position that is an array, and a mask hides the unused positions.
"""

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from operator import is_
from typing import Any
from weakref import WeakValueDictionary

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Bool, Float, Int, Integer

from textpolicy.fast_cpu.gradients import without_gradients
from textpolicy.fast_cpu.mlx_operations import can_record, recording
from textpolicy.fast_cpu.rotary import one_step
from textpolicy.generation.decode_step import logits_by_model
from textpolicy.generation.decoding_batch import DecodingBatch, DecodingCache

_STEPS_BEFORE = 10
"""A record takes about the time that so many steps save by it."""
_MOST_RECORDS = 8
_TOLERANCE = 1e-3
# What a model may raise that asks its cache for more than a record can answer.
_NOT_RECORDED = (AttributeError, TypeError, ValueError, RuntimeError, LookupError)
_RECORDED_RIGHT: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()
"""By their ids, the models whose first record gave the model's own logits."""

Logits = Float[mx.array, "rows vocab"]
Positions = Int[mx.array, " rows"]
Keys = Float[mx.array, "rows heads positions width"]
NewKeys = Float[mx.array, "rows heads 1 width"]


class StepRecorder:
    """Computes the logits of decode steps by a model, or from a record of its operations.

    There is a record for each set of shapes that some steps in a row have had. It holds the
    arrays of the model. When a layer has another array or another option, all records are dropped;
    an array that is changed in place is not noticed, so call `forget` before. A model whose first
    record gives other logits than the model is not recorded again.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._can_record = can_record()
        self._records: dict[Any, Callable[..., _Outputs]] = {}
        self._contents: _Contents | None = None
        self._shapes: Any = None
        self._alike = 0

    def next_logits(self, batch: DecodingBatch) -> Logits:
        """Return the logits after the last tokens, which enter the KV cache."""
        if not self._can_record or not _has_known_room(batch):
            return logits_by_model(self._model, batch)
        if self._contents and not self._contents.are_current():
            self.forget()
        inputs = _inputs_of(batch)
        shapes = _shapes_of(inputs)
        if shapes not in self._records:
            self._alike = self._alike + 1 if shapes == self._shapes else 1
            self._shapes = shapes
            if self._alike <= _STEPS_BEFORE or not self._record(batch, inputs, shapes):
                return logits_by_model(self._model, batch)
        logits, offset, keys, values = self._records[shapes](*inputs)
        for layer, new_keys, new_values in zip(batch.cache, keys, values, strict=True):
            layer.take_step(new_keys, new_values, offset)
        return logits

    def forget(self) -> None:
        """Drop all records, and with them the arrays of the model."""
        self._records, self._contents = {}, None

    def _record(self, batch: DecodingBatch, inputs: tuple[Any, ...], shapes: Any) -> bool:
        """Record a step with these inputs; return whether that was possible."""
        contents = self._contents or _Contents(self._model)
        # What is not computed yet would be computed anew in each step.
        mx.eval(contents.arrays)
        record = mx.compile(partial(_step, self._model))
        try:
            with recording():
                logits, *_ = record(*inputs)
        except _NOT_RECORDED:
            self._can_record = False
            return False
        if _RECORDED_RIGHT.get(id(self._model)) is not self._model:
            expected = logits_by_model(self._model, replace(batch, cache=deepcopy(batch.cache)))
            if not _are_close(logits, expected):
                self._can_record = False
                return False
            _RECORDED_RIGHT[id(self._model)] = self._model
        while len(self._records) >= _MOST_RECORDS:
            del self._records[next(iter(self._records))]
        self._records[shapes] = record
        self._contents = contents
        return True


_Outputs = tuple[Logits, Positions, list[Keys], list[Keys]]


def _inputs_of(batch: DecodingBatch) -> tuple[Any, ...]:
    """Return the arrays of a step, in the order in which `_step` takes them."""
    first = batch.cache[0]
    return (
        batch.last_tokens,
        first.left_padding,
        first.offset,
        mx.array([first.used]),
        [layer.keys for layer in batch.cache],
        [layer.values for layer in batch.cache],
    )


def _shapes_of(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple((array.shape, array.dtype) for array in chain(inputs[:-2], *inputs[-2:]))


def _step(
    model: Any,
    tokens: Integer[mx.array, " rows"],
    padding: Positions,
    offset: Positions,
    end: Int[mx.array, "1"],
    keys: list[Keys],
    values: list[Keys],
) -> _Outputs:
    """Return the logits of a step, the positions of the next tokens, and the new cache."""
    position = mx.arange(keys[0].shape[2])
    mask = (position >= padding[:, None]) & (position <= end)
    pairs = zip(keys, values, strict=True)
    layers = [_RecordedCache(*pair, offset, end, mask[:, None, None]) for pair in pairs]
    with one_step([offset]), without_gradients():
        logits = model(tokens[:, None], cache=layers)[:, -1, :]
    return logits, offset + 1, [layer.keys for layer in layers], [layer.values for layer in layers]


@dataclass(slots=True)
class _RecordedCache:
    """What a layer sees of its cache in a record: no number that changes from step to step."""

    keys: Keys
    values: Keys
    offset: Positions
    end: Int[mx.array, "1"]
    mask: Bool[mx.array, "rows 1 1 positions"]

    def update_and_fetch(self, keys: NewKeys, values: NewKeys) -> tuple[Keys, Keys]:
        """Return all positions, with the new keys and values at the first unused one."""
        self.keys = mx.slice_update(self.keys, keys, self.end, axes=(2,))
        self.values = mx.slice_update(self.values, values, self.end, axes=(2,))
        return self.keys, self.values

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """Return the mask that hides unused positions."""
        if N != 1 or window_size is not None:
            raise ValueError("a record has no mask for this")
        return self.mask


def _has_known_room(batch: DecodingBatch) -> bool:
    """Return whether all layers have the same next position, which is in their memory."""
    return (
        all(type(layer) is DecodingCache and layer.has_room for layer in batch.cache)
        and len({layer.used for layer in batch.cache}) == 1
        and batch.cache[0].keys.dtype == mx.float32
    )


def _are_close(logits: Logits, expected: Logits) -> bool:
    logits, expected = logits.astype(mx.float32), expected.astype(mx.float32)
    return bool(mx.abs(logits - expected).max() <= _TOLERANCE * mx.abs(expected).max())


class _Contents:
    """The arrays and options of all layers of a model, as they were."""

    def __init__(self, model: nn.Module) -> None:
        self._live: list[Iterable[Any]] = []
        self._add(model)
        self._before = [*self._now()]

    def _add(self, container: Any) -> None:
        if isinstance(container, nn.Module):
            self._live.append(vars(container).values())
        values = container.values() if isinstance(container, dict) else container
        self._live.append(values)
        for value in values:
            if isinstance(value, (dict, list, tuple)):
                self._add(value)

    def _now(self) -> Iterable[Any]:
        # The end is one of the values: a new value at the end is found, and a missing one.
        return chain(chain.from_iterable(self._live), (_Contents,))

    @property
    def arrays(self) -> list[mx.array]:
        return [value for value in self._before if isinstance(value, mx.array)]

    def are_current(self) -> bool:
        """Return whether each layer has the same objects as before. This takes microseconds."""
        return all(map(is_, self._now(), self._before))
