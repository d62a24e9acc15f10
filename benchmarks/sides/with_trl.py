"""Steps of TRL: its unchanged `GRPOTrainer`, which waits before each step for a request.

TRL computes on a GPU where torch has CUDA, and on the CPU otherwise.
"""

import sys
import tempfile
import time
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig
from protocol import Steps, read_task, reward_of
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

MANY = 1_000_000
ON_GPU = torch.cuda.is_available()


class StepRequests(TrainerCallback):
    """Wait for a request before each step, and answer after the step."""

    def __init__(self, steps: Steps) -> None:
        self.steps = steps
        self.reference_seconds = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if not self.steps.wait():
            self.steps.end()
            sys.exit()
        if ON_GPU:
            torch.cuda.reset_peak_memory_stats()
        self.reference_seconds = 0.0

    def on_step_end(self, *_: Any, **__: Any) -> None:
        synchronize()
        self.steps.lap("train")
        measured = {"logprobs": self.reference_seconds}
        if ON_GPU:
            measured["gpu_peak"] = torch.cuda.max_memory_allocated()
        self.steps.done(**measured)


def synchronize() -> None:
    """Wait until a GPU has finished, so that the next time is of finished work."""
    if ON_GPU:
        torch.cuda.synchronize()


def main() -> None:
    steps, task = Steps(), read_task()
    torch.set_num_threads(task["threads"])
    if ON_GPU:
        # mlx uses TF32 for float32 products too.
        torch.set_float32_matmul_precision("high")
    tokenizer = AutoTokenizer.from_pretrained(task["model"])
    model = AutoModelForCausalLM.from_pretrained(task["model"], dtype=task["dtype"])
    requests = StepRequests(steps)
    rows = len(task["prompts"]) * task["group_size"]
    rows_of_pass = task["trl_rows"] or rows
    blocks = range(model.config.num_hidden_layers)
    adapted = blocks[-task["layers"] :] if task["layers"] else blocks

    def even_share(completions: list[str], **_: Any) -> list[float]:
        synchronize()
        steps.lap("generate")
        rewards = [reward_of(text) for text in completions]
        steps.lap("reward")
        return rewards

    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model,
            even_share,
            args=GRPOConfig(
                output_dir=folder,
                use_cpu=not ON_GPU,
                # Autocast. PEFT keeps the weights of LoRA in float32 beside a bfloat16 base.
                bf16=ON_GPU and task["dtype"] == "bfloat16",
                gradient_checkpointing=False,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                logging_strategy="no",
                max_steps=MANY,
                per_device_train_batch_size=rows_of_pass,
                gradient_accumulation_steps=rows // rows_of_pass,
                num_generations=task["group_size"],
                max_completion_length=task["completion_tokens"],
                beta=task["beta"],
                loss_type="grpo",
                temperature=1.0,
                learning_rate=task["learning_rate"],
                lr_scheduler_type="constant",
            ),
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in task["prompts"]]),
            processing_class=tokenizer,
            peft_config=LoraConfig(
                r=task["rank"],
                lora_alpha=task["scale"] * task["rank"],
                target_modules=linear_layers(model.model.layers),
                layers_to_transform=[*adapted],
                task_type="CAUSAL_LM",
            ),
            callbacks=[requests],
        )
        time_reference_passes(trainer, requests)
        steps.ready(
            trl=trl.__version__,
            torch=torch.__version__,
            transformers=transformers.__version__,
            device=torch.cuda.get_device_name() if ON_GPU else "cpu",
        )
        trainer.train()


def linear_layers(blocks: torch.nn.Module) -> list[str]:
    """Return the names of the linear layers of a block."""
    linear = [name for name, at in blocks.named_modules() if isinstance(at, torch.nn.Linear)]
    return sorted({name.rpartition(".")[2] for name in linear})


def time_reference_passes(trainer: GRPOTrainer, requests: StepRequests) -> None:
    """Add up the time of passes without a gradient, which are passes of the reference."""
    compute = trainer._get_per_token_logps_and_entropies

    def timed(*args: Any, **options: Any) -> Any:
        if torch.is_grad_enabled():
            return compute(*args, **options)
        synchronize()
        started = time.perf_counter()
        result = compute(*args, **options)
        synchronize()
        requests.reference_seconds += time.perf_counter() - started
        return result

    trainer._get_per_token_logps_and_entropies = timed


if __name__ == "__main__":
    main()
