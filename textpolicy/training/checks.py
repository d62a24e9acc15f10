"""What a trainer checks of itself: errors here are runs that would have learned nothing."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten

from textpolicy.errors import TrainingError
from textpolicy.types import Metrics, RolloutGroup

# Nats per token. float32 agrees to 1e-5 and bfloat16 to a few hundredths; a prompt that was
# templated twice, or sampled from other weights, is far above.
MISMATCH_LIMIT = 0.1
# Steps in a row without a reward, or without a finite gradient, before the run is stopped.
FRUITLESS_LIMIT = 10
_FRUITLESS = {
    "reward": f"the reward function returned None for every sample of {FRUITLESS_LIMIT} steps in "
    "a row: nothing can be learned. Return a number for what you want to compare",
    "finite gradient": f"the gradient was NaN or infinite {FRUITLESS_LIMIT} times in a row: "
    "nothing can be learned. Lower the learning rate, and look at the rejected batches",
}
MISMATCH = "sampling/sampling_logp_difference/mean"


@dataclass
class SamplerCheck:
    """Do the rollouts come from the weights that they say they come from?

    Recorded and recomputed log-probabilities of one version must agree. After the first update
    they must also agree much better than the update moved them: a sampler that reports the new
    version and still has the old weights is off by the move itself.
    """

    noise: float | None = None
    move: float | None = None

    def see(self, metrics: Metrics, *, on_policy: bool) -> None:
        """Check the metrics of the first update on freshly sampled rollouts."""
        if not on_policy:
            return
        mismatch = metrics[MISMATCH]
        if mismatch > MISMATCH_LIMIT:
            raise TrainingError(
                "recorded and recomputed log-probabilities of one version differ by "
                f"{mismatch:.3f} nats a token; expected at most {MISMATCH_LIMIT}. The rollouts "
                "come from another model, other adapters or another prompt than the trained one"
            )
        if self.noise is None:
            self.noise = mismatch
        elif self.move is not None:
            self._compare(mismatch, self.move, self.noise)
            self.move = None

    def note_move(self, distance: float) -> None:
        """Record how far the first update moved log-probabilities, in nats a token."""
        self.move = distance

    @staticmethod
    def _compare(mismatch: float, move: float, noise: float) -> None:
        # The move is that of rows that taught; all others, which count here too, moved less.
        if move > 20 * noise and mismatch > move / 5:
            raise TrainingError(
                f"the first update moved log-probabilities by {move:.2g} nats a token, and new "
                f"rollouts are off by {mismatch:.2g}: the policy reports the new version but still "
                "samples with the old weights. Check that it reloads what the trainer publishes"
            )


@dataclass
class StalledSteps:
    """Counts steps in a row that could not teach, by what they lacked."""

    lacking: dict[str, int] = field(default_factory=dict[str, int])

    def see(self, what: str, *, fruitless: bool) -> None:
        """Count a step without `what`, or start again from 0."""
        self.lacking[what] = self.lacking.get(what, 0) + 1 if fruitless else 0
        if self.lacking[what] == FRUITLESS_LIMIT:
            raise TrainingError(_FRUITLESS[what])


def check_gradient(norm: float, *, has_signal: bool) -> None:
    """Refuse a first gradient of exactly zero where advantages differ."""
    if norm == 0 and has_signal:
        raise TrainingError(
            "advantages differ but the gradient is exactly zero: the loss does not depend on "
            "the trainable weights. Check that loss_fn uses the `logp` it is given"
        )


def check_movement(before: Any, after: Any, optimizer: optim.Optimizer) -> None:
    """Refuse a first update that left every weight as it was."""
    old, new = dict(tree_flatten(before)), dict(tree_flatten(after))
    if all(mx.array_equal(old[name], new[name]) for name in new):
        raise TrainingError(
            "the first update moved no weight although the gradient is not zero; the learning "
            f"rate is {float(optimizer.learning_rate):g}: expected one large enough to change the "
            "weights, and no schedule that starts at 0"
        )


def on_policy(groups: Sequence[RolloutGroup], version: int) -> bool:
    """Whether every rollout was sampled with this version."""
    return all(group.version == version for group in groups)
