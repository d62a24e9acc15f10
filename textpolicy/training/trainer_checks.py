"""Checks of the trainer. Each error names a run that would learn nothing."""

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten

from textpolicy.errors import TrainingError
from textpolicy.layer_gradients import differentiable_layers

# In nats a token. float32 agrees to 1e-5 and bfloat16 to a few hundredths. A prompt that went
# through the chat template twice, or sampling with other weights, is far above.
_MISMATCH_LIMIT = 0.1
# Steps in a row without a reward, or updates in a row without a finite gradient.
_STALLED_LIMIT = 10
_STALLED_MESSAGES = {
    "reward": f"the reward function returned None for every sample of {_STALLED_LIMIT} steps in a "
    "row, so nothing can be learned. Return a number for the samples that should be compared",
    "finite gradient": f"the gradient was NaN or infinite {_STALLED_LIMIT} times in a row, so "
    "nothing can be learned. Look at the advantages and rewards of the last steps, which must be "
    "finite, and at the rejected batches; if they are finite, lower the learning rate",
}


@dataclass
class SamplerCheck:
    """Checks that rollouts were sampled with the weights of the version that they carry.

    Recorded and recomputed log-probabilities of one version must agree. After the first update,
    the difference must be much smaller than the first update's own effect: a sampler that reports
    the new version and still has the old weights differs by the whole effect. `move` is that
    effect, in nats a token.
    """

    noise: float | None = None
    move: float | None = None

    def check(self, mismatch: float) -> None:
        """Raise if rollouts of the current version differ by this many nats a token."""
        if mismatch > _MISMATCH_LIMIT:
            raise TrainingError(
                "recorded and recomputed log-probabilities of one version differ by "
                f"{mismatch:.3f} nats a token; expected at most {_MISMATCH_LIMIT}. The rollouts "
                "come from another model, other adapters or another prompt than the trained one"
            )
        if self.noise is None:
            self.noise = mismatch
        elif self.move is not None:
            # `move` was measured on rows with signal. Other rows count here too and moved less.
            if self.move > 20 * self.noise and mismatch > self.move / 5:
                raise TrainingError(
                    f"the first update moved log-probabilities by {self.move:.2g} nats a token, "
                    f"and new rollouts differ by {mismatch:.2g}: the policy reports the new "
                    "version but still samples with the old weights. Check that the policy reloads "
                    "the file that the trainer publishes"
                )
            self.move = None


@dataclass
class StalledSteps:
    """Counts steps in a row that taught nothing, by what was missing."""

    lacking: dict[str, int] = field(default_factory=dict[str, int])

    def count(self, what: str, *, missing: bool) -> None:
        """Count a step in which `what` was missing, and raise after too many in a row."""
        self.lacking[what] = self.lacking.get(what, 0) + 1 if missing else 0
        if self.lacking[what] == _STALLED_LIMIT:
            raise TrainingError(_STALLED_MESSAGES[what])


def check_differentiable(model: nn.Module) -> None:
    """Raise if a function that the model calls has no gradient. Nothing is computed."""
    forward: Any = model
    weights = model.trainable_parameters()
    try:
        with differentiable_layers(model):
            nn.value_and_grad(model, lambda: forward(mx.array([[1, 2]])).sum())()
    except ValueError as error:
        raise TrainingError(
            f"{type(model).__module__} cannot be trained: a function that it calls has no gradient "
            f"on this device ({error}). The model can be sampled from and served; train another "
            "family, or ask mlx-lm for a gradient of this one"
        ) from error
    finally:
        # mlx leaves the arrays in the model that it traced.
        model.update(weights)


def check_gradient(norm: float, *, has_signal: bool) -> None:
    """Raise if the first gradient is exactly zero although advantages differ."""
    if norm == 0 and has_signal:
        raise TrainingError(
            "advantages differ but the gradient is exactly zero: the loss does not depend on "
            "the trainable weights. Check that loss_fn uses its argument `logp`"
        )


def check_movement(before: Any, after: Any, optimizer: optim.Optimizer) -> None:
    """Raise if the first update changed no weight."""
    old, new = dict(tree_flatten(before)), dict(tree_flatten(after))
    if all(mx.array_equal(old[name], new[name]) for name in new):
        raise TrainingError(
            "the first update moved no weight although the gradient is not zero. The learning rate "
            f"is {float(optimizer.learning_rate):g}; expected a rate that is large enough to "
            "change the weights, and no schedule that starts at 0"
        )
