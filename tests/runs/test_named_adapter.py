"""Adapters named as people name them: files, folders, runs, and versions of runs."""

import shutil
from pathlib import Path

import pytest

from textpolicy.adapters import AdapterConfig, AdapterContainer
from textpolicy.config import SFTConfig, TrainConfig, changed, to_toml
from textpolicy.errors import ConfigError
from textpolicy.experiment.paths import with_absolute_paths, with_found_adapter
from textpolicy.runs import RunDirectory, find_adapter, read_named_adapter


@pytest.fixture
def run(tmp_path, load_tiny):
    """Return a run that has kept versions 2 and 3, with version 4 as its latest."""
    directory = RunDirectory(tmp_path / "good")
    directory.claim()
    directory.write_config(to_toml(TrainConfig()))
    directory.adapters.mkdir()
    model, _ = load_tiny()
    container = AdapterContainer.from_model(model, AdapterConfig(rank=1))
    for container.version in (2, 3, 4):
        container.publish(directory.latest)
        directory.keep_latest_adapter()
    directory.adapter_of(4).unlink()
    return directory


MEASURED = changed(TrainConfig(), {"evaluation.every": 2})


def test_a_run_is_its_adapter_with_the_best_held_out_score_or_else_its_latest(run):
    run.write_config(to_toml(MEASURED))
    assert find_adapter(run.path) == run.latest
    shutil.copy(run.adapter_of(2), run.best)
    assert find_adapter(run.path) == run.best
    run.write_config(to_toml(SFTConfig()))
    assert find_adapter(run.path) == run.best
    assert find_adapter(str(run.latest)) == run.latest


def test_an_adapter_with_the_best_training_reward_does_not_stand_for_its_run(run):
    shutil.copy(run.adapter_of(2), run.best)
    assert not run.best_is_measured
    assert find_adapter(run.path) == run.latest


def test_a_run_is_named_where_training_starts(run):
    for named, path in ((run.path, run.latest), (f"{run.path}@3", run.adapter_of(3))):
        config = changed(TrainConfig(), {"adapter.start": Path(named)})
        assert with_found_adapter(config).adapter.start == path
        assert with_absolute_paths(config).adapter.start == path


def test_a_version_of_a_run_is_found_among_the_kept_ones_and_the_latest(run):
    assert find_adapter(f"{run.path}@3") == run.adapter_of(3)
    assert find_adapter(f"{run.path}@4") == run.latest
    with pytest.raises(ConfigError, match=r"no adapter of version 7; .* kept: 2, 3, 4"):
        find_adapter(f"{run.path}@7")


def test_an_adapter_that_is_not_there_is_an_error_that_says_what_may_be_named(run, tmp_path):
    with pytest.raises(ConfigError, match=r"no run and no adapter .*RUN@VERSION"):
        find_adapter(tmp_path / "none")
    with pytest.raises(ConfigError, match="no run and no adapter"):
        find_adapter(f"{tmp_path}@3")
    run.latest.unlink()
    with pytest.raises(ConfigError, match="has no adapter latest"):
        find_adapter(run.path)


def test_an_adapter_has_the_name_that_is_given_or_that_of_its_run_or_file(run, tmp_path):
    folder = tmp_path / "an=odd" / "mlx"
    folder.mkdir(parents=True)
    loose = shutil.copy(run.latest, tmp_path / "loose.safetensors")
    named = {
        f"{run.path}": ("good", run.latest),
        f"{run.path}@3": ("good@3", run.adapter_of(3)),
        f"mine={run.path}@2": ("mine", run.adapter_of(2)),
        f"{run.latest}": ("good/latest", run.latest),
        f"{loose}": ("loose", loose),
        f"{folder}": ("mlx", folder),
        f"b={folder}": ("b", folder),
    }
    for text, (name, path) in named.items():
        found = read_named_adapter(text)
        assert (found.name, found.path) == (name, path)
