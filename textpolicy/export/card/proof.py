"""The comparison of the files with the adapter as it was trained, in a model card."""

from collections.abc import Iterator, Sequence

from textpolicy.adapters.fuse import FuseReport
from textpolicy.export.markdown import code, markdown_table, plain
from textpolicy.export.proof import MEASURABLE_EFFECT, Proof


def proof_parts(
    proofs: Sequence[Proof], survival: FuseReport | None, notes: Sequence[str]
) -> Iterator[str]:
    """Yield the part that compares the files with the adapter as it was trained."""
    yield "## Proof of the export"
    yield (
        "The files were opened again after they were written, and compared with the base and the "
        "adapter as they were trained."
    )
    for proof in proofs:
        yield markdown_table(list(_proof_rows(proof)))
    if not any(_is_measurable(proof) for proof in proofs):
        yield "The adapter changes nothing that can be measured: it computes what the base does."
    if survival:
        yield (
            f"Rounding to {survival.worst.dtype} left {survival.survival:.2%} of the update, and "
            f"the norm of its error is {survival.noise:.2%} of the norm of the update."
        )
    yield from map(plain, notes)


def _proof_rows(proof: Proof) -> Iterator[tuple[str, str]]:
    yield "opened by", code(proof.opened_by)
    yield "compared on", f"{proof.tokens:,} tokens of {proof.prompts} prompts"
    difference = f"{proof.largest_difference:.1e} (allowed: {proof.tolerance:.1e})"
    yield "largest difference of log-probabilities", difference
    yield "largest change of log-probabilities by the adapter", f"{proof.adapter_effect:.1e}"
    if _is_measurable(proof):
        yield "share of that change that was kept", f"{proof.kept:.2%}"
    yield "equal greedy tokens", f"{proof.equal_greedy:.1%}"
    if proof.from_merged is not None:
        yield "largest difference from the rounded weights in memory", f"{proof.from_merged:.1e}"
    if proof.from_trained is not None:
        text = "largest difference from the quantized model in training"
        yield text, f"{proof.from_trained:.1e}"


def _is_measurable(proof: Proof) -> bool:
    return proof.adapter_effect > MEASURABLE_EFFECT
