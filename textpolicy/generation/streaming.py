"""An answer as it is being written, for people who wait for it."""

from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from textpolicy.generation.prompts import check_prompt, encode_prompt
from textpolicy.types import Prompt, Sampling


def stream_answer(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompt: Prompt,
    sampling: Sampling,
    *,
    seed: int | None = None,
) -> Iterator[str]:
    """Pieces of the answer's text, each as soon as it is known; together they are all of it.

    It is mlx-lm that decodes here: nothing is recorded to train on.
    """
    tokens = encode_prompt(tokenizer, prompt)
    check_prompt(model, tokens, sampling.max_tokens)
    if seed is not None:
        mx.random.seed(seed)
    sampler = make_sampler(
        sampling.temperature,
        top_p=sampling.top_p if sampling.top_p < 1 else 0.0,
        min_p=sampling.min_p,
        top_k=sampling.top_k,
    )
    responses = mlx_lm.stream_generate(
        model, tokenizer, prompt=tokens, max_tokens=sampling.max_tokens, sampler=sampler
    )
    for response in responses:
        if response.text:
            yield response.text
