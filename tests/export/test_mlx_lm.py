"""mlx-lm itself computes from the exported folders what the base with the adapter computes."""

import json
import shutil

import mlx_lm
import pytest
from mlx_lm.utils import save_model

import textpolicy as tp
from tests.bases import trained
from tests.export.gguf.models import difference, logprobs, make
from tests.quick import quick_first
from textpolicy.adapters import AdapterConfig, AdapterContainer, LoRARule
from textpolicy.generation.mlx_generation import load_model

BOUND = 1e-4
RANKS = [
    LoRARule(module_path=r".*\.(q_proj|down_proj)", rank=4, alpha=8.0),
    LoRARule(module_path=r".*\.(v_proj|gate_proj)", rank=8, alpha=8.0, rslora=True),
    LoRARule(module_path=r".*\.up_proj", rank=3, scale=1.3),
]
CONFIGS = {
    "lora": AdapterConfig(rank=4),
    "dora": AdapterConfig(kind="dora", rank=4),
    "a rank for each module": AdapterConfig(rules=RANKS),
    "last block": AdapterConfig(num_layers=1, keys=["self_attn.o_proj", "mlp.up_proj"]),
}


@pytest.fixture(scope="module", params=quick_first(1, ["llama", "qwen3"]))
def checkpoint(request, tiny, tmp_path_factory):
    """Return the folder of a random model with the tokenizer of the embedded model."""
    model, config = make(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    save_model(folder, model)
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny / name, folder / name)
    return folder


@pytest.fixture(scope="module", params=quick_first(2, CONFIGS))
def adapter(request, checkpoint, tmp_path_factory):
    """Return an adapter file, and the log-probabilities with the adapter and without it."""
    model, _ = load_model(checkpoint)
    base = logprobs(model)
    container = AdapterContainer.from_model(model, CONFIGS[request.param])
    container.swap(trained(container))
    file = tmp_path_factory.mktemp("adapter") / "adapters.safetensors"
    container.publish(file)
    return file, logprobs(model), base


@pytest.mark.parametrize("to", ["mlx", "mlx-lm"])
def test_mlx_lm_computes_from_an_export_what_was_trained(checkpoint, adapter, to, tmp_path):
    file, expected, base = adapter
    made = tp.export_adapter(file, to, tmp_path / "out", model=str(checkpoint)).folder
    if to == "mlx":
        model, _ = mlx_lm.load(str(made))
    else:
        model, _ = mlx_lm.load(str(checkpoint), adapter_path=str(made))
    assert difference(logprobs(model), expected) < BOUND
    # A lost adapter would be seen.
    assert difference(base, expected) > 1000 * BOUND
