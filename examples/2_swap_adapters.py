"""Adapters at run time: load, switch off, hold several, fuse one layer, fuse all, take out.

python examples/2_swap_adapters.py
"""

import json
import tempfile
from pathlib import Path

import mlx.core as mx

import textpolicy as tp

CONFIG = {
    "fine_tune_type": "lora",
    "num_layers": 2,
    "lora_parameters": {"rank": 8, "scale": 10.0, "keys": ["self_attn.q_proj", "mlp.up_proj"]},
}


def make_adapter(folder: Path, seed: int, **changes: object) -> Path:
    """Write a folder with adapter_config.json and adapters.safetensors, of random weights."""
    model, _ = tp.load_model("tiny", dtype=mx.float32)
    adapters = tp.AdapterContainer.from_model(model, tp.AdapterConfig.from_dict(CONFIG | changes))
    mx.random.seed(seed)
    adapters.swap(
        {name: a + 0.02 * mx.random.normal(a.shape) for name, a in adapters.parameters().items()}
    )
    return adapters.save(folder)


def main() -> None:
    model, tokenizer = tp.load_model("tiny", dtype=mx.float32)
    tokens = mx.array([tokenizer.encode("347+185=")])
    base = model(tokens)
    with tempfile.TemporaryDirectory() as folder:
        first = make_adapter(Path(folder) / "first", 1)
        second = make_adapter(Path(folder) / "second", 2, fine_tune_type="dora")
        print(json.loads((first / "adapter_config.json").read_text())["lora_parameters"])

        adapters = tp.AdapterContainer.from_directory(first).load(model)
        with adapters.disabled():
            print("off is the base:", bool(mx.array_equal(model(tokens), base)))
        adapters.unload()
        print("unloaded is the base:", bool(mx.array_equal(model(tokens), base)))

        adapters = tp.AdapterContainer.from_directory(first, name="first").load(model)
        adapters.add("second", second)  # another kind of adapter
        adapters.activate("second")
        adapted = model(tokens)
        layer = adapters.layers()["model.layers.0.mlp.up_proj"]
        print(f"a {layer.kind} layer, fused {layer.fused()}, reverted {layer.reverted()}")
        report = adapters.fuse()
        close = bool(mx.allclose(model(tokens), adapted, atol=1e-2))
        print(f"fused: {report.survival:.1%} of the update is in the weights, equal: {close}")


if __name__ == "__main__":
    main()
