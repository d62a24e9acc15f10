"""The defaults that the size of a model decides, over the models that people have."""

import pytest

from textpolicy.config import TrainConfig, read_toml, settings_of, to_toml
from textpolicy.config.model_defaults import ModelSize, defaults_of, learning_rate
from textpolicy.config.settings import ByModel

# Width and millions of weights, from their config.json files.
MODELS = {
    "SmolLM2-135M": (576, 135),
    "SmolLM2-360M": (960, 362),
    "Qwen3-0.6B": (1024, 596),
    "Llama-3.2-1B": (2048, 1236),
    "Qwen3-1.7B": (2048, 1721),
    "Qwen3-4B": (2560, 4022),
    "Qwen3-8B": (4096, 8191),
}
SIZES = {name: ModelSize(width=w, weights=n * 10**6) for name, (w, n) in MODELS.items()}


def test_the_rate_falls_with_the_width_within_the_published_range():
    rates = [learning_rate(width) for width, _ in MODELS.values()]
    assert rates == sorted(rates, reverse=True)
    # tinker-cookbook trains 8B and 9B with 4e-5 to 1e-4, and TRL warns of rates of full training.
    assert 4e-5 <= rates[-1] <= 1e-4
    assert 1e-4 <= rates[0] <= 1e-3


@pytest.mark.parametrize("name", SIZES)
def test_every_model_gets_whole_groups_and_a_measurement_that_can_show_a_gain(name):
    chosen = defaults_of(SIZES[name])
    assert chosen["rollout.group_size"] * chosen["rollout.groups_per_step"] == 64
    worst_error = (0.25 / chosen["evaluation.count"]) ** 0.5
    assert worst_error < 0.032
    assert 0 < chosen["evaluation.every"] < chosen["run.steps"]


@pytest.mark.parametrize("rank", [1, 8, 64])
def test_another_rank_keeps_the_product_of_scale_and_rank(rank):
    chosen = defaults_of(SIZES["Qwen3-4B"], rank=rank)
    assert chosen["adapter.scale"] * rank == 32
    assert chosen["trainer.lr"] == defaults_of(SIZES["Qwen3-4B"])["trainer.lr"]


def test_a_long_run_is_measured_after_every_quarter():
    every = [defaults_of(SIZES["Qwen3-4B"], steps=n)["evaluation.every"] for n in (20, 60, 1000)]
    assert every == [30, 30, 250]


def test_pairs_are_as_many_completions_as_groups():
    pairs = defaults_of(SIZES["Qwen3-0.6B"], algorithm="dpo")
    assert (pairs["rollout.group_size"], pairs["rollout.groups_per_step"]) == (2, 32)


def test_a_tiny_model_keeps_the_defaults_of_the_config():
    assert defaults_of(ModelSize(width=192, weights=600_000)) == {}


def test_a_default_that_was_written_to_a_file_counts_as_set(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(to_toml(TrainConfig()))
    values = [setting.default for setting in settings_of(read_toml(path, TrainConfig()))]
    assert not any(isinstance(value, ByModel) for value in values)
    by_model = {one.key for one in settings_of(TrainConfig()) if isinstance(one.default, ByModel)}
    assert by_model | {"adapter.rank", "adapter.scale", "evaluation.every"} == (
        defaults_of(SIZES["Qwen3-8B"]).keys()
    )
