"""The page "LoRA and QLoRA (MLX)" from top to bottom, with the embedded model for the hub's model.

The first lines of each test are a snippet of the page, unchanged.
"""

from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten

from textpolicy.adapters import AdapterConfig, AdapterContainer, memory_stats
from textpolicy.errors import AdapterError
from textpolicy.generation.mlx_generation import load_model
from textpolicy.rollout.worker import collect
from textpolicy.types import Task

TASKS = [Task(id=str(n), prompt=f"{n}+{n + 1}=") for n in range(4)]
PROMPT = mx.array([[5, 17, 3, 44]])


@pytest.fixture(scope="module")
def tiny(float32_tiny):
    """Let the model of the hub have float32 weights, so that the numbers are exact on a GPU too."""
    return float32_tiny


@pytest.fixture(autouse=True)
def a_folder_of_its_own(tmp_path, monkeypatch):
    """The page writes to ./lora_adapters.safetensors."""
    monkeypatch.chdir(tmp_path)


def digits(prompt, completion, example):
    return sum(character.isdigit() for character in completion) / 10


def one_step(trainer, policy, seed=0):
    groups = collect(TASKS, policy, digits, group_size=4, seed=seed)
    metrics = trainer.train(groups)
    return groups, metrics


def trained_setup(tiny):
    from textpolicy.algorithms import grpo
    from textpolicy.generation.lora import create_lora_setup
    from textpolicy.generation.mlx_generation import create_policy, load_model
    from textpolicy.training import Trainer

    # 1) Load base model
    model, tokenizer = load_model(str(tiny))

    # 2) Enable LoRA adapters
    lora_config = {"lora_layers": 8, "lora_rank": 8, "lora_scale": 20.0}
    model, memory_stats = create_lora_setup(model, lora_config)

    # 3) Create Trainer
    trainer = Trainer(
        model=model,
        advantage_fn=grpo.compute_advantages,
        loss_fn=grpo.policy_loss,
        optimizer=optim.Adam(learning_rate=5e-6),
    )

    # Policy (for rollout)
    policy_fn = create_policy(model, tokenizer, {"max_tokens": 25, "temperature": 0.7})
    return model, memory_stats, trainer, policy_fn


def test_core_apis_come_from_textpolicy_generation():
    from textpolicy import generation

    for name in [
        "create_lora_setup",
        "create_qlora_setup",
        "save_adapters",
        "reload_model",
        "create_reloadable_policy",
        "create_auto_reload_setup",
        "apply_lora",
        "freeze_base",
        "extract_params",
        "merge_weights",
        "load_model",
        "create_policy",
    ]:
        assert callable(getattr(generation, name)), name


def test_lora_setup_and_trainer(tiny, tmp_path):
    model, stats, trainer, policy_fn = trained_setup(tiny)
    assert stats == memory_stats(model)
    plain, _ = load_model(str(tiny))
    weights = [array for _, array in tree_flatten(plain.parameters())]
    tensors = AdapterContainer.of(model).parameters().values()
    assert stats["base_bytes"] == sum(array.nbytes for array in weights)
    assert stats["total_parameters"] == sum(array.size for array in [*weights, *tensors])
    assert not list(tmp_path.iterdir())

    groups, metrics = one_step(trainer, policy_fn)
    assert metrics["sampling/sampling_logp_difference/mean"] < 1e-4
    assert metrics["grad_norm"] > 0
    assert all(len(rollout.tokens) for group in groups for rollout in group.rollouts)
    # The trainer publishes where the setup says, and the policy already samples from the update.
    assert AdapterContainer.of(model).version == policy_fn.version == trainer.version == 1
    assert [file.name for file in tmp_path.iterdir()] == ["lora_adapters.safetensors"]


@pytest.mark.slow
def test_auto_reload_pattern(tiny):
    from textpolicy.algorithms import grpo
    from textpolicy.generation.reload import (
        create_auto_reload_setup,
        save_adapters,
    )
    from textpolicy.training import Trainer

    policy_fn, reload_fn, lora_model, _tokenizer = create_auto_reload_setup(
        model_path=str(tiny),
        adapter_save_path="./lora_adapters.safetensors",
        max_tokens=25,
        temperature=0.7,
    )
    trainer = Trainer(
        lora_model, grpo.compute_advantages, grpo.policy_loss, optim.Adam(learning_rate=1e-2)
    )
    untrained = policy_fn.model(PROMPT)
    one_step(trainer, policy_fn)

    # No call is needed: the next generation is sampled with what the trainer has published.
    assert policy_fn.version == 0
    groups, _ = one_step(trainer, policy_fn)
    assert {group.version for group in groups} == {1}
    assert not mx.array_equal(policy_fn.model(PROMPT), untrained)
    assert not mx.array_equal(policy_fn.model(PROMPT), lora_model(PROMPT))

    # After a trainer step, save and reload
    save_adapters(trainer.model, "./lora_adapters.safetensors")
    assert reload_fn("./lora_adapters.safetensors") == 2
    assert policy_fn.version == 2
    assert mx.array_equal(policy_fn.model(PROMPT), lora_model(PROMPT))


def test_the_auto_reload_setup_loads_the_base_once(tiny):
    from textpolicy.generation.reload import create_auto_reload_setup

    policy_fn, _, lora_model, _ = create_auto_reload_setup(str(tiny), lora_rank=4)
    mine = tree_flatten(lora_model.parameters(), destination={})
    theirs = tree_flatten(policy_fn.model.parameters(), destination={})
    assert policy_fn.model is not lora_model
    assert mine.keys() == theirs.keys()
    assert all(theirs[name] is array for name, array in mine.items())
    assert AdapterContainer.of(lora_model).config == AdapterConfig(rank=4)


def test_a_file_of_an_earlier_run_is_not_taken_for_this_one(tiny):
    from textpolicy.generation.reload import create_auto_reload_setup, save_adapters

    _, _, earlier, _ = create_auto_reload_setup(str(tiny), max_tokens=4)
    AdapterContainer.of(earlier).version = 57
    save_adapters(earlier, "./lora_adapters.safetensors")
    policy_fn, _, lora_model, _ = create_auto_reload_setup(str(tiny), max_tokens=4)
    assert policy_fn("1+1=").version == 0
    AdapterContainer.of(lora_model).advance()
    AdapterContainer.of(lora_model).publish()
    assert policy_fn("1+1=").version == 1


def test_a_published_file_that_does_not_fit_fails_every_generation(tiny):
    from textpolicy.generation.reload import create_auto_reload_setup, save_adapters

    policy_fn, *_ = create_auto_reload_setup(str(tiny), max_tokens=4, lora_rank=4)
    _, _, other, _ = create_auto_reload_setup(str(tiny), "other.safetensors", lora_layers=1)
    save_adapters(other, "./lora_adapters.safetensors")
    for _ in range(2):
        with pytest.raises(AdapterError, match=r"layers\.0\.mlp\.down_proj\.lora_a: missing"):
            policy_fn("1+1=")


def test_a_reloadable_policy(tiny):
    from textpolicy.generation.reload import create_reloadable_policy, save_adapters

    model, *_ = trained_setup(tiny)
    container = AdapterContainer.of(model)
    first = {name: array + 0.01 for name, array in container.parameters().items()}
    container.swap(first)
    save_adapters(model, "first.safetensors")
    after_first = model(PROMPT)
    container.swap({name: -array for name, array in first.items()})
    save_adapters(model, "second.safetensors")

    policy_fn, reload_fn = create_reloadable_policy(str(tiny), None, {"max_tokens": 5})
    assert policy_fn.version == 0
    assert reload_fn("first.safetensors") == 1
    assert mx.array_equal(policy_fn.model(PROMPT), after_first)
    assert reload_fn("second.safetensors") == policy_fn.version == 2
    assert mx.array_equal(policy_fn.model(PROMPT), model(PROMPT))

    policy_fn, _ = create_reloadable_policy(str(tiny), "first.safetensors", {"max_tokens": 5})
    assert policy_fn("1+1=").version == 1
    assert mx.array_equal(policy_fn.model(PROMPT), after_first)


@pytest.mark.slow
def test_qlora_setup(tiny):
    from textpolicy.algorithms import grpo
    from textpolicy.generation.mlx_generation import create_policy, load_model
    from textpolicy.training import Trainer

    model, tokenizer = load_model(str(tiny))
    before = memory_stats(model)["base_bytes"]

    from textpolicy.generation.lora import create_qlora_setup

    lora_config = {"lora_layers": 8, "lora_rank": 8}
    quant_config = {"bits": 4, "group_size": 64}
    model, memory = create_qlora_setup(model, lora_config, quant_config)

    assert memory["base_bytes_before_quantization"] == before
    assert memory["base_bytes"] < before / 5
    assert memory["modules_left_unquantized"] == 0
    policy_fn = create_policy(model, tokenizer, {"max_tokens": 8})
    trainer = Trainer(
        model, grpo.compute_advantages, grpo.policy_loss, optim.Adam(learning_rate=1e-3)
    )
    one_step(trainer, policy_fn)
    trained = model(PROMPT)

    from textpolicy.generation.reload import reload_model

    again, _ = reload_model(str(tiny), "./lora_adapters.safetensors")
    assert mx.array_equal(again(PROMPT), trained)


def test_saving_and_reloading_adapters(tiny):
    trained, _, trainer, policy_fn = trained_setup(tiny)
    one_step(trainer, policy_fn)

    from textpolicy.generation.reload import reload_model, save_adapters

    # After training
    save_adapters(trainer.model, "./lora_adapters.safetensors")

    # Later (fresh process)
    model, _tokenizer = reload_model(
        base_model_path=str(tiny),
        adapter_path="./lora_adapters.safetensors",
    )

    assert AdapterContainer.of(model).version == 1
    assert AdapterContainer.of(model).config == AdapterContainer.of(trained).config
    assert mx.array_equal(model(PROMPT), trained(PROMPT))


def test_merging_weights(tiny):
    from textpolicy.generation.lora import merge_weights

    model, _, trainer, policy_fn = trained_setup(tiny)
    one_step(trainer, policy_fn)
    adapted = model(PROMPT)
    assert merge_weights(model) is model
    assert AdapterContainer.of(model) is None
    assert mx.allclose(model(PROMPT), adapted, atol=1e-4)


def test_merging_weights_of_a_quantized_base(tiny):
    from textpolicy.generation.lora import create_qlora_setup, merge_weights

    model, _ = load_model(str(tiny))
    model, _ = create_qlora_setup(model, {"lora_rank": 8}, {"bits": 4, "group_size": 64})
    container = AdapterContainer.of(model)
    container.swap({name: array + 0.05 for name, array in container.parameters().items()})
    adapted = model(PROMPT)
    assert mx.allclose(merge_weights(model)(PROMPT), adapted, atol=1e-3)
    # Rounding to 4 bits again would have erased most of it, so these weights are float.
    assert model.layers[0].mlp.up_proj.weight.dtype == mx.float32


def test_adapters_can_be_kept_separate_for_deployment_elsewhere(tiny):
    from textpolicy.generation.reload import reload_model, save_adapters

    model, *_ = trained_setup(tiny)
    container = AdapterContainer.of(model)
    container.swap({name: array + 0.01 for name, array in container.parameters().items()})
    for layout in ("mlx", "peft"):
        assert save_adapters(model, layout, layout=layout) == 1
        again, _tokenizer = reload_model(str(tiny), layout)
        assert mx.allclose(again(PROMPT), model(PROMPT), atol=1e-5)
        assert AdapterContainer.of(again).version == 1


def test_building_blocks_and_practical_tips(tiny):
    from textpolicy.generation.lora import apply_lora, extract_params, freeze_base
    from textpolicy.generation.mlx_generation import load_model
    from textpolicy.generation.reload import save_adapters

    model, _ = load_model(str(tiny))
    model = apply_lora(model, lora_layers=2, lora_rank=4)
    model = freeze_base(model)
    parameters = extract_params(model)
    assert tree_flatten(model.trainable_parameters(), destination={}).keys() == parameters.keys()
    save_adapters(model, "small.safetensors")
    size = sum(array.nbytes for array in parameters.values())
    assert size < Path("small.safetensors").stat().st_size < 1.05 * size
