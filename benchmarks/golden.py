"""Compare losses and gradients of the algorithms with recorded numbers of TRL.

    python benchmarks/golden.py --data tests/golden

The folder holds `golden.json` and `golden.npz`: arrays, and cases with their options, loss and
gradient, which TRL 1.16 computed in float64 (see tests/golden/README.md). This script computes each
case in float32 from the same arrays, with the functions that a user passes to a trainer. The exit
code is 1 if a loss or an element of a gradient differs by more than TOLERANCE, or if an option is
unknown.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from textpolicy.algorithms import (
    cispo,
    dapo,
    dr_grpo,
    grpo,
    lite_ppo,
    luspo,
    sapo,
    vespo,
)
from textpolicy.algorithms.parts import kl
from textpolicy.algorithms.parts.averages import micro_batch_token_mean
from textpolicy.algorithms.parts.ratio_levels import SEQUENCE, TOKEN
from textpolicy.algorithms.parts.token_weights import off_policy_mask
from textpolicy.types import Batch, LossFn

TOLERANCE = 1e-6
LOSSES: dict[str, Callable[..., Any]] = {
    "grpo": grpo.policy_loss,
    "bnpo": partial(grpo.policy_loss, average=micro_batch_token_mean),
    "dapo": dapo.policy_loss,
    "dr_grpo": dr_grpo.policy_loss,
    "cispo": cispo.policy_loss,
    "sapo": sapo.policy_loss,
    "luspo": luspo.policy_loss,
    "vespo": vespo.policy_loss,
}
ADVANTAGES = {
    "group": grpo.compute_advantages,
    "batch": lite_ppo.compute_advantages,
    "none": dr_grpo.compute_advantages,
}
RATIO_LEVELS = {"token": TOKEN, "sequence": SEQUENCE}
CLIPPED = ("grpo", "bnpo", "dapo", "dr_grpo", "luspo")
# Options of a case: those that change the batch, the loss, or the clip of the loss.
OF_THE_BATCH = {"use_old", "temp", "zero_row", "adv_scale"}
OF_THE_LOSS = {"loss_type", "level", "beta", "bias_kl", "ent_coef", "opsm", "is_ratio"}
OF_THE_CLIP = {"eps", "eps_high", "delta", "L_max"}


class Golden:
    """The cases of a folder, and the arrays that all cases share."""

    def __init__(self, folder: Path) -> None:
        record = json.loads((folder / "golden.json").read_text())
        self.cases: Mapping[str, Any] = record["cases"]
        self.group_size = record["shape"]["G"]
        with np.load(folder / "golden.npz") as arrays:
            self.arrays = dict(arrays)

    def floats(self, name: str) -> mx.array:
        """Return an array of the folder in float32."""
        return _float32(self.arrays[name])

    def compare(self, name: str) -> tuple[float, float]:
        """Return the error of a case's loss, and the largest error of its gradient."""
        case = self.cases[name]
        options = case["kwargs"]
        if unknown := set(options) - OF_THE_BATCH - OF_THE_LOSS - OF_THE_CLIP:
            raise ValueError(f"options {sorted(unknown)} are unknown")
        batch = self.batch(options)
        loss_fn = self.loss(options)

        def loss_of(logits: mx.array) -> mx.array:
            logp, entropy = self.logprobs_and_entropies(logits, options)
            seen = replace(batch, entropy=entropy)
            if not options.get("use_old", True):
                seen = replace(seen, logp_old=mx.stop_gradient(logp))
            return loss_fn(logp, seen)[0]

        loss, gradient = mx.value_and_grad(loss_of)(self.floats("logits"))
        off = np.abs(np.array(gradient) - self.arrays[f"grad::{name}"]).max()
        return abs(float(loss) - case["loss"]), float(off)

    def logprobs_and_entropies(
        self, logits: mx.array, options: Mapping[str, Any]
    ) -> tuple[mx.array, mx.array]:
        """Return the log-probabilities of the recorded tokens, and the entropies."""
        logits = logits / options.get("temp", 1.0)
        # With the largest logit subtracted, rounding errors are those of small numbers.
        logits = logits - mx.stop_gradient(logits.max(axis=-1, keepdims=True))
        logp = logits - mx.log(mx.exp(logits).sum(axis=-1, keepdims=True))
        ids = mx.array(self.arrays["ids"])[..., None]
        return mx.take_along_axis(logp, ids, axis=-1)[..., 0], -(mx.exp(logp) * logp).sum(-1)

    def recorded(self, name: str, options: Mapping[str, Any]) -> np.ndarray:
        """Return the log-probabilities that a batch holds, in float64."""
        logits = self.arrays[name] / options.get("temp", 1.0)
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return np.take_along_axis(logp, self.arrays["ids"][..., None], -1)[..., 0]

    def batch(self, options: Mapping[str, Any]) -> Batch:
        """Return the batch that the loss gets, without the current policy's entropy."""
        mask = self.arrays["mask"].astype(bool)
        if options.get("zero_row"):
            mask[2] = False
        rewards = self.floats("rewards").reshape(-1, self.group_size)
        advantages = ADVANTAGES[options.get("adv_scale", "group")](rewards).reshape(-1, 1)
        old = self.recorded("old_logits", options)
        rows = mask.shape[0]
        return Batch(
            prompts=mx.zeros((1, 1), dtype=mx.int32),
            prompt_lengths=mx.ones(1, dtype=mx.int32),
            owner=mx.zeros(rows, dtype=mx.int32),
            group=mx.arange(rows) // self.group_size,
            tokens=mx.array(self.arrays["ids"]),
            mask=mx.array(mask),
            logp_sampled=_float32(old + self.arrays["samp_noise"]),
            logp_old=_float32(old),
            logp_ref=_float32(self.recorded("ref_logits", options)),
            advantages=mx.broadcast_to(advantages, mask.shape),
            temperature=mx.ones(rows),
            rows=rows,
            token_count=int(mask.sum()),
            max_tokens=options.get("L_max", 7),
        )

    def loss(self, options: Mapping[str, Any]) -> LossFn:
        """Return the policy loss that the options describe."""
        kind = options["loss_type"]
        terms: dict[str, Any] = {
            "ratio_level": RATIO_LEVELS[options.get("level", "token")],
            "beta": options.get("beta", 0.0),
            "kl": kl.unbiased_k3 if options.get("bias_kl") else kl.k3,
            "entropy_bonus": options.get("ent_coef", 0.0),
        }
        weights = []
        if options.get("opsm") is not None:
            weights.append(partial(off_policy_mask, threshold=options["opsm"]))
        if options.get("is_ratio"):
            given = self.floats(f"is_{options['is_ratio']}")
            if kind == "vespo":
                terms["correction"] = lambda logp, batch: (given, {})
            else:
                weights.append(lambda logp, batch: (given, {}))
        return partial(LOSSES[kind], weights=weights, **terms, **_clipping(kind, options))


def _float32(array: np.ndarray) -> mx.array:
    return mx.array(array.astype(np.float32))


def _clipping(kind: str, options: Mapping[str, Any]) -> dict[str, Any]:
    if kind == "cispo":
        return {"cap": options.get("eps_high", options.get("eps", 0.2))}
    if kind not in CLIPPED:
        return {}
    low = options.get("eps", 0.2)
    high = options.get("eps_high", low)
    return {"clip_low": low, "clip_high": high, "delta": options.get("delta")}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="folder of the cases"
    )
    golden = Golden(parser.parse_args().data)
    failed = 0
    for name in golden.cases:
        try:
            loss, gradient = golden.compare(name)
        except (ValueError, KeyError) as error:
            failed += 1
            print(f"{name:<40} not supported: {error}")
            continue
        # Written with "<=" so that a NaN counts as a difference.
        agrees = loss <= TOLERANCE and gradient <= TOLERANCE
        failed += not agrees
        verdict = "ok" if agrees else "DIFFERS"
        print(f"{name:<40} loss {loss:.1e}  gradient {gradient:.1e}  {verdict}")
    print(f"{len(golden.cases) - failed} of {len(golden.cases)} cases agree to {TOLERANCE:g}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
