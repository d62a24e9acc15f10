"""Measure what a kept KV cache changes when adapters are swapped in the middle of an answer.

    python benchmarks/kept_cache.py --json

GRPO trains the embedded model as in the demo, and every version is kept. Answers of version v are
then cut in half: the first half is read with version v, the second half with version v + k. The
script compares the log-probabilities of the second half with those of version v + k that reads the
whole answer, which is what the trainer computes. Beside this difference stands the change that the
updates themselves make.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from setting import setting

from textpolicy import fast_cpu
from textpolicy.adapters import AdapterConfig, AdapterContainer, shared_copy
from textpolicy.algorithms import grpo
from textpolicy.config import DEMO
from textpolicy.environments import load
from textpolicy.generation.mlx_generation import load_model
from textpolicy.generation.policy import ModelPolicy
from textpolicy.loop import StepReport, train_rl
from textpolicy.training.optimizer import build_optimizer
from textpolicy.training.trainer import Trainer
from textpolicy.types import Completion, Sampling


@dataclass
class Versions:
    """A policy, and the files of the versions that its training has made."""

    policy: ModelPolicy
    files: dict[int, Path]

    @classmethod
    def train(cls, env: str, steps: int, folder: Path) -> "Versions":
        """Train the embedded model for so many steps."""
        environment = load(env)
        model, tokenizer = load_model("tiny")
        adapters = AdapterContainer.from_model(model, AdapterConfig(), seed=0)
        adapters.publish_path = folder / "adapters.safetensors"
        sampling = Sampling(max_tokens=environment.max_tokens)
        made = cls(ModelPolicy(shared_copy(model), tokenizer, sampling, seed=0), {})

        def keep(report: StepReport) -> None:
            version = int(report.metrics["version"])
            made.files[version] = folder / f"{version}.safetensors"
            shutil.copy(folder / "adapters.safetensors", made.files[version])

        train_rl(
            tasks=environment.stream(0),
            reward=environment.reward,
            policy=made.policy,
            trainer=Trainer(
                model,
                grpo.compute_advantages,
                grpo.policy_loss,
                build_optimizer(float(DEMO.trainer.lr)),
                skip_without_advantages=True,
            ),
            steps=steps,
            on_step=keep,
        )
        return made

    def second_half(self, answer: Completion, first: int, second: int) -> np.ndarray:
        """Return the log-probabilities of the second half; each half is read with a version."""
        tokens = answer.prompt_tokens + answer.tokens
        # The token before the second half is read together with it.
        end = len(answer.prompt_tokens) + len(answer.tokens) // 2 - 1
        model: Any = self.policy.model
        layers = make_prompt_cache(model)
        self.policy.reload(self.files[first])
        mx.eval(model(mx.array([tokens[:end]]), cache=layers))
        self.policy.reload(self.files[second])
        logits = model(mx.array([tokens[end:-1]]), cache=layers)[0]
        logp = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return np.array(mx.take_along_axis(logp, mx.array(tokens[end + 1 :])[:, None], axis=-1))


def measure(versions: Versions, env: str, steps: int, behind: int) -> dict[str, Any]:
    """Return the record of halves that are so many versions apart."""
    prompts = [task.asked for task in islice(load(env).stream(5), 24)]
    kept: list[float] = []
    moved: list[float] = []
    for version in range(10, steps - behind, 10):
        if version not in versions.files or version + behind not in versions.files:
            continue
        versions.policy.reload(versions.files[version])
        groups = versions.policy.generate(prompts, n=2, seed=version)
        for answer in (one for group in groups for one in group if len(one.tokens) > 2):
            half = versions.second_half(answer, version, version + behind)
            whole = versions.second_half(answer, version + behind, version + behind)
            old = versions.second_half(answer, version, version)
            kept += np.abs(half - whole).flatten().tolist()
            moved += np.abs(whole - old).flatten().tolist()
    return {
        "env": env,
        "versions": behind,
        "tokens": len(kept),
        "updates": _spread(moved),
        "kept_cache": _spread(kept),
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    """Return mean and maximum, in nats a token, with two digits."""
    return {"mean": float(f"{np.mean(values):.2g}"), "max": float(f"{np.max(values):.2g}")}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--envs", default="sort,add", help="default: sort,add")
    parser.add_argument("--steps", type=int, default=60, help="steps of training (default: 60)")
    parser.add_argument("--behind", default="1,4", help="versions between the halves")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    if fast_cpu.enable().threads:
        fast_cpu.set_threads(1)
    records: list[dict[str, Any]] = []
    for env in options.envs.split(","):
        with tempfile.TemporaryDirectory() as folder:
            versions = Versions.train(env, options.steps, Path(folder))
            for behind in map(int, options.behind.split(",")):
                records.append(measure(versions, env, options.steps, behind))
                print(json.dumps(records[-1]), file=sys.stderr)
    if options.json:
        print(json.dumps({"setting": setting(), "runs": records}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
