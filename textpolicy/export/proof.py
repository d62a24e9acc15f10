"""The proof of an export: log-probabilities of what was written beside those of what was trained.

All numbers are measured on prompts of the run and the greedy answers of the trained model. Answers
of an untrained adapter are as good for this as any other text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from textpolicy.activity import doing
from textpolicy.errors import ExportError
from textpolicy.export.asking import Asking
from textpolicy.generation.decode import decode
from textpolicy.generation.engine import can_decode_together
from textpolicy.generation.lora import adapters_of
from textpolicy.generation.prompts import encode_prompt
from textpolicy.types import Prompt, Sampling

ANSWER_TOKENS = 12
MEASURABLE_EFFECT = 1e-4
"""Below this largest effect on a log-probability, an adapter cannot be told from rounding."""
MERGED_TOLERANCE = 2e-3
"""The largest difference between merged weights in memory and the same weights read from a file.

Both are the same numbers. What is left is the order in which a program adds them up.
"""
_PROMPT_TOKENS = 128
LogProbabilities = Callable[[Sequence[int]], np.ndarray]
"""A function of token ids: the log-probabilities of the whole vocabulary after each token."""


@dataclass(frozen=True, kw_only=True)
class Opened:
    """What a program computes by the files of an export: after each token, or after whole texts.

    `compute_ends` returns a row of log-probabilities for each of several sequences of token ids.
    """

    by: str
    compute: LogProbabilities | None = None
    compute_ends: Callable[[Sequence[Sequence[int]]], np.ndarray] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Proof:
    """How an export differs from base and adapter as they were trained, on `tokens` tokens.

    `largest_difference` and `adapter_effect` are over all log-probabilities of the vocabulary:
    of the export from the trained model, and of the trained model from its base. `kept` is the
    share of the adapter's effect that the export has: 1 is all of it, 0 is the base alone. `noise`
    is the size of all else that the export changes, divided by the size of the adapter's effect.
    `equal_greedy` is the share of tokens after which the likeliest next token is equal.

    `from_merged` is the largest difference from the merged and rounded weights in memory, and None
    for an adapter and for programs with other arithmetic. It shows a wrong file also where rounding
    hides one from the other numbers.

    An adapter that is exported over a float base is compared with the same adapter over that base
    in memory. `from_trained` is then the largest difference from the quantized model that was
    trained, which nothing can remove.
    """

    opened_by: str
    prompts: int
    tokens: int
    largest_difference: float
    tolerance: float
    adapter_effect: float
    kept: float
    noise: float
    equal_greedy: float
    from_merged: float | None = None
    from_trained: float | None = None

    def check(self, min_kept: float) -> None:
        """Raise `ExportError` if the export is not what was trained."""
        problems: list[str] = []
        # A comparison with NaN is False, and must be a problem.
        if not self.largest_difference <= self.tolerance:
            problems.append(
                f"log-probabilities differ by up to {self.largest_difference:.1e}; expected at "
                f"most {self.tolerance:.1e}"
            )
        if self.from_merged is not None and not self.from_merged <= MERGED_TOLERANCE:
            problems.append(
                f"they differ by up to {self.from_merged:.1e} from the merged weights in memory; "
                f"expected at most {MERGED_TOLERANCE:.1e}"
            )
        measurable = self.adapter_effect > MEASURABLE_EFFECT and min_kept > 0
        # Rounding moves the share up or down by about its noise. An effect that is too large is as
        # wrong as one that is too small: a scale that was applied twice.
        low, high = self.kept - self.noise, self.kept + self.noise
        if measurable and not (high >= min_kept and low <= max(1.1, 2 - min_kept)):
            problems.append(
                f"{self.kept:.1%} of the adapter's effect is left; expected at least {min_kept:.0%}"
            )
        if problems:
            raise ExportError(
                f"What was written is not what was trained, as {self.opened_by} computes it: "
                f"{'; '.join(problems)}. Nothing was kept"
            )

    def __str__(self) -> str:
        """Return the proof in one line."""
        effect = f"{self.kept:.1%} of its effect is left, with noise of {self.noise:.1%}"
        if self.adapter_effect <= MEASURABLE_EFFECT:
            effect = f"its effect of {self.adapter_effect:.0e} is too small to be measured"
        text = (
            f"opened again by {self.opened_by}: log-probabilities within "
            f"{self.largest_difference:.1e} (tolerance {self.tolerance:.1e}; the adapter moves "
            f"them by up to {self.adapter_effect:.2g}, {effect}), {self.equal_greedy:.1%} of "
            f"{self.tokens} greedy tokens equal"
        )
        if self.from_trained is None:
            return text
        return (
            f"{text}. Over the float base they differ by up to {self.from_trained:.2g} from what "
            "was trained over the quantized base"
        )


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Token ids of prompts and greedy answers, with log-probabilities from the answers on.

    `prompts` are the token ids that the whole prompts have.
    """

    prompts: Sequence[tuple[Prompt, Sequence[int]]]
    sequences: Sequence[Sequence[int]]
    starts: Sequence[int]
    trained: np.ndarray
    base: np.ndarray
    merged: np.ndarray | None = None
    from_trained: float | None = None

    @doing("comparing the export with the trained model")
    def compare(self, opened: Opened, tolerance: float) -> Proof:
        """Return how the export, opened again, differs from the trained model."""
        trained, base, from_merged = self.trained, self.base, None
        if opened.compute:
            export = self._rows(opened.compute)
            if self.merged is not None and export.shape == trained.shape:
                from_merged = float(np.abs(export - self.merged).max())
        else:
            assert opened.compute_ends
            export = opened.compute_ends(self.sequences)
            ends = np.cumsum([len(tokens) - start for tokens, start in self._pairs()]) - 1
            trained, base = trained[ends], base[ends]
        if export.shape != trained.shape:
            raise ExportError(
                f"{opened.by} finds {export.shape[-1]} tokens in the vocabulary of what was "
                f"written; expected {trained.shape[-1]}. Nothing was kept"
            )
        moved, wrong = trained - base, export - trained
        size = float((moved**2).sum())
        kept = float(((export - base) * moved).sum()) / size if size else 1.0
        other = export - base - kept * moved
        return Proof(
            opened_by=opened.by,
            prompts=len(self.sequences),
            tokens=len(trained),
            largest_difference=float(np.abs(wrong).max()),
            tolerance=tolerance,
            adapter_effect=float(np.abs(moved).max()),
            kept=kept,
            noise=(float((other**2).sum()) / size) ** 0.5 if size else 0.0,
            equal_greedy=float((export.argmax(-1) == trained.argmax(-1)).mean()),
            from_merged=from_merged,
            from_trained=self.from_trained,
        )

    @doing("measuring the model over its float base", begins=True)
    def over(self, model: nn.Module) -> "Reference":
        """Return the same measurement of the adapter over another base."""
        trained, base = _trained_and_base(model, self._rows)
        difference = float(np.abs(trained - self.trained).max())
        return replace(self, trained=trained, base=base, from_trained=difference)

    def with_merged(self, compute: LogProbabilities) -> "Reference":
        """Return the same measurement with what the merged weights in memory compute."""
        return replace(self, merged=self._rows(compute))

    def _rows(self, compute: LogProbabilities) -> np.ndarray:
        return answer_rows(compute, self._pairs())

    def _pairs(self) -> list[tuple[Sequence[int], int]]:
        return list(zip(self.sequences, self.starts, strict=True))


@doing("measuring the trained model", begins=True)
def measure(model: nn.Module, tokenizer: TokenizerWrapper, asking: Asking) -> Reference:
    """Return what the model computes with its adapter and without it, on prompts and answers."""
    encoded = [
        (prompt, encode_prompt(tokenizer, prompt, chat_template_kwargs=asking.arguments))
        for prompt in asking.prompts
    ]
    begins = [tokens[-_PROMPT_TOKENS:] for _, tokens in encoded]
    answers = _greedy_answers(model, begins)
    sequences = [[*tokens, *answer] for tokens, answer in zip(begins, answers, strict=True)]
    starts = [len(tokens) - 1 for tokens in begins]
    pairs = list(zip(sequences, starts, strict=True))
    trained, base = _trained_and_base(model, lambda compute: answer_rows(compute, pairs))
    return Reference(
        prompts=encoded, sequences=sequences, starts=starts, trained=trained, base=base
    )


def answer_rows(
    compute: LogProbabilities, pairs: Sequence[tuple[Sequence[int], int]]
) -> np.ndarray:
    """Return the log-probabilities after the tokens from a start on, for tokens with a start."""
    return np.concatenate([compute(tokens)[start:] for tokens, start in pairs])


def log_probabilities_of(model: nn.Module) -> LogProbabilities:
    """Return the function that computes the log-probabilities by an mlx model."""

    def compute(tokens: Sequence[int]) -> np.ndarray:
        logits = cast(Any, model)(mx.array([list(tokens)]))[0].astype(mx.float32)
        return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))

    return compute


def _trained_and_base(
    model: nn.Module, rows: Callable[[LogProbabilities], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    compute = log_probabilities_of(model)
    trained = rows(compute)
    with adapters_of(model).disabled():
        return trained, rows(compute)


def _greedy_answers(model: nn.Module, prompts: Sequence[list[int]]) -> list[list[int]]:
    groups = decode(
        model,
        prompts,
        n=1,
        sampling=Sampling(max_tokens=ANSWER_TOKENS, temperature=0),
        stop=lambda tokens: None,
        seed=0,
        max_rows=len(prompts),
        batched=can_decode_together(model),
    )
    return [row.tokens for (row,) in groups]
