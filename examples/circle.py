"""The training loop of `textpolicy.train_rl`, step by step: sample, score, train, publish, reload.

python examples/circle.py [STEPS]
"""

import sys
import tempfile
from itertools import islice
from pathlib import Path

import mlx.optimizers as optim

import textpolicy as tp
from textpolicy.adapters import shared_copy
from textpolicy.algorithms import grpo
from textpolicy.environments import load


def main(steps: int = 5) -> None:
    environment = load("reverse")
    tasks = environment.stream(seed=0)
    model, tokenizer = tp.load_model("tiny")
    adapters = tp.AdapterContainer.from_model(model, tp.AdapterConfig(rank=8))
    # The sampler's model shares the arrays of the base model with the trainer's model.
    policy = tp.create_policy(shared_copy(model), tokenizer, {"max_tokens": environment.max_tokens})
    trainer = tp.Trainer(
        model, grpo.compute_advantages, grpo.policy_loss, optim.Adam(1e-3, bias_correction=True)
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapters.safetensors"
        for step in range(steps):
            batch = list(islice(tasks, 8))
            groups = tp.collect(batch, policy, environment.reward, group_size=4, seed=step)
            metrics = trainer.train(groups)
            adapters.publish(path)
            version = policy.reload(path)
            rewards = [r.reward for group in groups for r in group.rollouts if r.reward is not None]
            print(
                f"step {step}: reward {sum(rewards) / len(rewards):.2f}, "
                f"entropy {metrics['entropy']:.2f}, next samples use version {version}"
            )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
