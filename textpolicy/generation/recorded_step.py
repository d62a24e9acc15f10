"""Decode steps that build their graph from a record, without running the model's Python code.

On a CPU, Python takes a good part of a decode step of a small model to call some thousand
operations, which are the same in each step. `mx.compile` records them once, and later steps build
their graph from the record. A record has no number that changes from step to step: the position of
new keys and values is in an array, and a mask hides the unused positions.
"""

import threading
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

from textpolicy.adapters.layers.weight_values import WeightValues, keep_weight_values
from textpolicy.errors import ModelError
from textpolicy.fast_cpu.decoder_block import has_compiled_steps
from textpolicy.fast_cpu.gradients import without_gradients
from textpolicy.fast_cpu.mlx_operations import can_record, recording
from textpolicy.fast_cpu.rotary import one_step
from textpolicy.generation.decode_step import logits_by_model
from textpolicy.generation.decoding_batch import DecodingBatch, DecodingCache
from textpolicy.user_code.faults import raise_user_errors_as

_STEPS_BEFORE = 10
"""A record and its comparison take about as long as so many steps save."""
_MOST_RECORDS = 8
# Of the largest logit: more than rounding gives, and less than a wrong position does.
_TOLERANCE = 1e-4
_REFUSED: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()
"""By their ids, the models that cannot be recorded."""

_Logits = Float[mx.array, "rows vocab"]
_Positions = Int[mx.array, " rows"]
_Keys = Float[mx.array, "rows heads positions width"]
_Values = Float[mx.array, "rows value_heads positions value_width"]
_NewKeys = Float[mx.array, "rows heads 1 width"]
_NewValues = Float[mx.array, "rows value_heads 1 value_width"]


class StepRecorder:
    """Computes the logits of decode steps by a model, or from a record of its operations.

    A step is recorded after ten steps of the same shapes, if there is room in the cache for as
    many more, and the first logits are compared with the model's. A record holds the arrays of the
    model. When a layer has another array or another option, all records are dropped; what is
    changed in place is not noticed, so call `forget` before. A model that cannot be recorded, or
    gives other logits than its record, computes all steps itself. So does a model whose blocks are
    compiled (`decoder_block.py`), which has few operations to record.
    """

    def __init__(self, model: nn.Module, *, record: bool = True) -> None:
        self._model = model
        refused = _REFUSED.get(id(model)) is model or has_compiled_steps(model)
        self._can_record = record and not refused and can_record()
        self._records: dict[Any, Callable[..., _Outputs]] = {}
        self._contents: _Contents | None = None
        self._weight_values: WeightValues = {}
        self._shapes: Any = None
        self._equal_steps = 0

    def next_logits(self, batch: DecodingBatch) -> _Logits:
        """Return the logits after the last tokens, which enter the KV cache."""
        with keep_weight_values(self._weight_values):
            return self._next_logits(batch)

    def _next_logits(self, batch: DecodingBatch) -> _Logits:
        if not self._can_record or not _has_known_room(batch, 1):
            return logits_by_model(self._model, batch)
        if self._contents and not self._contents.are_current():
            self.forget()
        inputs = _inputs_of(batch)
        # mlx keeps what it has recorded for one thread.
        shapes = threading.get_ident(), _shapes_of(inputs)
        if shapes not in self._records:
            self._equal_steps = self._equal_steps + 1 if shapes == self._shapes else 1
            self._shapes = shapes
            worth_it = self._equal_steps > _STEPS_BEFORE and _has_known_room(batch, _STEPS_BEFORE)
            if not worth_it or not self._record(batch, inputs, shapes):
                return logits_by_model(self._model, batch)
        logits, offset, keys, values = self._records[shapes](*inputs)
        for layer, new_keys, new_values in zip(batch.cache, keys, values, strict=True):
            # Each layer has an array of its own, because some functions of mlx-lm change it.
            layer.take_step(new_keys, new_values, mx.array(offset))
        return logits

    def forget(self) -> None:
        """Drop all records and values, and with them the arrays of the model."""
        self._records, self._contents, self._weight_values = {}, None, {}
        self._shapes, self._equal_steps = None, 0

    def _record(self, batch: DecodingBatch, inputs: tuple[Any, ...], shapes: Any) -> bool:
        """Record a step with these inputs; return whether that was possible."""
        if not can_record():
            # Somebody has turned `mx.compile` off.
            self._can_record = False
            return False
        contents = self._contents or _Contents(self._model)
        record = mx.compile(partial(_step, self._model))
        try:
            with raise_user_errors_as(ModelError, "recording a decode step"):
                is_right = self._is_right(record, batch, inputs, contents)
        except ModelError:
            is_right = False
        if not is_right:
            self._can_record = False
            _REFUSED[id(self._model)] = self._model
            return False
        while len(self._records) >= _MOST_RECORDS:
            del self._records[next(iter(self._records))]
        self._records[shapes] = record
        self._contents = contents
        return True

    def _is_right(
        self,
        record: Callable[..., "_Outputs"],
        batch: DecodingBatch,
        inputs: tuple[Any, ...],
        contents: "_Contents",
    ) -> bool:
        """Let a record take these inputs; return whether it gives the logits of the model."""
        # What is not computed yet would be computed anew in each step.
        mx.eval(contents.arrays)
        with recording():
            # The new cache is not kept: it would take the memory of a second one.
            logits = record(*inputs)[0]
        if not contents.are_current():
            return False  # The model changes itself in each step.
        # One after the other, each copies the cache of about a layer at a time.
        mx.eval(logits)
        expected = logits_by_model(self._model, replace(batch, cache=deepcopy(batch.cache)))
        return _are_close(logits, expected)


_Outputs = tuple[_Logits, _Positions, list[_Keys], list[_Values]]


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
    padding: _Positions,
    offset: _Positions,
    end: Int[mx.array, "1"],
    keys: list[_Keys],
    values: list[_Values],
) -> _Outputs:
    """Return the logits of a step, the positions of the next tokens, and the new cache."""
    position = mx.arange(keys[0].shape[2])
    mask = (position >= padding[:, None]) & (position <= end)
    pairs = zip(keys, values, strict=True)
    layers = [_RecordedCache(*pair, offset, end, mask[:, None, None]) for pair in pairs]
    with one_step([offset]), without_gradients():
        logits = model(tokens[:, None], cache=layers)[:, -1, :]
    new_keys, new_values = zip(*((layer.keys, layer.values) for layer in layers), strict=True)
    return logits, layers[0].offset, [*new_keys], [*new_values]


@dataclass(slots=True)
class _RecordedCache:
    """What a layer sees of its cache in a record: no number that changes from step to step."""

    keys: _Keys
    values: _Values
    offset: _Positions
    end: Int[mx.array, "1"]
    mask: Bool[mx.array, "rows 1 1 positions"]

    def update_and_fetch(self, keys: _NewKeys, values: _NewValues) -> tuple[_Keys, _Values]:
        """Return all positions, with the new keys and values at the first unused one."""
        self.offset = self.offset + 1
        self.keys = mx.slice_update(self.keys, keys, self.end, axes=(2,))
        self.values = mx.slice_update(self.values, values, self.end, axes=(2,))
        return self.keys, self.values

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """Return the mask that hides unused positions."""
        if N != 1 or window_size is not None:
            raise ValueError("a record has no mask for this")
        return self.mask


def _has_known_room(batch: DecodingBatch, positions: int) -> bool:
    """Return whether all layers have the same next positions, and memory for so many."""
    return (
        all(type(layer) is DecodingCache and layer.room >= positions for layer in batch.cache)
        and len({layer.used for layer in batch.cache}) == 1
        and batch.cache[0].keys.dtype == mx.float32
    )


def _are_close(logits: _Logits, expected: _Logits) -> bool:
    logits, expected = logits.astype(mx.float32), expected.astype(mx.float32)
    # Logits that are -inf on both sides are equal, and their difference is not a number.
    difference = mx.where(logits == expected, 0, mx.abs(logits - expected)).max()
    largest = mx.where(mx.isinf(expected), 0, mx.abs(expected)).max()
    return bool(difference <= _TOLERANCE * largest)


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
        """Return whether each layer has the same objects as before."""
        return all(map(is_, self._now(), self._before))
