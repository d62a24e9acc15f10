"""Whether a model's rows may decode together."""

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Float

from textpolicy.generation.decoding_rows import DecodingRow
from textpolicy.generation.engine import listen, prefill, read


def can_batch(model: nn.Module) -> bool:
    """Whether rows of unequal length decode together to what each gives alone, two turns long.

    Not so for every architecture in mlx-lm 0.32: gemma2 lays a batch's mask over its heads, and
    recurrent states take in the padding.
    """
    prompts, replies = [[1, 2, 3, 4], [2]], [[3], [1, 4, 2]]
    try:
        together = _probe(model, prompts, replies)
    except ValueError:
        return False
    pairs = zip(prompts, replies, strict=True)
    alone = mx.concatenate([_probe(model, [prompt], [reply]) for prompt, reply in pairs], axis=1)
    tolerance = 1e-3 if alone.dtype == mx.float32 else 0.1
    return float(mx.abs(together - alone).astype(mx.float32).mean()) < tolerance


def _probe(
    model: nn.Module, prompts: list[list[int]], replies: list[list[int]]
) -> Float[mx.array, "turns rows vocab"]:
    """The logits after each prompt, and after a reply to the token 0 drawn then."""
    rows = [DecodingRow(p, 0, prompt, tokens=[0]) for p, prompt in enumerate(prompts)]
    active = prefill(model, [[row] for row in rows], seed=0, room=1)
    first = model(active.last[:, None], cache=active.cache)[:, -1, :]
    heard = listen(active, range(len(rows)), lambda row: replies[row.prompt])
    assert heard is not None
    heard = read(model, heard)
    second = model(heard.last[:, None], cache=heard.cache)[:, -1, :]
    return mx.stack([first, second])
