"""QLoRA by rules: the first rule that matches a module says how to quantize and adapt it.

python examples/5_qlora_by_rules.py
"""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten

import textpolicy as tp
from textpolicy.adapters import LoRARule
from textpolicy.planning import plan_adapters


class TwoLayers(nn.Module):
    """16 -> 64 -> 16."""

    def __init__(self) -> None:
        super().__init__()
        self.linear1 = nn.Linear(16, 64, bias=False)
        self.linear2 = nn.Linear(64, 16, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear2(nn.relu(self.linear1(x)))


def main() -> None:
    config = tp.AdapterConfig(rules=[LoRARule(weight_qtype="nf4", rank=16, alpha=0.5)])
    model = TwoLayers()
    print(plan_adapters(model, config))  # shapes and bytes, before anything changes
    tp.AdapterContainer.from_model(model, config)
    for name, array in tree_flatten(model.parameters()):
        if not name.rpartition(".")[2].startswith("_"):
            print(f"{name}: {tuple(array.shape)}, {array.dtype}")

    # A model has several rules: 4 bits for the feed-forward layers, LoRA for attention.
    model, tokenizer = tp.load_model("tiny")
    rules = [
        LoRARule(module_path=".*mlp.*", kind="none", weight_qtype="int4"),
        LoRARule(module_path="model/layers/.*/self_attn/.*", rank=8, alpha=16, weight_qtype="nf4"),
    ]
    adapters = tp.AdapterContainer.from_model(model, tp.AdapterConfig(rules=rules))
    tokens = mx.array([tokenizer.encode("347+185=532")])

    def loss(tokens: mx.array) -> mx.array:
        return nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:], reduction="mean")

    optimizer = optim.Adam(1e-2, bias_correction=True)
    step = nn.value_and_grad(model, loss)
    for _ in range(5):
        value, gradient = step(tokens)
        optimizer.update(model, gradient)
        mx.eval(model.parameters(), optimizer.state)
        print(f"loss {float(value):.3f}")
    print(f"{len(adapters.layers())} adapted layers over a frozen base of 4 bits")


if __name__ == "__main__":
    main()
