"""Steps of mlx-lm-lora: its unchanged `train_grpo`, which gets one batch for each requested step.

On a CPU, mlx uses the same products as in the process of TextPolicy, with threads that wait as
long; `textpolicy.fast_cpu` of this repository installs them.
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx_lm import load
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm_lora._version import __version__
from mlx_lm_lora.trainer.grpo_trainer import GRPOTrainingArgs, train_grpo
from protocol import Steps, read_task, reward_of

sys.path.append(str(Path(__file__).parents[2]))
from textpolicy import fast_cpu

MANY = 1_000_000


def main() -> None:
    steps, task = Steps(), read_task()
    fast_cpu.enable()
    if fast_cpu.enable().threads:
        fast_cpu.set_threads(task["threads"])
    model, tokenizer = load(task["model"])
    # mlx-lm-lora's command loads the reference as a second model for every beta.
    reference = load(task["model"])[0] if task["beta"] else None
    for loaded in filter(None, (model, reference)):
        loaded.set_dtype(getattr(mx, task["dtype"]))
    model.freeze()
    lora = {"rank": task["rank"], "scale": task["scale"], "dropout": 0.0}
    linear_to_lora_layers(model, task["layers"] or len(model.layers), lora)
    mx.eval(model.parameters())
    prompts = [tokenizer.encode(prompt) for prompt in task["prompts"]]
    peak_name = "gpu_peak" if mx.default_device().type == mx.gpu else "mlx_peak"

    def batches(**_: Any) -> Iterator[Any]:
        texts = task["prompts"]
        has_begun = False
        while True:
            if has_begun:
                steps.lap("train")
                steps.done(**{peak_name: mx.get_peak_memory()})
            has_begun = True
            if not steps.wait():
                steps.end()
                sys.exit()
            mx.reset_peak_memory()
            yield prompts, [[0]] * len(texts), texts, [""] * len(texts), None

    def even_share(prompts: Any, completions: list[str], answer: Any, types: Any) -> list[float]:
        steps.lap("generate")
        rewards = [reward_of(text) for text in completions]
        steps.lap("reward")
        return rewards

    steps.ready(mlx_lm_lora=__version__, mlx=mx.__version__, blas=fast_cpu.enable().name)
    with tempfile.TemporaryDirectory() as folder:
        train_grpo(
            model,
            reference,
            tokenizer,
            optim.Adam(learning_rate=task["learning_rate"], bias_correction=True),
            train_dataset=[],
            reward_funcs=[even_share],
            args=GRPOTrainingArgs(
                # The trainer decodes this many rows at a time: all, which is the fastest.
                batch_size=len(prompts) * task["group_size"],
                group_size=task["group_size"],
                iters=MANY,
                steps_per_report=MANY,
                steps_per_save=MANY,
                adapter_file=str(Path(folder) / "adapters.safetensors"),
                beta=task["beta"],
                epsilon=0.2,
                max_completion_length=task["completion_tokens"],
                temperature=1.0,
                top_p=1.0,
                top_k=0,
                min_p=0.0,
            ),
            iterate_batches=batches,
        )


if __name__ == "__main__":
    main()
