"""Supervised training with a callback: data files, reports, the best adapter, an own loss.

python examples/3_supervised_training.py [ITERATIONS]
"""

import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

import textpolicy as tp
from textpolicy.training.optimizer import build_optimizer
from textpolicy.training.sft import (
    SaveReport,
    TrainReport,
    ValidationReport,
    evaluate_sft,
    load_examples,
)


def smoothed(model, inputs, targets, lengths):
    """Return the loss with smoothed labels, and the number of tokens."""
    mask = mx.arange(inputs.shape[1])[None] < lengths[:, None]
    each = nn.losses.cross_entropy(model(inputs), targets, label_smoothing=0.1) * mask
    return each.sum() / mask.sum(), mask.sum()


def progress(event):
    match event:
        case TrainReport(iteration=iteration, loss=loss, tokens_per_second=rate):
            print(f"iteration {iteration}: loss {loss:.3f}, {rate:.0f} tokens a second")
        case ValidationReport(iteration=iteration, loss=loss):
            print(f"iteration {iteration}: validation loss {loss:.3f}")
            return tp.Progress.STOP if loss < 0.05 else tp.Progress.MORE
        case SaveReport(iteration=iteration, path=path):
            print(f"iteration {iteration}: saved {path.name}")
    return tp.Progress.MORE


def main(iterations: int = 20) -> None:
    model, tokenizer = tp.load_model("tiny")
    tp.AdapterContainer.from_model(model, tp.AdapterConfig(rank=8, scale=10.0, num_layers=2))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "train.txt").write_text("\n".join(f"{n}+{n}={2 * n}" for n in range(40)))
        (folder / "valid.jsonl").write_text('{"text": "41+41=82"}\n{"text": "43+43=86"}\n')
        train, valid = load_examples(folder, "train"), load_examples(folder, "valid")
        optimizer = build_optimizer(1e-3, schedule="linear", final_rate=1e-4, updates=iterations)
        path = folder / "adapter.safetensors"
        parameters = tp.SFTParameters(iterations=iterations, steps_per_eval=10, adapter_path=path)
        options = {"parameters": parameters, "on_progress": progress, "loss": smoothed}
        tp.train_sft(model, train, valid, optimizer, tokenizer=tokenizer, **options)
        print(f"all validation data: {evaluate_sft(model, valid, tokenizer=tokenizer):.3f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
