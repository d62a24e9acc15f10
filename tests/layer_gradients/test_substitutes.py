"""Layers call functions with a gradient for a while, and nothing else about them changes."""

import inspect
from importlib import import_module
from importlib.resources import files

import mlx.core as mx
import mlx.nn as nn
import pytest

from tests.families import family_model
from tests.gpu_kernels import KERNELS
from textpolicy.layer_gradients import differentiable_layers
from textpolicy.layer_gradients.substitutes import SUBSTITUTES

# Modules of mlx-lm's models with a kernel: those of the table, and BitNet's product of packed
# weights, which runs on an Apple GPU only and takes no adapters.
WITH_KERNELS = {module for module, _ in KERNELS} | {"bitlinear_layers"}


def test_every_kernel_of_mlx_lm_is_in_the_table():
    sources = [path for path in files("mlx_lm.models").iterdir() if path.name.endswith(".py")]
    kernels = {path.name[:-3] for path in sources if "_kernel(" in path.read_text("utf-8")}
    assert {name for name in kernels if defines_a_kernel(name)} == WITH_KERNELS


def defines_a_kernel(module):
    source = files("mlx_lm.models").joinpath(f"{module}.py").read_text("utf-8")
    return any(f"mx.fast.{device}_kernel(" in source for device in ("metal", "cuda"))


@pytest.mark.parametrize("name", SUBSTITUTES)
def test_every_substitute_is_for_a_function_that_mlx_lm_has(name):
    module, *path = name.removeprefix("mlx_lm.models.").split(".")
    function = import_module(f"mlx_lm.models.{module}")
    for part in path:
        function = getattr(function, part)
    assert inspect.isfunction(function) and f"{function.__module__}.{function.__qualname__}" == name


def test_only_layers_that_would_call_a_kernel_change_and_only_inside_the_block():
    model, other = family_model("qwen3_5"), family_model("qwen3_5")
    plain = [type(module) for module in model.modules()]
    with pytest.raises(KeyError), differentiable_layers(model):
        changed = [
            type(m) for m, was in zip(model.modules(), plain, strict=True) if type(m) is not was
        ]
        assert [layer.__name__ for layer in changed] == ["GatedDeltaNet"]
        assert [type(module) for module in other.modules()] == plain
        raise KeyError
    assert [type(module) for module in model.modules()] == plain


class LayerOfAnotherLibrary(nn.Module):
    def __init__(self):
        super().__init__()
        self.dropout, self.norm = nn.Dropout(0.5), nn.BatchNorm(4)

    def __call__(self, x):
        return self.norm(self.dropout(x))


def test_dropout_and_batch_normalisation_stay_off():
    model = LayerOfAnotherLibrary()
    model.eval()
    x, mean = mx.random.normal((8, 4)), mx.array(model.norm.running_mean)
    expected = model(x)
    with differentiable_layers(model):
        assert mx.array_equal(model(x), expected)
    assert mx.array_equal(model.norm.running_mean, mean)
