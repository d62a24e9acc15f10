"""The sections on training of the page "LoRA Training Guide", on the embedded model.

The options have our names: `batch_size`, `accumulation`, `epochs`, `lr`, `warmup`, `weight_decay`,
`checkpoint_gradients`, `dtype`. The page trains in float16 on a GPU, the tests in float32 on a CPU.
"""

import json
from pathlib import Path

import mlx.core as mx
import pytest

from tests.quick import quick_first
from textpolicy.adapters import AdapterConfig, AdapterContainer
from textpolicy.cli import main
from textpolicy.generation.mlx_generation import create_policy
from textpolicy.training.optimizer import build_optimizer
from textpolicy.training.sft import (
    Encoding,
    SFTParameters,
    ValidationReport,
    iterations_of,
    load_data,
    train_sft,
)
from textpolicy.types import Progress

SYSTEM = "You are an expert SNES developer."
ATTENTION, FEED_FORWARD = "q_proj,k_proj,v_proj,o_proj", "gate_proj,up_proj,down_proj"


def instructions(folder: Path, count: int = 24) -> Path:
    rows = [
        {"instruction": "Add.", "input": f"{n}+{n}=", "output": str(2 * n)} for n in range(count)
    ]
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_sample_becomes_the_page_s_three_messages(load_tiny):
    _, tokenizer = load_tiny()
    encoding = Encoding(tokenizer=tokenizer, system=SYSTEM)
    row = {"instruction": "Write.", "input": "A sprite.", "output": "lda"}
    one = encoding.demonstration(row, "here")
    text = tokenizer.apply_chat_template(
        [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": "Write.\n\nA sprite."},
            {"role": "assistant", "content": "lda"},
        ],
        tokenize=False,
    )
    # Up to the stop token, which is the last that is learned.
    assert text.startswith(tokenizer.decode(one.tokens))
    learned = [token for token, counts in zip(one.tokens, one.mask, strict=True) if counts]
    assert tokenizer.decode(learned[:-1]) == "lda"
    assert learned[-1] in tokenizer.eos_token_ids


def sft(folder, *options, data=None):
    argv = ["sft", "--data", str(data or folder / "train.jsonl"), "--output", str(folder / "run")]
    return main([*argv, "--steps-per-report", "1", *options, "--json"])


def rows(folder):
    text = (folder / "run" / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.slow
def test_the_training_command(tmp_path, capsys):
    """The command takes every option of the page's command and of its script."""
    instructions(tmp_path)
    options = [
        *("--rank", "64", "--alpha", "128", "--dropout", "0.05"),
        *("--target-modules", f"{ATTENTION},{FEED_FORWARD}"),
        *("--batch-size", "4", "--accumulation", "4", "--lr", "2e-4", "--epochs", "3"),
        *("--warmup", "2", "--weight-decay", "0.01", "--checkpoint-gradients"),
        *("--system", SYSTEM, "--tensorboard"),
    ]
    assert sft(tmp_path, *options) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    # 21 demonstrations of 24 are trained on, 16 an update: 2 updates an epoch.
    assert result["iteration"] == 6
    container = AdapterContainer.from_directory(result["adapters"])
    assert (container.config.rules[0].rank, container.config.rules[0].scale) == (64, 2.0)
    assert container.config.dropout == 0.05
    trained = {name.split(".")[-2] for name in container.parameters()}
    assert trained == {*ATTENTION.split(","), *FEED_FORWARD.split(",")}
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    rates = [row["learning_rate"] for row in rows(tmp_path) if "learning_rate" in row]
    assert rates[0] < rates[1] < rates[2] == pytest.approx(2e-4)


def test_every_flag_of_the_page_s_command_is_answered_with_ours(capsys):
    page = """--base_model Qwen/Qwen2.5-Coder-14B-Instruct --dataset train.jsonl --output_dir v1
    --lora_r 64 --lora_alpha 128 --batch_size 4 --gradient_accumulation_steps 4
    --learning_rate 2e-4 --num_epochs 3 --fp16 --gradient_checkpointing
    --lora_dropout 0.05 --target_modules q_proj --warmup_steps 100 --weight_decay 0.01"""
    with pytest.raises(SystemExit) as stopped:
        main(["sft", *page.split()])
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.replace("\n  ", " ").split("unknown flag ")[1:]
    answers = dict(line.strip().removesuffix("?").split("; did you mean ") for line in lines)
    assert answers == {
        "--base_model": "--model",
        "--dataset": "--data",
        "--output_dir": "--output",
        "--lora_r": "--rank",
        "--lora_alpha": "--alpha",
        "--batch_size": "--batch-size",
        "--gradient_accumulation_steps": "--accumulation",
        "--learning_rate": "--lr",
        "--num_epochs": "--epochs",
        "--fp16": "--dtype float16",
        "--gradient_checkpointing": "--checkpoint-gradients",
        "--lora_dropout": "--dropout",
        "--target_modules": "--target-modules",
        "--warmup_steps": "--warmup",
        "--weight_decay": "--weight-decay",
    }


@pytest.mark.filterwarnings("default")
def test_the_page_s_warm_up_is_longer_than_a_short_run_and_that_is_said(tmp_path, capsys):
    instructions(tmp_path, 8)
    assert sft(tmp_path, "--iterations", "2", "--warmup", "100", "--max-length", "64") == 0
    error = capsys.readouterr().err
    assert "warning: warmup is 100 updates, and the run has 2" in error
    assert "UserWarning" not in error
    rates = [row["learning_rate"] for row in rows(tmp_path) if "learning_rate" in row]
    assert rates == pytest.approx([2e-4 / 101, 4e-4 / 101])


@pytest.mark.parametrize("dtype", quick_first(1, ["bfloat16", "float16"]))
def test_mixed_precision(tmp_path, dtype, capsys):
    instructions(tmp_path, 8)
    assert sft(tmp_path, "--iterations", "2", "--dtype", dtype) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    arrays = AdapterContainer.from_directory(result["adapters"]).parameters()
    assert {array.dtype for array in arrays.values()} == {mx.float32}
    assert result["validation_loss"] > 0


def test_epochs_count_updates_of_the_effective_batch(load_tiny, tmp_path):
    _, tokenizer = load_tiny()
    data = load_data(instructions(tmp_path), Encoding(tokenizer=tokenizer), validation_share=0)
    parameters = SFTParameters(batch_size=4, accumulation=4)
    assert len(data.train) == 24
    assert iterations_of(3, data.train, parameters) == 3 * 2


@pytest.mark.slow
def test_a_loss_that_does_not_decrease_needs_a_higher_rate_and_too_high_a_one_diverges(
    load_tiny, tmp_path
):
    """Each rate of the page, in its order, lowers the loss faster than the rate before."""
    _, tokenizer = load_tiny()
    data = load_data(instructions(tmp_path), Encoding(tokenizer=tokenizer), validation_share=0)

    def after(rate):
        model, _ = load_tiny()
        AdapterContainer.from_model(model, AdapterConfig(rank=8, scale=2.0))
        parameters = SFTParameters(batch_size=8, iterations=10)
        result = train_sft(
            model, data.train, data.train, build_optimizer(rate), parameters=parameters
        )
        return result.validation_loss

    losses = [after(rate) for rate in (1e-4, 2e-4, 5e-4, 1e-3)]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.slow
def test_overfitting_shows_and_early_stopping_keeps_the_best_adapter(load_tiny, tmp_path):
    """With few rows and many epochs the validation loss rises, and the best adapter is kept."""
    model, tokenizer = load_tiny()
    AdapterContainer.from_model(model, AdapterConfig(rank=32, scale=2.0))
    rows = [{"prompt": f"{n * 7 % 90 + 10}+{n * 13 % 90 + 10}=", "completion": str(n)}
            for n in range(16)]  # fmt: skip
    losses = []

    def note(event):
        if isinstance(event, ValidationReport):
            losses.append(event.loss)
        return Progress.MORE

    path = tmp_path / "adapter.safetensors"
    parameters = SFTParameters(
        batch_size=4, iterations=200, steps_per_eval=5, patience=3, adapter_path=path
    )
    result = train_sft(
        model,
        rows[:8],
        rows[8:],
        build_optimizer(3e-3),
        tokenizer=tokenizer,
        parameters=parameters,
        on_progress=note,
    )
    assert result.ended == "early" and result.iteration < 200
    assert losses[-3:] == sorted(losses[-3:]) or min(losses) < min(losses[-3:])
    assert result.best_loss == min(losses) < result.validation_loss
    best = AdapterContainer.from_directory(parameters.best_file)
    assert best.version == result.best_iteration < result.iteration


@pytest.mark.slow
def test_the_adapter_is_used_directly_or_merged(load_tiny, tmp_path):
    model, tokenizer = load_tiny()
    data = load_data(instructions(tmp_path), Encoding(tokenizer=tokenizer), validation_share=0)
    adapters = AdapterContainer.from_model(model, AdapterConfig(rank=8, scale=2.0))
    train_sft(model, data.train, [], build_optimizer(1e-3), parameters=SFTParameters(iterations=20))
    prompt = [{"role": "user", "content": "Add.\n\n3+3="}]
    greedy = {"max_tokens": 4, "temperature": 0.0}
    direct = create_policy(model, tokenizer, greedy)(prompt)
    merged = create_policy(adapters.merge_and_unload(), tokenizer, greedy)(prompt)
    assert merged.tokens == direct.tokens
