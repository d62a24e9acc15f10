"""Versions of an adapter, a process that publishes them, and the log-probabilities of each."""

import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from textpolicy.adapters import AdapterConfig, AdapterContainer
from textpolicy.types import Segment

STEP = 0.05
"""The size of the difference between two versions, which is far above rounding."""

# It replaces the file by one version after the other, and starts again after the last one.
_PUBLISHER = """
import itertools, os, shutil, sys, time
target, *versions = sys.argv[1:]
for version in itertools.cycle(versions):
    shutil.copy(version, target + ".new")
    os.replace(target + ".new", target)
    print(version, flush=True)
    time.sleep(0.003)
"""


class AdapterVersions:
    """A model with adapters, which `use` replaces by those of another version."""

    def __init__(self, model: Any, folder: Path, count: int) -> None:
        self.model = model
        self.files = [folder / f"{version}.safetensors" for version in range(count)]
        self._adapters = AdapterContainer.from_model(model, AdapterConfig(rank=4), seed=0)
        tensors = self._adapters.parameters()
        for version, path in enumerate(self.files):
            keys = mx.random.split(mx.random.key(version), len(tensors))
            moved = {
                name: tensor + STEP * mx.random.normal(tensor.shape, key=key)
                for (name, tensor), key in zip(tensors.items(), keys, strict=True)
            }
            self._adapters.swap(moved, version=version)
            self._adapters.publish(path)
        model.eval()
        self.use(0)

    def use(self, version: int) -> None:
        """Put the adapters of a version into the model."""
        self._adapters.swap(self.files[version])

    @contextmanager
    def published_in_turn(self, path: Path) -> Generator[None]:
        """Let another process publish all versions to a file, again and again, for the block."""
        command = [sys.executable, "-c", _PUBLISHER, str(path), *map(str, self.files)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout and process.stdout.readline()
                yield
            finally:
                process.kill()

    def replay(
        self, segment: Segment, *, temperature: float = 1.0, reads_again: bool = False
    ) -> list[float]:
        """Return the log-probability of each token of a segment, one position at a time.

        A sampled token is computed with the adapters of its version, over the keys and values that
        older versions have left. What was read before the first token of a turn is read with the
        version of this token: the tokens since the last turn, or all tokens if it `reads_again`.
        """
        tokens, mask, versions = segment.tokens, segment.mask, segment.versions
        layers, logprobs, read, used = make_prompt_cache(self.model), [0.0] * len(tokens), 0, None
        for position in range(len(tokens)):
            if not mask[position]:
                continue
            if versions[position] != used:
                self.use(used := versions[position])
            if not mask[position - 1]:
                layers, read = (make_prompt_cache(self.model), 0) if reads_again else (layers, read)
                if unread := tokens[read : position - 1]:
                    self.model(mx.array([unread]), cache=layers)
            logits = self.model(mx.array([[tokens[position - 1]]]), cache=layers)[0, -1]
            logits = logits / temperature
            logprobs[position] = (logits[tokens[position]] - mx.logsumexp(logits)).item()
            read = position
        return logprobs
