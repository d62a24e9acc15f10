"""Measure the time, the memory and the rounding errors of adapters on this machine.

    python benchmarks/adapters.py --json --output benchmarks/results/adapters.json

There are four measurements. Times: publishing 8 MB of adapters as one file, and swapping to such a
file and to tensors in memory, with all checks. Memory: the bytes of a second policy over the same
base, and of a second copy of the model. Quantization: the root mean square error of each number
format, divided by the root mean square of the weights. Merging: the share of an update that is left
after it is added to weights and rounded, and the noise beside it, for several sizes of the update
relative to the weights and for several number formats.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import qwen3
from setting import setting

from textpolicy import fast_cpu
from textpolicy.adapters import AdapterConfig, AdapterContainer, FuseReport, LoRARule, shared_copy
from textpolicy.adapters.quantization.number_formats import QTYPES, format_by_name
from textpolicy.adapters.quantization.quantize import quantize_module
from textpolicy.adapters.quantization.stored_weights import float_weight
from textpolicy.generation.mlx_generation import load_model

SIZES = {
    "hidden_size": 512,
    "num_hidden_layers": 12,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 8192,
}
RANK = 18
"""With this rank, the adapters of a model of these sizes are 8.4 MB."""
REPEATS = 30
RELATIVE_SIZES = (0.1, 0.03, 0.01, 0.003, 0.001)
MERGES: dict[str, tuple[str | None, dict[str, Any]]] = {
    "kept float32, base 4-bit": ("int4", {"dtype": mx.float32}),
    "float16 weights": (None, {"dtype": mx.float16}),
    "bfloat16 weights": (None, {"dtype": mx.bfloat16}),
    "quantized again, int8": ("int8", {"qtype": "same"}),
    "quantized again, int4": ("int4", {"qtype": "same"}),
    "quantized again, nf4": ("nf4", {"qtype": "same"}),
    "quantized again, nvfp4": ("nvfp4", {"qtype": "same"}),
    "quantized again, mxfp4": ("mxfp4", {"qtype": "same"}),
    "quantized again, mxfp8": ("mxfp8", {"qtype": "same"}),
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    measures: dict[str, Callable[[], Any]] = {
        "times": times,
        "memory": memory,
        "quantization_error": quantization_errors,
        "merge_survival": merge_survivals,
    }
    text = "default: every measurement"
    options.add_argument("--only", choices=measures, action="append", help=text)
    options.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options.add_argument("--output", type=Path, help="write the object to a file too")
    arguments = options.parse_args()
    if fast_cpu.enable().threads:
        fast_cpu.set_threads(1)
    mx.random.seed(0)
    found = {name: measures[name]() for name in arguments.only or measures}
    record = {"setting": setting(), **found}
    if arguments.output:
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    if arguments.json:
        print(json.dumps(record, indent=1))
        return
    for name, result in found.items():
        rows = result if isinstance(result, list) else [f"{k}: {v}" for k, v in result.items()]
        print(name, *(f"  {row}" for row in rows), sep="\n")


# Time and memory


def base_model() -> nn.Module:
    """Return a model of random weights. The measurements do not depend on the weights."""
    args = {"model_type": "qwen3", "tie_word_embeddings": True, "rms_norm_eps": 1e-6}
    args |= {"rope_theta": 10000.0, "max_position_embeddings": 512}
    model = qwen3.Model(qwen3.ModelArgs(**args | SIZES))
    mx.eval(model.parameters())
    return model


def times() -> dict[str, Any]:
    """Return the milliseconds of publishing and swapping, and the number of bytes."""
    model = base_model()
    container = AdapterContainer.from_model(model, AdapterConfig(rank=RANK))
    follower = AdapterContainer.of(sampler := shared_copy(model))
    assert follower is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapters.safetensors"
        published = [_milliseconds(lambda: container.publish(path)) for _ in range(REPEATS)]
        size = path.stat().st_size
        swapped = [_milliseconds(lambda: follower.swap(path)) for _ in range(REPEATS)]
    tensors = container.parameters()
    assigned = [_milliseconds(lambda: follower.swap(tensors)) for _ in range(REPEATS)]
    del sampler
    return {
        "file_bytes": size,
        "tensors": len(tensors),
        "publish_ms": _spread(published),
        "swap_file_ms": _spread(swapped),
        "swap_tensors_ms": _spread(assigned),
    }


def memory() -> dict[str, int]:
    """Return mlx's bytes for one adapted model, for a second policy, and for a second model."""
    start = mx.get_active_memory()
    model = base_model()
    container = AdapterContainer.from_model(model, AdapterConfig(rank=RANK))
    one = mx.get_active_memory()
    sampler = shared_copy(model)
    follower = AdapterContainer.of(sampler)
    assert follower is not None
    follower.swap({name: array + 1 for name, array in container.parameters().items()})
    two = mx.get_active_memory()
    copy = base_model()
    copied = AdapterContainer.from_model(copy, AdapterConfig(rank=RANK))
    three = mx.get_active_memory()
    del copied
    return {
        "model_and_adapters": one - start,
        "second_policy_by_shared_copy": two - one,
        "second_policy_by_another_model": three - two,
    }


def _milliseconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return 1000 * (time.perf_counter() - start)


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 2),
        "best": round(min(values), 2),
        "worst": round(max(values), 2),
    }


# Rounding


def quantization_errors() -> list[dict[str, Any]]:
    """Return the error of each format, in per cent of the weights' root mean square."""
    embedded, _ = load_model("tiny")
    normal = mx.random.normal((1024, 1024))
    # A normal number divided by the root of the mean of 3 squares has Student's t distribution.
    squares = mx.square(mx.random.normal((3, 1024, 1024))).mean(axis=0)
    weights = {
        "normal": [normal],
        "student_t3": [normal / mx.sqrt(squares)],
        "embedded_model": [
            module.weight
            for path, module in embedded.named_modules()
            if path.endswith("_proj") and isinstance(module, nn.Linear)
        ],
    }
    return [
        {"format": name, "bits_per_weight": _bits(name)}
        | {kind: round(100 * _error(some, name), 2) for kind, some in weights.items()}
        for name in sorted(QTYPES)
    ]


def _error(weights: list[mx.array], qtype: str) -> float:
    lost = [mx.square(float_weight(_packed(w, qtype)) - w).sum() for w in weights]
    return float(mx.sqrt(sum(lost) / sum(mx.square(w).sum() for w in weights)))


def _bits(qtype: str) -> float:
    """Return the bits of a weight, with scales and offsets, if the weights were in bfloat16."""
    packed = _packed(mx.zeros((64, 1024), mx.bfloat16), qtype)
    return 8 * sum(array.nbytes for array in packed.parameters().values()) / (64 * 1024)


def _packed(weight: mx.array, qtype: str) -> nn.Module:
    return quantize_module("weight", _linear(weight), format_by_name(qtype))


def merge_survivals() -> list[dict[str, Any]]:
    """Return the share of the update that is left, and the noise, by relative size."""
    found: list[dict[str, Any]] = []
    for name, (base, how) in MERGES.items():
        reports = {str(size): _merged(base, how, size) for size in RELATIVE_SIZES}
        survival = {size: round(report.survival, 3) for size, report in reports.items()}
        noise = {size: round(report.noise, 3) for size, report in reports.items()}
        found.append({"merge": name, "survival": survival, "noise": noise})
    return found


def _merged(base: str | None, how: dict[str, Any], relative_size: float) -> FuseReport:
    model = nn.Module()
    # A float base has the dtype that the merged weights are rounded to.
    dtype = how["dtype"] if base is None else mx.bfloat16
    model.proj = _linear((mx.random.normal((1024, 1024)) / 32).astype(dtype))
    rule = LoRARule(module_path="proj", rank=16, scale=1.0, weight_qtype=base)
    container = AdapterContainer.from_model(model, AdapterConfig(rules=[rule]))
    layer = container.layers()["proj"]
    layer.lora_b = mx.random.normal(layer.lora_b.shape)
    size = mx.linalg.norm(layer.delta()) / mx.linalg.norm(float_weight(layer.base))
    layer.lora_b = layer.lora_b * relative_size / size
    return container.fuse_report(**how)


def _linear(weight: mx.array) -> nn.Linear:
    made = nn.Linear(1, 1, bias=False)
    made.weight = weight
    return made


if __name__ == "__main__":
    main()
