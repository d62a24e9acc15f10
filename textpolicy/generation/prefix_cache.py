"""KV caches of texts that the model has read, for prompts that begin with the same tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from textpolicy.adapters.adapter_state import AdapterState

PREFIX_BYTES = 256 << 20
"""The memory of the caches that a policy keeps for the next turns of conversations."""


@dataclass(frozen=True, slots=True)
class _Prefix:
    """The keys and values of each layer for some tokens."""

    tokens: Sequence[int]
    layers: Sequence[tuple[mx.array, mx.array]]

    @property
    def nbytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self.layers)

    def length_shared_with(self, tokens: Sequence[int]) -> int:
        """Return how many first tokens are those of the prefix."""
        pairs = enumerate(zip(self.tokens, tokens, strict=False))
        shorter = min(len(self.tokens), len(tokens))
        return next((index for index, (ours, theirs) in pairs if ours != theirs), shorter)


class PrefixCache:
    """Keeps the caches of the texts that were used last, in at most `max_bytes`.

    All caches belong to one `AdapterState`: another state drops them.
    """

    def __init__(self, max_bytes: int = PREFIX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._adapters: AdapterState | None = None
        # The text that was used last is the last one.
        self._prefixes: list[_Prefix] = []

    @property
    def nbytes(self) -> int:
        """The bytes of all caches that are kept."""
        return sum(prefix.nbytes for prefix in self._prefixes)

    def use_adapters(self, adapters: AdapterState) -> None:
        """Drop all caches if the model has computed them with other adapters."""
        if adapters != self._adapters:
            self._prefixes.clear()
        self._adapters = adapters

    def keep(self, tokens: Sequence[int], cache: Sequence[KVCache]) -> None:
        """Keep the cache of a text instead of the caches of its beginnings."""
        layers: list[Any] = [layer.keys_and_values() for layer in cache]
        new = _Prefix(tokens, layers)
        # Without this, the arrays would keep the cache of the whole batch alive.
        mx.eval(new.layers)
        self._prefixes = [
            old for old in self._prefixes if new.length_shared_with(old.tokens) < len(old.tokens)
        ]
        self._prefixes.append(new)
        while self._prefixes and self.nbytes > self._max_bytes:
            self._prefixes.pop(0)

    def longest(self, tokens: Sequence[int]) -> tuple[int, list[KVCache]]:
        """Return how many first tokens are in a kept cache, and this cache cut to their number."""
        lengths = [prefix.length_shared_with(tokens) for prefix in self._prefixes]
        if not any(lengths):
            return 0, []
        length = max(lengths)
        prefix = self._prefixes.pop(lengths.index(length))
        self._prefixes.append(prefix)
        return length, [_first(length, *layer) for layer in prefix.layers]


def _first(length: int, keys: mx.array, values: mx.array) -> KVCache:
    cache: Any = KVCache()
    cache.keys, cache.values = keys[..., :length, :], values[..., :length, :]
    cache.offset = length
    return cache
