"""PEFT's adapters and ours: files written by PEFT itself, and its own logits, in `golden/peft`.

`benchmarks/peft_golden.py` made them, and let PEFT read what this library writes.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3
from safetensors.numpy import load_file, save_file

from tests.bases import trained
from tests.tiny import TOKENS, expert_model, qwen3_model
from textpolicy.adapters import (
    AdapterConfig,
    AdapterContainer,
    LoRARule,
    combine_adapters,
    inspect_adapter,
    quantize,
    read_adapter,
)
from textpolicy.errors import AdapterError
from textpolicy.generation.mlx_generation import load_model
from textpolicy.generation.model_files import tiny_model

GOLDEN = Path(__file__).parents[1] / "golden" / "peft"
RECORD = json.loads((GOLDEN / "record.json").read_text())
READ_BACK = json.loads((GOLDEN / "read_back.json").read_text())
LOGITS = mx.load(str(GOLDEN / "logits.safetensors"))
CASES = sorted(READ_BACK["cases"])
TOLERANCE = 1e-5


def base(case: str) -> nn.Module:
    """The embedded model; for untied cases with its table in reverse for a head of its own."""
    model, _ = load_model("tiny", dtype=mx.float32)
    if not case.startswith("untied"):
        return model
    config = json.loads((tiny_model() / "config.json").read_text())
    other = qwen3.Model(qwen3.ModelArgs.from_dict(config | {"tie_word_embeddings": False}))
    weights = tree_flatten(model.parameters(), destination={})
    head = mx.contiguous(weights["model.embed_tokens.weight"][::-1])
    other.load_weights([*weights.items(), ("lm_head.weight", head)])
    mx.eval(other.parameters())
    return other.eval()


def logits(model: nn.Module) -> mx.array:
    return model(mx.array(RECORD["tokens"]))[0, -RECORD["kept"] :]


def distance(model: nn.Module, case: str) -> float:
    return float(mx.abs(logits(model) - LOGITS[case]).max())


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def changed(tmp_path: Path, case: str, **config: Any) -> Path:
    """A golden folder with other words in its config."""
    folder = tmp_path / case
    shutil.copytree(GOLDEN / case, folder)
    (folder / "adapter_config.json").write_text(json.dumps(config_of(folder) | config))
    return folder


# From PEFT


def test_the_base_itself_computes_what_transformers_does():
    assert distance(base("base"), "base") < TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_of_peft_computes_what_it_does_in_peft(case):
    model = base(case)
    container = AdapterContainer.from_directory(GOLDEN / case).load(model)
    assert distance(model, case) < TOLERANCE
    assert distance(model, "base") > 100 * TOLERANCE
    with container.disabled():
        assert mx.array_equal(logits(model), logits(base(case)))


def test_load_model_takes_a_folder_of_peft():
    model, _ = load_model("tiny", GOLDEN / "dora", dtype=mx.float32)
    assert distance(model, "dora") < TOLERANCE


def test_only_what_the_adapter_names_is_adapted():
    model = base("layers_to_transform")
    container = AdapterContainer.from_directory(GOLDEN / "layers_to_transform").load(model)
    block = "model.layers.1.self_attn"
    assert container.layers().keys() == {f"{block}.k_proj", f"{block}.o_proj"}


def test_patterns_give_every_module_its_own_rank_and_scale():
    modules = {module.path: module for module in inspect_adapter(GOLDEN / "patterns").modules}
    found = {path: (module.rank, module.scale) for path, module in modules.items()}
    assert found == {
        "model.layers.0.self_attn.q_proj": (3, 4 / 3),
        "model.layers.1.self_attn.q_proj": (3, 4 / 3),
        "model.layers.0.mlp.up_proj": (2, 5 / 2),
        "model.layers.1.mlp.up_proj": (1, 5.0),
    }


def test_rslora_divides_by_the_root_of_the_rank():
    assert {module.scale for module in inspect_adapter(GOLDEN / "rslora").modules} == {3 / 2}


@pytest.mark.parametrize("method", RECORD["combined"]["methods"])
def test_adapters_combine_to_what_peft_makes_of_them(method):
    """In all three of its ways, with a weight below zero, and "svd" of a smaller rank."""
    model = base("lora")
    container = AdapterContainer.from_directory(GOLDEN / "lora", name="lora").load(model)
    container.add("lora_other", GOLDEN / "lora_other")
    rank = RECORD["combined"]["methods"][method].get("svd_rank")
    container.add(
        "sum", combine_adapters(container, RECORD["combined"]["weights"], method, rank=rank)
    )
    container.activate("sum")
    assert distance(model, f"combined_{method}") < TOLERANCE


# To PEFT


@pytest.fixture(scope="module", params=CASES)
def written(request, tmp_path_factory) -> tuple[str, Path]:
    """A golden adapter, read and written again by this library."""
    case, folder = request.param, tmp_path_factory.mktemp("written")
    model = base(case)
    AdapterContainer.from_directory(GOLDEN / case).load(model).save(folder, layout="peft")
    return case, folder


def digests(folder: Path) -> dict[str, str]:
    tensors = hashlib.sha256()
    for name, array in sorted(load_file(folder / "adapter_model.safetensors").items()):
        tensors.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    config = hashlib.sha256((folder / "adapter_config.json").read_bytes())
    return {"tensors": tensors.hexdigest(), "config": config.hexdigest()}


def test_what_is_written_is_what_peft_has_read_and_computed_the_same_with(written):
    case, folder = written
    assert {file.name for file in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert digests(folder) == READ_BACK["cases"][case]["written"]
    assert READ_BACK["cases"][case]["difference"] < TOLERANCE


def test_tensors_come_back_to_peft_byte_for_byte(written):
    case, folder = written
    ours = load_file(folder / "adapter_model.safetensors")
    theirs = load_file(GOLDEN / case / "adapter_model.safetensors")
    theirs = {name: array for name, array in theirs.items() if "base_layer" not in name}
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert (ours[name].shape, ours[name].dtype) == (array.shape, array.dtype), name
        assert ours[name].tobytes() == array.tobytes(), name


def test_the_config_that_is_written_has_no_word_that_peft_does_not_write(written):
    case, folder = written
    ours = config_of(folder)
    theirs = config_of(GOLDEN / case)
    assert ours.keys() <= theirs.keys()
    for name in ["use_dora", "lora_bias", "bias", "peft_type", "task_type", "ensure_weight_tying"]:
        assert ours[name] == theirs[name], name


def test_ranks_and_scales_of_rules_become_patterns(tmp_path):
    model = qwen3_model()
    rules = [
        LoRARule(module_path=r".*layers\.0\..*q_proj", rank=3, scale=0.7),
        LoRARule(module_path=".*[qv]_proj", rank=4, scale=2.0),
    ]
    container = AdapterContainer.from_model(model, AdapterConfig(rules=rules))
    container.swap(trained(container))
    config = config_of(container.save(tmp_path, layout="peft"))
    q = "model.layers.0.self_attn.q_proj"
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert config["rank_pattern"] == {q: 3}
    assert config["alpha_pattern"] == {q: pytest.approx(2.1)}
    assert type(config["lora_alpha"]) is int
    again = qwen3_model()
    AdapterContainer.from_directory(tmp_path).load(again)
    assert mx.allclose(again(TOKENS), model(TOKENS), atol=1e-5)


def test_a_folder_of_ours_for_peft_keeps_version_and_base(tmp_path):
    model = qwen3_model()
    container = AdapterContainer.from_model(model, AdapterConfig(rank=2))
    container.version = 12
    adapter = read_adapter(container.save(tmp_path, layout="peft"))
    assert adapter.version == 12 and adapter.fingerprint == container.fingerprint
    with pytest.raises(AdapterError, match="base fingerprint"):
        AdapterContainer.from_directory(tmp_path).load(qwen3_model(seed=1))


def test_pytorch_finds_the_format_that_it_asks_for(tmp_path):
    model = qwen3_model()
    container = AdapterContainer.from_model(model, AdapterConfig(rank=2))
    file = container.save(tmp_path, layout="peft") / "adapter_model.safetensors"
    assert mx.load(str(file), return_metadata=True)[1]["format"] == "pt"


def test_a_tied_table_of_another_rank_than_the_other_modules_is_read_again(tmp_path):
    model, _ = load_model("tiny", dtype=mx.float32)
    rules = [LoRARule(module_path=".*embed_tokens", rank=2, scale=3.0), LoRARule(rank=4)]
    container = AdapterContainer.from_model(model, AdapterConfig(rules=rules))
    container.swap(trained(container))
    container.save(tmp_path, layout="peft")
    assert "lm_head" in config_of(tmp_path)["rank_pattern"]
    expected = model(TOKENS)
    container.unload()
    AdapterContainer.from_directory(tmp_path).load(model)
    assert mx.array_equal(model(TOKENS), expected)


# What is refused


def test_embeddings_for_the_lookup_alone_do_not_fit_a_tied_model():
    model = base("lora")
    with pytest.raises(AdapterError, match=r"model\.embed_tokens: adapted for looking tokens up"):
        AdapterContainer.from_directory(GOLDEN / "refused_lookup_only").load(model)
    assert AdapterContainer.of(model) is None


def test_nor_can_they_be_swapped_or_added_to_a_tied_model():
    model = base("lora")
    config = AdapterConfig(rank=2, keys=["model.embed_tokens"])
    container = AdapterContainer.from_model(model, config)
    for put in (container.swap, lambda folder: container.add("other", folder)):
        with pytest.raises(AdapterError, match=r"model\.embed_tokens: adapted for looking"):
            put(GOLDEN / "refused_lookup_only")


def test_a_head_that_differs_from_the_table_it_is_tied_to_is_refused(tmp_path):
    folder = changed(tmp_path, "tied_embedding")
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.lm_head.lora_A.weight"] *= 2
    save_file(tensors, file)
    with pytest.raises(AdapterError, match="are tied, but their adapters differ"):
        read_adapter(folder)


def test_other_weights_than_adapters_are_refused(tmp_path):
    with pytest.raises(AdapterError, match=r"modules_to_save.*merge_and_unload"):
        read_adapter(GOLDEN / "refused_modules_to_save")
    silent = changed(tmp_path, "refused_modules_to_save", modules_to_save=None)
    with pytest.raises(AdapterError, match=r"input_layernorm\.weight and 8 more tensors"):
        read_adapter(silent)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"fan_in_fan_out": True}, "Conv1D"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"bias": "all"}, "the base's own biases"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ],
)
def test_what_would_compute_something_else_is_refused_by_name(tmp_path, words, message):
    folder = changed(tmp_path, "lora", **words)
    with pytest.raises(AdapterError, match=message) as caught:
        read_adapter(folder)
    assert str(folder) in str(caught.value)


def spoilt(tmp_path: Path, change: Mapping[str, Any]) -> Path:
    folder = changed(tmp_path, "lora")
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    for end, new in change.items():
        name = next(name for name in tensors if name.endswith(end))
        array = tensors.pop(name)
        if new is not None:
            tensors[name] = new(array)
    save_file(tensors, file)
    return folder


def test_a_folder_of_peft_is_read_as_strictly_as_our_own(tmp_path):
    folder = spoilt(
        tmp_path,
        {
            "layers.0.self_attn.q_proj.lora_A.weight": None,
            "layers.0.self_attn.v_proj.lora_B.weight": lambda array: array[:-1],
            "layers.1.self_attn.v_proj.lora_B.weight": lambda array: array + float("nan"),
        },
    )
    with pytest.raises(AdapterError) as caught:
        AdapterContainer.from_directory(folder).load(base("lora"))
    message = str(caught.value)
    assert "layers.0.self_attn.q_proj.lora_a: missing" in message
    assert "layers.0.self_attn.v_proj.lora_b: shape (4, 63), model has (4, 64)" in message
    assert "layers.1.self_attn.v_proj.lora_b: not finite" in message


def test_pickled_weights_are_not_opened(tmp_path):
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(AdapterError, match="safe_serialization=True"):
        read_adapter(tmp_path)


def test_an_adapter_of_a_quantized_base_is_not_for_a_float_one_unless_meant(tmp_path):
    model = qwen3_model()
    quantize(model)
    container = AdapterContainer.from_model(model, AdapterConfig(rank=2))
    with pytest.raises(AdapterError, match=r"base is quantized.*over_float_base=True"):
        container.save(tmp_path, layout="peft")
    assert not list(tmp_path.iterdir())
    container.save(tmp_path, layout="peft", over_float_base=True)
    # It is another base, and the file does not say otherwise.
    assert read_adapter(tmp_path).fingerprint is None
    AdapterContainer.from_directory(tmp_path).load(qwen3_model(seed=1))


@pytest.mark.parametrize(
    ("make", "config", "message"),
    [
        (
            qwen3_model,
            AdapterConfig(kind="dora", keys=["model.embed_tokens"]),
            "magnitudes to features",
        ),
        (expert_model, AdapterConfig(keys=["mlp.switch_mlp.up_proj"]), "each expert by itself"),
        (
            qwen3_model,
            AdapterConfig(rules=[LoRARule(module_path=".*q_proj", kind="dora", bias=True)]),
            "no DoRA with a bias",
        ),
        (
            qwen3_model,
            AdapterConfig(
                rules=[
                    LoRARule(module_path=".*q_proj", kind="dora"),
                    LoRARule(module_path=".*v_proj"),
                ]
            ),
            "one for all",
        ),
    ],
)
def test_what_peft_has_no_place_for_is_refused_before_anything_is_written(
    make, config, message, tmp_path
):
    model = make()
    container = AdapterContainer.from_model(model, config)
    with pytest.raises(AdapterError, match=message):
        container.save(tmp_path, layout="peft")
    assert not list(tmp_path.iterdir())
