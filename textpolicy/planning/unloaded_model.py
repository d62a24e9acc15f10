"""Models with all modules and shapes, whose weights are never computed."""

from collections.abc import Mapping
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import _get_classes  # pyright: ignore[reportPrivateUsage]

from textpolicy.adapters.module_tree import replace_modules
from textpolicy.adapters.quantization.number_formats import NumberFormat
from textpolicy.adapters.quantization.quantize import quantization_problem, quantize_module
from textpolicy.errors import ModelError

_DTYPES = {"float16": mx.float16, "float32": mx.float32}


def build_unloaded_model(config: Mapping[str, Any], dtype: mx.Dtype | None = None) -> nn.Module:
    """Return the model of a config.json, quantized as the config says; no weight takes memory.

    `dtype` is the dtype of the unquantized weights. As in `load_model`, the default is float32 on
    a CPU and the checkpoint's dtype on other devices.
    """
    if "model_type" not in config:
        raise ModelError(f"no model_type among {sorted(config)}; expected a model's config.json")
    random_state = cast(list[int], cast(list[mx.array], mx.random.state)[0].tolist())
    try:
        model_class, arguments = _get_classes(config=dict(config))
        model = model_class(arguments.from_dict(dict(config)))
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(
            f"mlx-lm cannot make a {config['model_type']!r} of this config: {error}"
        ) from error
    finally:
        # Weights that are never computed must not use up the caller's random numbers.
        mx.random.seed((random_state[0] << 32) | random_state[1])
    on_cpu = mx.default_device().type == mx.cpu
    model.set_dtype(dtype or (mx.float32 if on_cpu else stored_dtype(config)))
    quantization = config.get("quantization")
    if quantization and quantization.get("mode") == "nf4":
        _quantize_to_nf4(model, NumberFormat(**quantization))
    elif quantization:
        # As mlx-lm does: some modules may have options of their own, or none, and rows that are no
        # multiple of a group stay as they are.
        nn.quantize(
            model,
            **{name: quantization[name] for name in ("group_size", "bits")},
            mode=quantization.get("mode", "affine"),
            class_predicate=lambda path, module: (
                hasattr(module, "to_quantized")
                and module["weight"].shape[-1] % quantization["group_size"] == 0
                and quantization.get(path, True)
            ),
        )
    return model


def stored_dtype(config: Mapping[str, Any]) -> mx.Dtype:
    """Return the dtype in which a checkpoint with this config.json has its weights."""
    return _DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")), mx.bfloat16)


def _quantize_to_nf4(model: nn.Module, form: NumberFormat) -> None:
    """Replace the layers that NF4 is for. Their packed weights are not computed either."""
    chosen = {
        path: quantize_module(path, module, form)
        for path, module in model.named_modules()
        if hasattr(module, "to_quantized") and not quantization_problem(module, form)
    }
    replace_modules(model, chosen)
