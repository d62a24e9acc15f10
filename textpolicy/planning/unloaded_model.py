"""A model of the right modules and shapes whose weights are never computed."""

from collections.abc import Mapping
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from textpolicy.errors import ModelError


def build_unloaded_model(config: Mapping[str, Any], dtype: mx.Dtype | None = None) -> nn.Module:
    """The model of a config.json, quantized as it says; its arrays stay lazy and take no memory.

    `dtype` is that of the unquantized weights, by default float32 on a CPU and the checkpoint's
    own elsewhere, as `load_model` has it.
    """
    # mlx-lm takes seconds to import, and who only adapts a model has no use for this.
    from mlx_lm.utils import _get_classes  # pyright: ignore[reportPrivateUsage]

    if "model_type" not in config:
        raise ModelError(f"no model_type among {sorted(config)}; expected a model's config.json")
    state = cast(list[mx.array], mx.random.state)
    before = cast(list[int], state[0].tolist())
    try:
        make, arguments = _get_classes(config=dict(config))
        model = make(arguments.from_dict(dict(config)))
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(
            f"mlx-lm cannot make a {config['model_type']!r} of this: {error}"
        ) from error
    finally:
        # Weights that nobody computes must not use up the caller's random numbers.
        mx.random.seed((before[0] << 32) | before[1])
    model.set_dtype(dtype or _usual_dtype(config))
    if quantization := config.get("quantization"):
        _quantize(model, quantization)
    return model


def _usual_dtype(config: Mapping[str, Any]) -> mx.Dtype:
    if mx.default_device().type == mx.cpu:
        return mx.float32
    name = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    return {"float16": mx.float16, "float32": mx.float32}.get(str(name), mx.bfloat16)


def _quantize(model: nn.Module, quantization: Mapping[str, Any]) -> None:
    """As mlx-lm does it: some modules may have options of their own, or none."""
    usual = {name: quantization[name] for name in ("group_size", "bits")}

    def chosen(path: str, module: nn.Module) -> bool | dict[str, Any]:
        own = quantization.get(path, True)
        return own if own and hasattr(module, "to_quantized") else False

    nn.quantize(model, **usual, mode=quantization.get("mode", "affine"), class_predicate=chosen)
