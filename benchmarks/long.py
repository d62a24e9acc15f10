"""Measure how speed and memory change along completions of thousands of tokens.

    python benchmarks/long.py --tokens 4096 16384 --json --output benchmarks/results/long.json

The model is a narrow Qwen3 of random weights with four blocks. It generates one group of two
completions after a prompt of 64 tokens. For each length the script reports the tokens generated per
second in each quarter of the length; the seconds and the peak memory of one update, with and
without gradient checkpointing, with one completion in memory at a time; and the largest difference
between the adapters of the two updates. From one length to the next, the script reports the
exponent of each number: 1 is proportional, 2 is quadratic like attention.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import qwen3
from scaling import measured, tokens_of
from setting import setting

from textpolicy import fast_cpu
from textpolicy.adapters import AdapterConfig, AdapterContainer
from textpolicy.algorithms import grpo
from textpolicy.fast_cpu.model_functions import use_fast_functions
from textpolicy.generation.decode import decode
from textpolicy.training.optimizer import build_optimizer
from textpolicy.training.trainer import Trainer
from textpolicy.types import NOT_SAMPLED, Rollout, RolloutGroup, Sampling, StopReason, Task

PROMPT, GROUP, QUARTERS, WARM_UP = 64, 2, 4, 32
SIZES: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "intermediate_size": 192,
    "vocab_size": 2048,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 65536,
}


def adapted_model() -> nn.Module:
    """Return a model with the same random weights in each call, and with fresh adapters."""
    mx.random.seed(0)
    model = qwen3.Model(qwen3.ModelArgs(**SIZES))
    use_fast_functions(model)
    AdapterContainer.from_model(model, AdapterConfig(rank=8, scale=2.0), seed=0)
    mx.eval(model.parameters())
    return model


def generation(tokens: int) -> dict[str, Any]:
    """Return the speed of both rows together in each quarter of the length, and the peak memory."""
    model, marks = adapted_model(), [0.0] * tokens

    def watch(drawn: list[int]) -> StopReason | None:
        marks[len(drawn) - 1] = time.perf_counter()
        return None

    def generate() -> None:
        decode(
            model,
            [tokens_of(PROMPT, 0)],
            n=GROUP,
            sampling=Sampling(max_tokens=tokens),
            stop=watch,
            seed=0,
            max_rows=GROUP,
        )

    found = measured(generate)
    ends = [number * (tokens - 1) // QUARTERS for number in range(QUARTERS + 1)]
    speeds = [GROUP * (b - a) / (marks[b] - marks[a]) for a, b in pairwise(ends)]
    return {
        "seconds": round(found.seconds, 2),
        "megabytes": round(found.megabytes, 1),
        "tokens_per_second_by_quarter": [round(speed) for speed in speeds],
    }


def update(tokens: int, *, checkpoint: bool) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """Return the time and memory of one update after a warm-up, and the adapters after it."""
    model = adapted_model()
    trainer = Trainer(
        model,
        grpo.compute_advantages,
        grpo.policy_loss,
        build_optimizer(1e-4),
        micro_batch_size=1,
        checkpoint_gradients=checkpoint,
    )
    trainer.train([group_of(WARM_UP)])
    group = group_of(tokens)
    found = measured(lambda: trainer.train([group]))
    assert trainer.adapters
    record = {"seconds": round(found.seconds, 2), "megabytes": round(found.megabytes, 1)}
    return record, trainer.adapters.parameters()


def group_of(tokens: int) -> RolloutGroup:
    """Return two completions of random tokens with the rewards 0 and 1."""
    prompt = tokens_of(PROMPT, 0)

    def rollout(member: int) -> Rollout:
        return Rollout(
            tokens=prompt + tokens_of(tokens, 1 + member),
            mask=[False] * PROMPT + [True] * tokens,
            logprobs=[0.0] * PROMPT + [-7.6] * tokens,
            completion="",
            reward=float(member),
            stop_reason=StopReason.LENGTH,
            sampling=Sampling(max_tokens=tokens),
            version=NOT_SAMPLED,
        )

    members = [rollout(member) for member in range(GROUP)]
    return RolloutGroup(task=Task(id="long", prompt=""), rollouts=members)


def measure(tokens: int) -> dict[str, Any]:
    """Return all measurements at one length."""
    record: dict[str, Any] = {"tokens": tokens, "generation": generation(tokens)}
    record["update"], plain = update(tokens, checkpoint=False)
    record["update_with_checkpointing"], lean = update(tokens, checkpoint=True)
    differences = [mx.abs(plain[name] - lean[name]).max().item() for name in plain]
    record["largest_difference"] = max(differences)
    print(f"measured {tokens} tokens", file=sys.stderr, flush=True)
    return record


def exponents(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the exponent of each measurement from one length to the next."""
    phases = ("generation", "update", "update_with_checkpointing")
    return [
        {"from": a["tokens"], "to": b["tokens"]}
        | {
            f"{phase}_{unit}": round(
                math.log(b[phase][unit] / a[phase][unit]) / math.log(b["tokens"] / a["tokens"]), 2
            )
            for phase in phases
            for unit in ("seconds", "megabytes")
        }
        for a, b in pairwise(records)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    text = "lengths (default: 1024 4096); 16384 takes minutes"
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096], help=text)
    parser.add_argument("--threads", type=int, default=1, help="threads of the BLAS (default: 1)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write the object to a file too"
    )
    options = parser.parse_args()
    if fast_cpu.enable().threads:
        fast_cpu.set_threads(options.threads)
    records = [measure(tokens) for tokens in sorted(options.tokens)]
    asked = {"prompt": PROMPT, "group_size": GROUP, "sizes": SIZES}
    record = {"setting": setting() | asked, "lengths": records, "exponents": exponents(records)}
    if options.output:
        options.output.write_text(json.dumps(record, indent=1) + "\n")
    lines = "\n".join(map(str, [*records, *record["exponents"]]))
    print(json.dumps(record, indent=1) if options.json else lines)


if __name__ == "__main__":
    main()
