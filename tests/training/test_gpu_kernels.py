"""Training never reaches a GPU kernel of mlx-lm that has no gradient; sampling still does."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from tests.bases import trained
from tests.families import OPTIONS, family_model
from tests.gpu_kernels import choose_gpu_kernels, without_gradient
from tests.training.rows import groups_of
from tests.training.trainers import change_rollouts
from textpolicy import algorithms
from textpolicy.adapters import AdapterConfig, AdapterContainer
from textpolicy.algorithms import grpo
from textpolicy.errors import TrainingError
from textpolicy.layer_gradients import differentiable_layers
from textpolicy.training.gradient_accumulation import accumulate_gradient
from textpolicy.training.sft import Demonstration, SFTParameters, train_sft
from textpolicy.training.sft.loss import in_mode
from textpolicy.training.trainer import Trainer
from textpolicy.types import NOT_SAMPLED

# The kernels that a family's forward pass launches: for a prompt, and for one more token.
REACHED = {
    "qwen3_5": {"gated_delta_kernel"},
    "qwen3_5_moe": {"gated_delta_kernel"},
    "qwen3_next": {"gated_delta_kernel"},
    "olmo_hybrid": {"gated_delta_kernel"},
    "kimi_linear": {"gated_delta_kernel"},
    "bailing_moe_v3": {"gated_delta_kernel"},
    "kimi_k3": {"gated_delta_kernel", "_attn_res_kernel"},
    "rwkv7": {"wkv7_kernel"},
    "mamba2": {"ssm_update_kernel"},
    "nemotron_h": {"ssm_update_kernel"},
    "granitemoehybrid": {"ssm_update_kernel"},
    "falcon_h1": {"ssm_update_kernel"},
    "deepseek_v41": {"_sinkhorn_kernel"},
}
TRAINABLE = sorted([*(REACHED.keys() - {"deepseek_v41"}), "gemma4_text"])
DEMONSTRATION = Demonstration(tokens=[1, 2, 3], mask=[False, True, True])
PROMPT = mx.array([[5, 6, 7]])


@pytest.mark.parametrize("family", OPTIONS)
def test_each_family_reaches_the_kernels_of_this_table(family, monkeypatch):
    model = family_model(family)
    reached = choose_gpu_kernels(monkeypatch)
    cache = make_prompt_cache(model)
    mx.eval(model(PROMPT, cache=cache))
    mx.eval(model(PROMPT[:, :1], cache=cache))
    assert set(reached) == REACHED.get(family, set())


# Gradient checkpointing refuses kimi_k3, see below.
@pytest.mark.parametrize(
    ("family", "checkpoint"),
    [(family, False) for family in TRAINABLE]
    + [(family, True) for family in TRAINABLE if family != "kimi_k3"],
)
def test_training_reaches_no_kernel_without_a_gradient(family, checkpoint, monkeypatch):
    model = family_model(family)
    # mlx-lm's kimi_k3 reads the weights of its residual projections by itself.
    keys = ["self_attn.o_proj"] if family == "kimi_k3" else None
    container = AdapterContainer.from_model(model, AdapterConfig(rank=2, keys=keys))
    container.swap(trained(container))
    _, expected = nn.value_and_grad(model, loss_of(model))(PROMPT)
    mx.eval(expected)
    reached = choose_gpu_kernels(monkeypatch)
    # In two parts, because layers must be as before after each part.
    parts = [PROMPT, PROMPT]
    found, _ = accumulate_gradient(
        model, lambda tokens: (loss_of(model)(tokens) / 2, {}), parts, checkpoint=checkpoint
    )
    mx.eval(found)
    assert not reached
    assert not any(module.training for module in model.modules())
    largest = max(float(mx.abs(x).max()) for _, x in tree_flatten(expected))
    for (name, x), (_, y) in zip(tree_flatten(expected), tree_flatten(found), strict=True):
        assert mx.abs(x - y).max() < 1e-5 * largest, name


def test_gradient_checkpointing_refuses_blocks_that_share_an_object():
    model = family_model("kimi_k3")
    with pytest.raises(TrainingError, match="its argument blocks is a ResidualBlocks"):
        accumulate_gradient(model, lambda x: (model(x).mean(), {}), [PROMPT], checkpoint=True)


@pytest.mark.parametrize("family", ["qwen3_5", "kimi_linear", "rwkv7"])
def test_reference_and_old_logprobs_use_the_kernels_and_the_update_does_not(family, monkeypatch):
    model = family_model(family)
    container = AdapterContainer.from_model(model, AdapterConfig(rank=2))
    options = {"reference": "base", "old_logprobs": "fresh"}
    loss = algorithms.get("grpo", beta=0.1).policy_loss
    groups = groups_of((5, [3, 4]), vocabulary=96)
    # Tokens that nobody sampled have no recorded log-probabilities to compare with.
    groups = change_rollouts(groups, lambda rollout, member: {"version": NOT_SAMPLED})
    reached = choose_gpu_kernels(monkeypatch)
    trainer = Trainer(model, grpo.compute_advantages, loss, optim.Adam(1e-3), **options)
    forward_only = reached.total()
    metrics = trainer.train(groups)
    assert reached.total() > forward_only and metrics["grad_norm"] > 0 and container.version == 1


def test_supervised_training_takes_no_gradient_of_a_kernel_and_keeps_its_dropout(monkeypatch):
    model = family_model("qwen3_5")
    AdapterContainer.from_model(model, AdapterConfig(rank=2, dropout=0.5))
    reached = choose_gpu_kernels(monkeypatch)
    parameters = SFTParameters(iterations=2, batch_size=2)
    train_sft(model, [DEMONSTRATION] * 2, [], optim.Adam(1e-3), parameters=parameters)
    # Two forward passes compare the logits of the whole model with those of its output head.
    assert reached == {"gated_delta_kernel": 2}
    with in_mode(model, training=True), differentiable_layers(model):
        assert not mx.array_equal(model(PROMPT), model(PROMPT))
    assert mx.array_equal(model(PROMPT), model(PROMPT))


class LayerWithAKernel(nn.Module):
    """A layer that calls a kernel of its own, which has no gradient."""

    def __call__(self, x):
        return without_gradient(lambda x: 2 * x)(x)


@pytest.mark.parametrize("family", ["deepseek_v41", "llama"])
def test_a_model_without_a_gradient_is_refused_before_anything_is_sampled(family):
    model = family_model(family)
    keys = ["mlp.shared_experts.down_proj"] if family == "deepseek_v41" else None
    AdapterContainer.from_model(model, AdapterConfig(rank=2, keys=keys))
    if family == "llama":
        model.layers[0].mlp = LayerWithAKernel()
    with pytest.raises(TrainingError, match=f"{family} cannot be trained: a function that it"):
        Trainer(model, grpo.compute_advantages, grpo.policy_loss, optim.Adam(1e-3))
    with pytest.raises(TrainingError, match=f"{family} cannot be trained"):
        train_sft(model, [DEMONSTRATION], [], optim.Adam(1e-3))


def loss_of(model):
    return lambda tokens: (model(tokens) * mx.cos(mx.arange(96))).sum()
