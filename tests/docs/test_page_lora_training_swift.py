"""The page "LoRA Training" from top to bottom, on the embedded model, with our names."""

import inspect
import json
from dataclasses import fields
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest

import textpolicy as tp
from tests.memory import peak_of
from textpolicy.adapters import AdapterConfig, AdapterContainer
from textpolicy.errors import DataError
from textpolicy.training.checkpoint import Checkpoints
from textpolicy.training.optimizer import build_optimizer
from textpolicy.training.sft import (
    SaveReport,
    SFTParameters,
    TrainReport,
    ValidationReport,
    evaluate_sft,
    load_examples,
    sft_loss,
    train_sft,
)
from textpolicy.types import Progress

# Rank and scale of the page; of its sixteen blocks the embedded model has two.
LORA = {"num_layers": 2, "fine_tune_type": "lora", "lora_parameters": {"rank": 8, "scale": 10.0}}
TRAIN = [f"{n}+{n}={2 * n}" for n in range(40)]
VALID = [f"{n}+{n}={2 * n}" for n in range(40, 48)]


@pytest.fixture
def prepared(load_tiny):
    model, tokenizer = load_tiny()
    adapters = AdapterContainer.from_model(model, AdapterConfig.from_dict(LORA))
    return model, tokenizer, adapters


def small(**changes):
    settings = {"batch_size": 4, "iterations": 8, "steps_per_report": 2, "steps_per_eval": 4}
    return SFTParameters(**(settings | {"save_every": 4} | changes))


def test_training_parameters_and_their_defaults():
    defaults = {f.name: f.default for f in fields(SFTParameters)}
    page = {
        "batch_size": 4,
        "iterations": 1000,
        "steps_per_report": 10,
        "steps_per_eval": 100,
        "validation_batches": 10,
        "save_every": 100,
        "adapter_path": None,
    }
    assert {name: defaults[name] for name in page} == page


def test_training_workflow(prepared, tmp_path):
    model, tokenizer, adapters = prepared
    seen = []

    def progress(event):
        match event:
            case TrainReport(
                iteration=iteration,
                loss=loss,
                iterations_per_second=per_second,
                tokens_per_second=tokens,
            ):
                seen.append(("train", iteration, loss, per_second, tokens))
            case ValidationReport(iteration=iteration, loss=loss, seconds=seconds):
                seen.append(("validation", iteration, loss, seconds))
            case SaveReport(iteration=iteration, path=path):
                seen.append(("save", iteration, path))
        assert str(event).startswith(f"iteration {event.iteration}: ")
        return Progress.MORE

    path = tmp_path / "adapter.safetensors"
    result = train_sft(
        model,
        TRAIN,
        VALID,
        optim.Adam(learning_rate=1e-3),
        tokenizer=tokenizer,
        parameters=small(adapter_path=path),
        on_progress=progress,
    )
    assert [(kind, iteration) for kind, iteration, *_ in seen] == [
        ("validation", 0),
        ("train", 2),
        ("train", 4),
        ("validation", 4),
        ("save", 4),
        ("train", 6),
        ("train", 8),
        ("validation", 8),
        ("save", 8),
    ]
    assert all(rate > 0 for kind, *_, a, b in seen if kind == "train" for rate in (a, b))
    assert result.iteration == 8
    assert adapters.version == 8
    first, *_, last = (entry[2] for entry in seen if entry[0] == "validation")
    assert last < first


def test_a_schedule_instead_of_a_rate(prepared):
    model, tokenizer, _ = prepared
    rates = []
    train_sft(
        model,
        TRAIN,
        [],
        build_optimizer(1e-5, schedule="linear", final_rate=1e-6, updates=8),
        tokenizer=tokenizer,
        parameters=small(),
        on_progress=lambda event: rates.append(event.learning_rate) or Progress.MORE,
    )
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > 8e-6 and rates[-1] < 3e-6


@pytest.mark.parametrize("kind", [TrainReport, ValidationReport, SaveReport])
def test_the_answer_stop_halts_training_after_that_event(prepared, tmp_path, kind):
    model, tokenizer, _ = prepared
    path = tmp_path / "adapter.safetensors"
    seen = []

    def stop(event):
        seen.append(event)
        return Progress.STOP if isinstance(event, kind) else Progress.MORE

    parameters = small(adapter_path=path)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    result = train_sft(
        model,
        TRAIN,
        VALID,
        optim.Adam(1e-3),
        tokenizer=tokenizer,
        parameters=parameters,
        checkpoints=checkpoints,
        on_progress=stop,
    )
    assert isinstance(seen[-1], kind)
    assert result.ended == "stopped" and result.iteration < 8
    assert AdapterContainer.from_directory(path).version == result.iteration
    assert checkpoints.newest().step == result.iteration


def test_data_is_one_example_a_line_of_text_or_of_json(tmp_path):
    (tmp_path / "train.txt").write_text("First training example here.\n\nSecond one here.\n")
    texts = [{"text": "First training example here."}, {"text": "Second one here."}]
    assert load_examples(tmp_path, "train") == texts
    (tmp_path / "valid.jsonl").write_text('{"text": "From the other file."}\n')
    assert load_examples(tmp_path, "valid") == [{"text": "From the other file."}]
    with pytest.raises(DataError, match=r"test\.jsonl"):
        load_examples(tmp_path, "test")
    # The page reads the .txt file, and mlx-lm the .jsonl file.
    (tmp_path / "train.jsonl").write_text('{"text": "Which file is meant?"}\n')
    with pytest.raises(DataError, match=r"has train\.jsonl and train\.txt.*Keep one of them"):
        load_examples(tmp_path, "train")


def test_a_bad_line_of_json_is_an_error_with_its_place(tmp_path):
    # The page leaves bad lines out without a word.
    (tmp_path / "train.jsonl").write_text('{"text": "Good."}\n{"text": "Bad.\n')
    with pytest.raises(DataError, match=r"train\.jsonl, line 2: not a row of JSON"):
        load_examples(tmp_path, "train")


def test_the_loss_is_the_mean_over_real_tokens(prepared):
    model, _, _ = prepared
    inputs = mx.array([[5, 17, 3], [44, 60, 0]])
    targets = mx.array([[17, 3, 2], [60, 2, 0]])
    loss, tokens = sft_loss(model, inputs, targets, mx.array([3, 2]))
    assert int(tokens) == 5
    logp = nn.log_softmax(model(inputs), axis=-1)
    picked = mx.take_along_axis(logp, targets[..., None], axis=-1).squeeze(-1)
    by_hand = -(picked[0].sum() + picked[1, :2].sum()) / 5
    assert float(loss) == pytest.approx(float(by_hand), abs=1e-6)


def test_a_custom_loss(prepared):
    model, tokenizer, _ = prepared
    called = []

    def smoothed(model, inputs, targets, lengths):
        called.append(inputs.shape)
        mask = mx.arange(inputs.shape[1])[None] < lengths[:, None]
        each = nn.losses.cross_entropy(model(inputs), targets, label_smoothing=0.1) * mask
        return each.sum() / mask.sum(), mask.sum()

    assert list(inspect.signature(smoothed).parameters) == ["model", "inputs", "targets", "lengths"]
    losses = []
    train_sft(
        model,
        TRAIN,
        [],
        optim.Adam(1e-2),
        loss=smoothed,
        tokenizer=tokenizer,
        parameters=small(),
        on_progress=lambda event: losses.append(event.loss) or Progress.MORE,
    )
    assert called and losses[-1] < losses[0]


def test_evaluation_on_all_data_or_on_so_many_batches(prepared):
    model, tokenizer, _ = prepared
    every = evaluate_sft(model, VALID, tokenizer=tokenizer, batch_size=4, batches=0)
    some = evaluate_sft(model, VALID, tokenizer=tokenizer, batch_size=4, batches=1)
    each = [evaluate_sft(model, [one], tokenizer=tokenizer) for one in VALID]
    # Texts are equally long here, so the mean over tokens is that over texts.
    lengths = {len(tokenizer.encode(one)) for one in VALID}
    assert len(lengths) == 1
    assert every == pytest.approx(sum(each) / len(each), abs=1e-5)
    assert some != every


def test_saving_and_loading(prepared, load_tiny, tmp_path):
    model, tokenizer, adapters = prepared
    parameters = small(adapter_path=tmp_path / "adapter.safetensors")
    train_sft(model, TRAIN, VALID, optim.Adam(1e-2), tokenizer=tokenizer, parameters=parameters)
    tokens = mx.array([tokenizer.encode(TRAIN[0])])
    expected = model(tokens)
    fresh, _ = load_tiny()
    AdapterContainer.from_directory(parameters.adapter_path).load(fresh)
    assert mx.array_equal(fresh(tokens), expected)
    # Weights of one's own choice, whenever one wants: a folder that mlx-swift-lm reads.
    folder = adapters.save(tmp_path / "folder")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["lora_parameters"].items() >= {"rank": 8, "scale": 10.0, "dropout": 0.0}.items()


@pytest.mark.slow
def test_memory_is_saved_by_smaller_batches_and_by_gradient_checkpointing(prepared):
    model, tokenizer, _ = prepared
    long = [" ".join(TRAIN[n : n + 20]) for n in range(8)]

    def peak(**options):
        told = {"tokenizer": tokenizer, "parameters": small(iterations=2, **options)}
        return peak_of(lambda: train_sft(model, long, [], optim.Adam(1e-3), **told))

    whole = peak(batch_size=8)
    assert peak(batch_size=1, accumulation=8) < 0.5 * whole
    # Two blocks have few activations to spare, and attention keeps none of its scores anyway.
    assert peak(batch_size=8, checkpoint_gradients=True) < 0.95 * whole


@pytest.mark.slow
def test_the_complete_example(tmp_path: Path):
    """As a user writes the example, with names of the top-level package only."""
    model, tokenizer = tp.load_model("tiny")
    tp.AdapterContainer.from_model(model, tp.AdapterConfig(rank=8, num_layers=2))
    (tmp_path / "train.txt").write_text("\n".join(TRAIN))
    (tmp_path / "valid.txt").write_text("\n".join(VALID))
    path = tmp_path / "adapter.safetensors"
    printed = []
    result = tp.train_sft(
        model,
        load_examples(tmp_path, "train"),
        load_examples(tmp_path, "valid"),
        optim.Adam(learning_rate=1e-3),
        tokenizer=tokenizer,
        parameters=tp.SFTParameters(batch_size=2, iterations=20, adapter_path=path),
        on_progress=lambda event: printed.append(str(event)) or tp.Progress.MORE,
    )
    assert result.ended == "finished" and path.exists()
    assert any("training loss" in line for line in printed)
