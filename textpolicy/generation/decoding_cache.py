"""The KV cache of a decode batch.

mlx-lm's `BatchKVCache` builds a mask in every step and copies unused positions. On a CPU, the mask
costs a tenth of a decode step, and most positions of a short prompt's cache are unused.
"""

from typing import Any

import mlx.core as mx
from jaxtyping import Int
from mlx_lm.models.cache import BatchKVCache


class DecodingCache(BatchKVCache):
    """A `BatchKVCache` that builds a mask only when a row is padded."""

    _padded: bool | None = None

    @classmethod
    def repeat_prompts(
        cls, prompts: BatchKVCache, owner: Int[mx.array, " rows"], room: int
    ) -> "DecodingCache":
        """Return a cache in which row r holds prompt `owner[r]` and `room` unused positions."""
        keys: Any
        values: Any
        keys, values, offset, padding, used = prompts.state
        rows = cls([])
        # Cut off the unused positions before they are copied for every row.
        rows.state = keys[..., :used, :], values[..., :used, :], offset, padding, used
        rows.filter(owner)
        keys, values, *rest = rows.state
        unused = [(0, 0), (0, 0), (0, room), (0, 0)]
        rows.state = mx.pad(keys, unused), mx.pad(values, unused), *rest
        return rows

    @property
    def state(self) -> Any:
        """Keys, values, offsets, padding, and the number of used positions."""
        return self.keys, self.values, self.offset, self.left_padding, self._idx

    @state.setter
    def state(self, v: Any) -> None:
        self.keys, self.values, self.offset, self.left_padding, self._idx = v
        self._padded = None

    def make_mask(self, N: int, return_array: bool = False, **kwargs: Any) -> Any:
        """Return None if each row adds one position and may attend to every key."""
        if N == 1 and kwargs.get("window_size") is None and not self._is_padded():
            return None
        return super().make_mask(N, return_array, **kwargs)

    def filter(self, batch_indices: Any) -> None:
        super().filter(batch_indices)
        self._padded = None

    def extend(self, other: BatchKVCache) -> None:
        super().extend(other)
        self._padded = None

    def finalize(self) -> None:
        super().finalize()
        self._padded = None

    def _is_padded(self) -> bool:
        if self._padded is None:
            self._padded = bool(self.left_padding.any())
        return self._padded
