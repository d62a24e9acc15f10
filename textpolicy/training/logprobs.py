"""Log-probabilities of sampled tokens under a model, as the trainer computes them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from jaxtyping import Float, Int
from mlx_lm.models.cache import ArraysCache, KVCache, make_prompt_cache

from textpolicy.fast_cpu.rotary import one_pass
from textpolicy.ranks import ALONE, Ranks
from textpolicy.training.batch import BatchTotals, TrainingRow, make_batch
from textpolicy.training.dealing import deal_micro_batches
from textpolicy.training.output_head import OutputHead, find_output_head
from textpolicy.training.shared_prompts import run_whole_rows, run_with_shared_prompts
from textpolicy.training.token_logprobs import logprobs_from_logits
from textpolicy.types import Batch

BatchLogprobs = tuple[Float[mx.array, "batch time"], Float[mx.array, "batch time"]]
"""Of each token: its log-probability, and the entropy of the distribution at its position."""


@dataclass(frozen=True)
class ModelLogprobs:
    """Computes the log-probabilities of batches under a model.

    `head` is None if logits cannot be computed in chunks. `share_prompts` is False if each row has
    to repeat its prompt. Both change memory and time, and not the numbers.
    """

    model: nn.Module
    head: OutputHead | None
    share_prompts: bool

    @classmethod
    def of(cls, model: nn.Module) -> "ModelLogprobs":
        """Return the computation that needs the least memory with this model."""
        return cls(model, find_output_head(model), can_share_prompts(model))

    def __call__(self, batch: Batch, *, differentiable: bool = True) -> BatchLogprobs:
        """Return log-probabilities and entropies where the batch's mask is True, else 0."""
        counted = np.flatnonzero(np.array(batch.mask))
        if not len(counted):
            return mx.zeros(batch.mask.shape), mx.zeros(batch.mask.shape)
        network = self.head.body if self.head else self.model
        with one_pass():
            if self.share_prompts:
                outputs = run_with_shared_prompts(network, self.model, batch)
            else:
                outputs = run_whole_rows(network, batch)
        at = mx.array(counted)
        outputs = outputs.reshape(-1, outputs.shape[-1])[at]
        tokens = batch.tokens.flatten()[at]
        temperature = batch.temperature[at // batch.tokens.shape[1]]
        if self.head:
            values = self.head.logprobs(outputs, tokens, temperature, differentiable=differentiable)
        else:
            values = logprobs_from_logits(outputs, tokens, temperature)
        logp, entropy = values
        return _scatter(logp, at, batch), _scatter(entropy, at, batch)


def add_logprobs(
    rows: Sequence[TrainingRow],
    *,
    policy: ModelLogprobs | None = None,
    reference: ModelLogprobs | None = None,
    micro_batch_size: int | None = None,
    ranks: Ranks = ALONE,
) -> list[TrainingRow]:
    """Return the rows with `logp_fresh` and `entropies` of the policy, and `logp_ref`.

    Without `policy` or without `reference`, its values are left out. The order of the rows may
    change. Each of the `ranks` computes the values of some rows and gets those of the others.
    """
    models = [model for model in (policy, reference) if model]
    if not models:
        return list(rows)
    share = all(model.share_prompts for model in models)
    dealt = deal_micro_batches(rows, micro_batch_size, ranks, share_prompts=share)
    own = [
        values for part in dealt.of(ranks.rank) for values in _values_of(part, policy, reference)
    ]
    joined = np.concatenate(own) if own else np.zeros(0, np.float32)
    received = [np.frombuffer(one, np.float32) for one in ranks.gather(joined.tobytes())]
    names = ["logp_fresh", "entropies"] * (policy is not None)
    names += ["logp_ref"] * (reference is not None)
    done: list[TrainingRow] = []
    read = [0] * ranks.size
    for part, owner in zip(dealt.parts, dealt.owners, strict=True):
        for row in part:
            shape = len(names), len(row.mask)
            values = received[owner][read[owner] :][: shape[0] * shape[1]].reshape(shape)
            read[owner] += values.size
            done.append(replace(row, **dict(zip(names, values, strict=True))))
    return done


def _values_of(
    part: Sequence[TrainingRow], policy: ModelLogprobs | None, reference: ModelLogprobs | None
) -> list[np.ndarray]:
    """Return what the models compute for each row of a micro-batch, one after the other."""
    # The divergence from the reference counts for excluded rows too.
    batch = make_batch([replace(row, excluded=False) for row in part], BatchTotals.of(part))
    computed: list[np.ndarray] = []
    if policy:
        logp, entropy = policy(batch, differentiable=False)
        mx.eval(logp, entropy)
        computed += [np.array(logp), np.array(entropy)]
    if reference:
        computed.append(np.array(reference(batch, differentiable=False)[0]))
    return [
        np.concatenate([array[place, : len(row.mask)] for array in computed])
        for place, row in enumerate(part)
    ]


def can_share_prompts(model: nn.Module) -> bool:
    """Return whether completions after a shared prompt get the log-probabilities of whole rows.

    Windowed layers keep more than keys and values, and some models (gemma2 in mlx-lm 0.32)
    broadcast a batch's mask over their heads. A batch of two short rows is compared.
    """
    if not all(type(layer) in (KVCache, ArraysCache) for layer in make_prompt_cache(model)):
        return False
    shape = (2, 2)
    batch = Batch(
        prompts=mx.array([[1, 2, 3], [3, 0, 0]]),
        prompt_lengths=mx.array([3, 1]),
        owner=mx.array([0, 1]),
        group=mx.array([0, 1]),
        tokens=mx.array([[1, 2], [4, 3]]),
        mask=mx.ones(shape, dtype=mx.bool_),
        logp_sampled=mx.zeros(shape),
        logp_old=mx.zeros(shape),
        advantages=mx.zeros(shape),
        temperature=mx.ones(2),
        rows=2,
        token_count=4,
        max_tokens=2,
    )
    expected, _ = ModelLogprobs(model, None, share_prompts=False)(batch)
    try:
        shared, _ = ModelLogprobs(model, None, share_prompts=True)(batch)
    except ValueError:
        return False
    tolerance = 1e-3 if model(batch.tokens).dtype == mx.float32 else 0.1
    return float(mx.abs(shared - expected).mean()) < tolerance


def _scatter(
    values: Float[mx.array, " counted"], places: Int[mx.array, " counted"], batch: Batch
) -> Float[mx.array, "batch time"]:
    """Return an array of the batch's shape with the values at their places, and 0 elsewhere."""
    return mx.zeros(batch.mask.size).at[places].add(values).reshape(batch.mask.shape)
