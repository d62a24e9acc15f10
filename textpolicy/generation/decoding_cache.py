"""mlx-lm's cache of many rows, spared what rows of one length need not do.

A mask over keys that all count is a tenth of the time of a decode step on a CPU, and most of a
short prompt's buffers is room that is not in use yet.
"""

from typing import Any

import mlx.core as mx
from jaxtyping import Int
from mlx_lm.models.cache import BatchKVCache


class DecodingCache(BatchKVCache):
    """Of rows that decode together, with a mask only where one of them is padded."""

    _padded: bool | None = None

    @classmethod
    def repeat_prompts(
        cls, prompts: BatchKVCache, owner: Int[mx.array, " rows"], room: int
    ) -> "DecodingCache":
        """A row for each owner among the prompts, and room for so many more positions of each."""
        keys: Any
        values: Any
        keys, values, offset, padding, used = prompts.state
        rows = cls([])
        # What is not in use yet is left behind before it would be copied for every row.
        rows.state = keys[..., :used, :], values[..., :used, :], offset, padding, used
        rows.filter(owner)
        keys, values, *rest = rows.state
        unused = [(0, 0), (0, 0), (0, room), (0, 0)]
        rows.state = mx.pad(keys, unused), mx.pad(values, unused), *rest
        return rows

    @property
    def state(self) -> Any:
        """Keys, values, offsets, padding, and how many positions are in use."""
        return self.keys, self.values, self.offset, self.left_padding, self._idx

    @state.setter
    def state(self, v: Any) -> None:
        self.keys, self.values, self.offset, self.left_padding, self._idx = v
        self._padded = None

    def make_mask(self, N: int, return_array: bool = False, **kwargs: Any) -> Any:
        """None for one position of each row that may look at every key."""
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
