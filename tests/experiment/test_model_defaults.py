"""A config gets the numbers of its model, where the user has set none."""

import json
import shutil
from typing import Any

import pytest

import textpolicy as tp
from textpolicy.config import TrainConfig, changed, read_toml
from textpolicy.config.model_defaults import learning_rate
from textpolicy.errors import ConfigError
from textpolicy.experiment.model_defaults import low_rate_note, size_of, with_model_defaults
from textpolicy.runs import RunDirectory


@pytest.fixture
def wide(tiny, tmp_path):
    """Return the folder of a model like the embedded one, but with enough weights to be real."""
    folder = tmp_path / "wide"
    shutil.copytree(tiny, folder)
    shape = json.loads((folder / "config.json").read_text()) | {"vocab_size": 110_000}
    (folder / "config.json").write_text(json.dumps(shape))
    return folder


def config(model: Any, **values: Any) -> TrainConfig:
    """Return a config for the model; `trainer__lr` is the setting `trainer.lr`."""
    given = {key.replace("__", "."): value for key, value in values.items()}
    return changed(TrainConfig(), {"task.env": "add", "model.name": str(model)} | given)


def test_what_is_not_set_comes_from_the_model(wide):
    chosen = with_model_defaults(config(wide))
    assert size_of(chosen.model).width == 192
    assert chosen.trainer.lr == learning_rate(192)
    assert (chosen.adapter.rank, chosen.adapter.scale) == (16, 2)
    assert (chosen.rollout.group_size, chosen.rollout.groups_per_step) == (8, 8)
    assert chosen.evaluation.every and with_model_defaults(chosen) == chosen


def test_what_the_user_sets_wins_also_if_it_is_the_default_of_a_tiny_model(wide):
    default = TrainConfig()
    given = config(
        wide,
        trainer__lr=float(default.trainer.lr),
        run__steps=int(default.run.steps),
        adapter__rank=4,
        adapter__alpha=8.0,
        evaluation__every=7,
    )
    chosen = with_model_defaults(given)
    assert chosen.trainer.lr == default.trainer.lr and chosen.run.steps == default.run.steps
    assert (chosen.adapter.rank, chosen.adapter.alpha, chosen.adapter.scale) == (4, 8, None)
    assert chosen.evaluation.every == 7


def test_adapters_of_a_file_keep_their_rank(wide, tmp_path):
    chosen = with_model_defaults(config(wide, adapter__start=tmp_path / "adapters"))
    assert (chosen.adapter.rank, chosen.adapter.scale) == (None, None)


def test_quantization_does_not_change_the_size(wide):
    plain, packed = config(wide), config(wide, model__quantize=4)
    assert size_of(plain.model) == size_of(packed.model)
    shape = json.loads((wide / "config.json").read_text())
    shape["quantization"] = {"group_size": 64, "bits": 4}
    (wide / "config.json").write_text(json.dumps(shape))
    assert size_of(plain.model).weights > 20_000_000


def test_the_embedded_model_keeps_the_config_as_it_is():
    assert with_model_defaults(config("tiny")) == config("tiny")


def test_a_rate_far_below_the_default_of_the_model_is_noted(wide):
    usual = learning_rate(192)
    said = low_rate_note(config(wide, trainer__lr=usual / 50))
    assert said and f"50 times below the default of {usual:g} for this model" in said
    assert low_rate_note(config("tiny", trainer__lr=1e-5))
    for model in (wide, "tiny"):
        assert low_rate_note(with_model_defaults(config(model))) is None
    assert low_rate_note(config(wide, trainer__lr=usual / 5)) is None


@pytest.mark.slow
def test_a_run_writes_its_numbers_to_its_config_and_a_resume_keeps_them(
    tiny, tmp_path, monkeypatch
):
    """The threshold is lowered, so that a model which takes a second to train is not tiny."""
    monkeypatch.setattr("textpolicy.config.model_defaults.TINY_WEIGHTS", 1000)
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    small = {"task": {"env": "add"}, "model": {"name": str(model)}}
    small |= {"rollout": {"group_size": 2, "groups_per_step": 2}, "evaluation": {"count": 4}}
    stop = lambda event: tp.Progress.STOP if event.kind == "step" else None  # noqa: E731
    folder = tmp_path / "run"
    tp.run(small, output=folder, on_event=stop)
    written = read_toml(RunDirectory(folder).config, TrainConfig())
    assert written.trainer.lr == learning_rate(192) and written.adapter.rank == 16
    monkeypatch.setattr("textpolicy.config.model_defaults._RATE", 1.0)
    resumed = tp.run({"run": {"steps": 2}}, resume=folder, force=True)
    assert resumed.steps == 2
    again = read_toml(resumed.directory.config, TrainConfig())
    assert again == changed(written, {"run.steps": 2})
    with pytest.raises(ConfigError, match=r"trainer\.lr"):
        tp.run({"trainer": {"lr": 1e-3}}, resume=folder)
