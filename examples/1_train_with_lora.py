"""LoRA, a trainer and a policy that reloads: reinforcement learning in plain steps.

python examples/1_train_with_lora.py [STEPS]
"""

import sys
import tempfile
from itertools import islice
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim

import textpolicy as tp
from textpolicy.algorithms import grpo
from textpolicy.environments import load
from textpolicy.generation import create_auto_reload_setup, merge_weights, reload_model


def main(steps: int = 3) -> None:
    environment = load("add")
    tasks = environment.stream(seed=0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lora_adapters.safetensors"
        policy, _, model, _ = create_auto_reload_setup(
            "tiny", path, max_tokens=environment.max_tokens, lora_rank=8, lora_scale=20.0
        )
        trainer = tp.Trainer(
            model, grpo.compute_advantages, grpo.policy_loss, optim.Adam(5e-5, bias_correction=True)
        )
        for step in range(steps):
            batch = list(islice(tasks, 8))
            # The policy takes the adapters that the trainer published before it samples.
            groups = tp.collect(batch, policy, environment.reward, group_size=4, seed=step)
            metrics = trainer.train(groups)
            print(
                f"step {step}: sampled with version {groups[0].version}, "
                f"gradient norm {metrics['grad_norm']:.2f}"
            )

        # A fresh process needs the base model and the one file.
        again, tokenizer = reload_model("tiny", path)
        # On a GPU the weights may be bfloat16, which would round so short a training away.
        merged = merge_weights(again, dtype=mx.float32)
        answer = tp.create_policy(merged, tokenizer, {"temperature": 0.0, "max_tokens": 4})("2+5=")
        print(f"merged model: 2+5={answer.text}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
