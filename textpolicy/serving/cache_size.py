"""The memory that the KV caches of rows take, and how much of it a server may use."""

from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache, make_prompt_cache

from textpolicy.machine import memory_bytes

_RESERVED = KVCache.step  # mlx-lm's caches reserve so many positions at a time.


@dataclass(frozen=True, slots=True)
class CacheSize:
    """The bytes of a KV cache: for each token of a row, and for each row beside its tokens."""

    token_bytes: int
    row_bytes: int

    @classmethod
    def of(cls, model: nn.Module) -> "CacheSize":
        """Return the sizes that the caches of two texts show."""
        short, long = _bytes_after(model, 1), _bytes_after(model, 1 + _RESERVED)
        token = (long - short) // _RESERVED
        return cls(token_bytes=token, row_bytes=max(0, short - token * _RESERVED))

    def bytes_of(self, rows: int, tokens: int) -> int:
        """Return the bytes of rows of so many tokens each."""
        return rows * (tokens * self.token_bytes + self.row_bytes)


def default_cache_bytes() -> int:
    """Return half of the memory that the machine has beside what mlx holds now."""
    return max(1 << 28, (memory_bytes() - mx.get_active_memory()) // 2)


def _bytes_after(model: nn.Module, length: int) -> int:
    cache = make_prompt_cache(model)
    cast(Any, model)(mx.zeros((1, length), mx.int32), cache=cache)
    return sum(_bytes_in(layer.state) for layer in cache)


def _bytes_in(state: Any) -> int:
    if isinstance(state, mx.array):
        return state.nbytes
    return sum(map(_bytes_in, state)) if isinstance(state, list | tuple) else 0
