"""mlx-lm's GPU kernels on a machine without a GPU: they compute their results and have no gradient.

`choose_gpu_kernels` lets mlx-lm's own code decide as on an Apple GPU.
"""

from collections import Counter
from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
from mlx_lm.models import gated_delta, kimi_k3, rwkv7, ssm


class _MetalLikeMlx:
    """mlx.core as it looks on a Mac, to the code that asks which kernel to take."""

    metal = SimpleNamespace(is_available=lambda: True)

    def default_device(self) -> Any:
        return mx.gpu

    def __getattr__(self, name: str) -> Any:
        return getattr(mx, name)


def _ssm(*inputs: Any) -> Any:
    *inputs, limit = inputs
    return ssm.ssm_attn(*inputs, limit)


def _wkv7(r: Any, w: Any, k: Any, v: Any, a: Any, b: Any, state: Any) -> Any:
    outputs = []
    for t in range(r.shape[1]):
        step = [x[:, t] for x in (r, w, k, v, a, b)]
        y, state = rwkv7._wkv7_step_ops(*step, state)
        outputs.append(y)
    return mx.stack(outputs, axis=1).astype(r.dtype), state


def _attention_residual(*, inputs: list[Any], **_: Any) -> Any:
    *inputs, eps, _ = inputs
    return (kimi_k3._attn_res_combine(*inputs, eps),)


def _sinkhorn(*, inputs: list[Any], template: Any, **_: Any) -> Any:
    matrix, eps = inputs
    matrix = matrix / (matrix.sum(axis=-2, keepdims=True) + eps)
    for _ in range(dict(template)["ITERS"] - 1):
        matrix = matrix / (matrix.sum(axis=-1, keepdims=True) + eps)
        matrix = matrix / (matrix.sum(axis=-2, keepdims=True) + eps)
    return (matrix,)


# The module and the name of each function that launches a kernel, and what the kernel computes.
KERNELS: dict[tuple[str, str], Callable[..., Any]] = {
    ("gated_delta", "gated_delta_kernel"): gated_delta.gated_delta_ops,
    ("ssm", "ssm_update_kernel"): _ssm,
    ("rwkv7", "wkv7_kernel"): _wkv7,
    ("kimi_k3", "_attn_res_kernel"): _attention_residual,
    ("deepseek_v41", "_sinkhorn_kernel"): _sinkhorn,
}


def choose_gpu_kernels(monkeypatch: Any) -> Counter[str]:
    """Let mlx-lm's models take their GPU kernels; return how often each kernel was reached."""
    reached: Counter[str] = Counter()
    for (module, name), compute in KERNELS.items():
        home = import_module(f"mlx_lm.models.{module}")
        monkeypatch.setattr(home, "mx", _MetalLikeMlx())
        monkeypatch.setattr(home, name, _counted(name, compute, reached))
    return reached


def _counted(name: str, compute: Callable[..., Any], reached: Counter[str]) -> Any:
    def kernel(*values: Any, **named: Any) -> Any:
        reached[name] += 1
        return without_gradient(compute)(*values, **named)

    return kernel


def without_gradient(compute: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with the error that mlx raises for the gradient of a kernel."""

    def kernel(*values: Any, **named: Any) -> Any:
        # A kernel takes arrays one by one, or as the list `inputs`.
        given = [*values, *named.pop("inputs", [])]
        by_name = len(given) > len(values)
        arrays = [value for value in given if isinstance(value, mx.array)]

        def run(*arrays: mx.array) -> Any:
            rest = iter(arrays)
            filled = [next(rest) if isinstance(value, mx.array) else value for value in given]
            return compute(inputs=filled, **named) if by_name else compute(*filled, **named)

        function: Any = mx.custom_function(run)
        function.vjp(_no_vjp)
        return function(*arrays)

    return kernel


def _no_vjp(*_: Any) -> Any:
    raise ValueError("[Primitive::vjp] Not implemented for CustomKernel.")
