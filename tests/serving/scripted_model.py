"""A model that says a given text, whatever is asked."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

_SURE = 1000.0


class ScriptedModel(nn.Module):
    """Reads as another model does, and says the tokens of a script from a position on."""

    def __init__(self, inner: nn.Module, script: list[int], start: int) -> None:
        super().__init__()
        self.inner = inner
        self._script = mx.array(script)
        self._start = start

    @property
    def args(self) -> Any:
        return self.inner.args

    @property
    def layers(self) -> Any:
        return self.inner.layers

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        logits = self.inner(inputs, cache=cache)
        if cache is None:
            return logits
        said = mx.array(cache[0].offset).reshape(-1, 1) - self._start
        wanted = self._script[mx.clip(said, 0, self._script.size - 1)]
        sure = _SURE * (mx.arange(logits.shape[-1]) == wanted)
        return logits + sure[:, None, :]
