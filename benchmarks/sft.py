"""Compare supervised training with mlx-lm's LoRA trainer: losses, tokens per second, peak memory.

    python benchmarks/sft.py --peer mlx-lm --json --output benchmarks/results/sft.json

Both libraries have the same model, adapters, data, optimizer and settings. First both train on the
batches that mlx-lm draws ("same batches"), then each library draws its own ("own batches"). The
runs take turns on one thread, and the script reports medians over the repeats.

Tokens are the real targets: mlx-lm also trains on one padding token after most sequences. For the
comparison of losses, mlx-lm's loss gets a mask without this token. For times and memory, mlx-lm
runs unchanged.
"""

import argparse
import contextlib
import gc
import io
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_lm
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3
from mlx_lm.tuner import trainer as peer
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.datasets import CacheDataset
from mlx_lm.tuner.utils import linear_to_lora_layers
from setting import setting

from textpolicy import fast_cpu
from textpolicy.adapters.config.adapter_config import AdapterConfig
from textpolicy.adapters.container import AdapterContainer
from textpolicy.environments import gold_answers, load
from textpolicy.fast_cpu.model_functions import use_fast_functions
from textpolicy.generation.mlx_generation import load_model
from textpolicy.generation.model_files import tiny_model
from textpolicy.training.sft import (
    BatchStream,
    Demonstration,
    SFTEvent,
    SFTParameters,
    TrainReport,
    train_sft,
)
from textpolicy.training.sft.batches import Epochs
from textpolicy.types import Progress

RANK, SCALE, LEARNING_RATE, BATCH = 8, 20.0, 1e-4, 4
REPORT = 10
# Allowed relative difference of the loss of one update. The libraries add float32 numbers in
# different orders, and the optimizer amplifies the difference over the run.
TOLERANCE = 1e-3
QWEN = {
    "model_type": "qwen3",
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "intermediate_size": 768,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 2048,
    "max_position_embeddings": 1024,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class SpeedAndMemory:
    """The losses, the speed and the peak memory of one run of one library."""

    losses: list[float]
    tokens_per_second: float
    peak_mb: float


class TokenRows:
    """A data set for mlx-lm: tokens, and the position of the first token that is learned."""

    def __init__(self, demonstrations: list[Demonstration]) -> None:
        self._rows = [(one.tokens, 0) for one in demonstrations]

    def __getitem__(self, row: int) -> tuple[list[int], int]:
        return self._rows[row]

    def __len__(self) -> int:
        return len(self._rows)

    def process(self, row: tuple[list[int], int]) -> tuple[list[int], int]:
        return row


class LossTimes(TrainingCallback):
    """The loss and the time of every report."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.times: list[float] = []

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        self.add(train_info["train_loss"])

    def add(self, loss: float) -> None:
        self.losses.append(loss)
        self.times.append(time.perf_counter())


def texts(count: int) -> list[Demonstration]:
    """Return texts of one to twelve solved problems, whose lengths vary as in real data."""
    _, tokenizer = load_model("tiny")
    rng = Random(0)
    names = ["add", "sort", "reverse", "countdown"]
    environments = {name: load(name) for name in names}
    streams = {name: environment.stream(0) for name, environment in environments.items()}

    def problem() -> str:
        name = rng.choice(names)
        task = next(streams[name])
        (answer,) = gold_answers(environments[name], task)
        return f"{task.prompt} {answer}\n"

    found: list[Demonstration] = []
    for _ in range(count):
        text = "".join(problem() for _ in range(rng.randint(1, 12)))
        tokens = [*tokenizer.encode(text), tokenizer.eos_token_id]
        found.append(Demonstration(tokens=tokens, mask=[False] + [True] * (len(tokens) - 1)))
    return found


def fresh_model(name: str) -> nn.Module:
    """Return a model with the same weights in each call."""
    if name == "tiny":
        return mlx_lm.load(str(tiny_model()))[0]
    mx.random.seed(0)
    model = qwen3.Model(qwen3.ModelArgs.from_dict(QWEN))
    mx.eval(model.parameters())
    return model


def float32_model(name: str) -> nn.Module:
    model = fresh_model(name)
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    return model


def fresh_adapters(name: str) -> dict[str, mx.array]:
    """Return the adapter tensors that both libraries start from."""
    model = float32_model(name)
    return adapted(model).parameters()


def adapted(model: nn.Module) -> AdapterContainer:
    config = AdapterConfig(rank=RANK, scale=SCALE)
    return AdapterContainer.from_model(model, config, seed=0)


def peer_batches(demonstrations: list[Demonstration]) -> Iterator[list[Demonstration]]:
    """Yield the batches that mlx-lm draws."""
    by_tokens = {tuple(one.tokens): one for one in demonstrations}
    np.random.seed(0)
    drawn = peer.iterate_batches(CacheDataset(TokenRows(demonstrations)), BATCH, 2048, loop=True)
    for batch, lengths in drawn:
        rows = zip(np.array(batch), np.array(lengths), strict=True)
        yield [by_tokens[tuple(row[:length].tolist())] for row, (_, length) in rows]


def loss_without_padding(
    model: nn.Module, batch: mx.array, lengths: mx.array
) -> tuple[mx.array, mx.array]:
    """Return mlx-lm's loss with a mask that leaves out the padding token after each sequence."""
    return peer.default_loss(model, batch, lengths - mx.array([[0, 1]]))


def run_textpolicy(
    name: str,
    demonstrations: list[Demonstration],
    batches: list[list[Demonstration]] | None,
    steps: int,
    every: int,
) -> SpeedAndMemory:
    """Train on the given batches, or on batches that TextPolicy draws if there are none."""
    model = float32_model(name)
    # load_model does so too.
    use_fast_functions(model)
    adapted(model)
    loss_times = LossTimes()

    def on_progress(event: SFTEvent) -> Progress:
        if isinstance(event, TrainReport):
            loss_times.add(event.loss)
        return Progress.MORE

    settings = SFTParameters(batch_size=BATCH, iterations=steps, steps_per_report=every)
    source = demonstrations if batches is None else BatchStream(batches)

    def run() -> None:
        train_sft(
            model,
            source,
            [],
            optim.Adam(LEARNING_RATE),
            parameters=settings,
            on_progress=on_progress,
        )

    drawn = Epochs(demonstrations, BATCH, settings.seed).epoch(0)
    return measured(run, loss_times, every, batches or [[one for (one,) in rows] for rows in drawn])


def run_mlx_lm(
    name: str,
    start: dict[str, mx.array],
    demonstrations: list[Demonstration],
    batches: list[list[Demonstration]],
    steps: int,
    every: int,
    loss: Callable[..., Any] = peer.default_loss,
) -> SpeedAndMemory:
    model = float32_model(name)
    model.freeze()
    linear_to_lora_layers(model, -1, {"rank": RANK, "scale": SCALE, "dropout": 0.0})
    model.load_weights(list(start.items()), strict=False)
    found = {key for key, _ in tree_flatten(model.trainable_parameters())}
    assert found == start.keys(), found ^ start.keys()
    loss_times = LossTimes()
    np.random.seed(0)

    def run() -> None:
        with TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            peer.train(
                model,
                optim.Adam(LEARNING_RATE),
                CacheDataset(TokenRows(demonstrations)),
                args=peer.TrainingArgs(
                    batch_size=BATCH,
                    iters=steps,
                    steps_per_report=every,
                    steps_per_save=10**9,
                    adapter_file=f"{folder}/adapters.safetensors",
                ),
                loss=loss,
                training_callback=loss_times,
            )

    return measured(run, loss_times, every, batches)


def measured(
    run: Callable[[], None], loss_times: LossTimes, every: int, batches: list[list[Demonstration]]
) -> SpeedAndMemory:
    """Run, and measure the speed from the first report to the last, without compilation."""
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    run()
    peak = mx.get_peak_memory() / 1e6
    tokens = sum(len(one.tokens) - 1 for batch in batches[every:] for one in batch)
    seconds = loss_times.times[-1] - loss_times.times[0]
    rate = tokens / seconds
    return SpeedAndMemory(losses=loss_times.losses, tokens_per_second=rate, peak_mb=peak)


def compare(name: str, steps: int, repeats: int) -> dict[str, Any]:
    demonstrations = texts(4 * steps)
    batches = list(islice(peer_batches(demonstrations), steps))
    start = fresh_adapters(name)
    mine = run_textpolicy(name, demonstrations, batches, steps, 1)
    peers = run_mlx_lm(name, start, demonstrations, batches, steps, 1, loss_without_padding)
    differences = [abs(a - b) / b for a, b in zip(mine.losses, peers.losses, strict=True)]
    result: dict[str, Any] = {
        "model": name,
        "steps": steps,
        "loss_first": round(mine.losses[0], 4),
        "loss_last": round(mine.losses[-1], 4),
        "peer_loss_last": round(peers.losses[-1], 4),
        "largest_relative_difference_of_loss": float(f"{max(differences):.2g}"),
        "same_curve": max(differences) < TOLERANCE,
    }
    for kind, given in (("same_batches", batches), ("own_batches", None)):
        pairs = [
            (
                run_textpolicy(name, demonstrations, given, steps, REPORT),
                run_mlx_lm(name, start, demonstrations, batches, steps, REPORT),
            )
            for _ in range(repeats)
        ]
        result[kind] = {
            who: {
                "tokens_per_second": round(median(run.tokens_per_second for run in runs)),
                "peak_mb": round(median(run.peak_mb for run in runs), 1),
            }
            for who, runs in zip(("textpolicy", "mlx-lm"), zip(*pairs, strict=True), strict=True)
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--peer", choices=["mlx-lm"], default="mlx-lm", help="library to compare with"
    )
    parser.add_argument("--steps", type=int, default=60, help="updates of each run")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each library")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--output", type=Path, help="write the object to a file too")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error(f"--repeats is {options.repeats}; expected at least 1")
    if options.steps <= REPORT:
        parser.error(f"--steps is {options.steps}; expected more than {REPORT}")
    if fast_cpu.enable().threads:
        fast_cpu.set_threads(1)
    asked = {"batch_size": BATCH, "rank": RANK, "repeats": options.repeats}
    record = {
        "setting": setting() | asked,
        "tolerance_of_loss": TOLERANCE,
        "results": [compare(name, options.steps, options.repeats) for name in ("tiny", "qwen3")],
    }
    text = json.dumps(record, indent=1)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")
    print(text if options.json else as_table(record))


def as_table(record: dict[str, Any]) -> str:
    """Return one line for each library and kind of batches."""
    lines: list[str] = []
    for result in record["results"]:
        difference = result["largest_relative_difference_of_loss"]
        lines.append(
            f"{result['model']}: losses differ by at most {difference}, relative to the loss"
        )
        for kind in ("same_batches", "own_batches"):
            for who, run in result[kind].items():
                rate, peak = run["tokens_per_second"], run["peak_mb"]
                lines.append(f"  {kind:12}  {who:10}  {rate:6} tokens/s  {peak:7} MB")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
