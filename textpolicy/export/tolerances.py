"""How much log-probabilities may change by an export: the one place where this is stated.

The numbers are for the largest difference over the whole vocabulary from the model as it was
trained. Each is about four times the most that was measured with the embedded model and with
SmolLM2-135M, whose adapters moved log-probabilities by 0.5 to 7. Where rounding makes a tolerance
wide, two other checks are strict: `MERGED_TOLERANCE` for the file, and the share of the adapter's
effect that is left.
"""

import mlx.core as mx

from textpolicy.export.job import Job
from textpolicy.export.merged import precision_of

FLOAT32 = 2e-3
"""Other programs add the same numbers up in another order: at most 2e-4 was measured."""
MERGED = {"float32": FLOAT32, "float16": 0.15, "bfloat16": 1.0, "q8_0": 5.0}
"""Rounding of merged weights to fewer bits."""
QUANTIZED = 8.0
"""Quantizing merged weights again moves them by up to half a step of their grid."""
_BFLOAT16_ARITHMETIC = 0.5
"""On a GPU the trained model itself is computed in the dtype of the checkpoint."""


def for_adapter(job: Job) -> float:
    """Return the tolerance for an adapter that is written as it is."""
    return _at_least_arithmetic(job, FLOAT32)


def for_merged(job: Job) -> float:
    """Return the tolerance for merged float weights, or weights of GGUF."""
    return _at_least_arithmetic(job, MERGED[job.weight_format])


def for_mlx(job: Job) -> float:
    """Return the tolerance for a folder of mlx-lm, which may be quantized again."""
    if job.base_is_quantized and not job.options.dequantize:
        return QUANTIZED
    return for_merged(job)


def _at_least_arithmetic(job: Job, tolerance: float) -> float:
    return tolerance if precision_of(job) == mx.float32 else max(tolerance, _BFLOAT16_ARITHMETIC)
