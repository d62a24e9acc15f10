"""A run of TRL: its unchanged `GRPOTrainer` on what real_learning.py wrote into a JSON file.

The file has the prompts in order, the environment's Python file, the adapter to start from and the
learning rate of each update. The script writes the trained adapter and a JSON file of curves.
"""

import importlib.util
import inspect
import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from protocol import read_task
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

PACKAGES = ("trl", "peft", "transformers", "torch")
# The log of TRL has these values of each step.
CURVES = {"rewards": "reward", "lengths": "completions/mean_length", "grad_norms": "grad_norm"}


def reward_of(path: str) -> Callable[..., list[float]]:
    """Return the `reward` of an environment's file as TRL calls one: with lists, by name."""
    spec = importlib.util.spec_from_file_location("environment", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    asked = inspect.signature(module.reward).parameters

    def rewards(completions: list[str], text: list[str], example: list[str], **_: Any) -> list[Any]:
        found = []
        for completion, prompt, row in zip(completions, text, example, strict=True):
            answers = dict.fromkeys(("completion", "visible_answer", "answer"), completion)
            columns = json.loads(row)
            known = {**answers, **columns, "prompt": prompt, "example": columns}
            found.append(module.reward(**{name: known[name] for name in asked}))
        return found

    return rewards


def check_tokens(tokenizer: Any, rows: list[dict[str, Any]]) -> None:
    """End the script if TRL would read other tokens than TextPolicy reads."""
    for row in rows:
        tokens = tokenizer(text=row["prompt"])["input_ids"]
        if tokens != row["tokens"]:
            sys.exit(f"TRL reads {tokens} where TextPolicy reads {row['tokens']}")


def main() -> None:
    task = read_task()
    torch.set_num_threads(task["threads"])
    tokenizer = AutoTokenizer.from_pretrained(task["model"])
    check_tokens(tokenizer, task["rows"])
    base = AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.float32)
    model = PeftModel.from_pretrained(base, task["adapter"], is_trainable=True)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    rates = task["rates"]
    # The rate of an update is 1 times the factor that LambdaLR reads from the list.
    optimizer = torch.optim.AdamW(
        weights, lr=1.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=task["weight_decay"]
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda update: rates[min(update, len(rates) - 1)]
    )
    output = Path(task["output"])
    trainer = GRPOTrainer(
        model,
        reward_of(task["environment"]),
        args=GRPOConfig(
            output_dir=str(output / "trainer"),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=1,
            seed=task["seed"],
            max_steps=len(rates),
            per_device_train_batch_size=task["rows_per_pass"],
            gradient_accumulation_steps=task["passes"],
            num_generations=task["group_size"],
            max_completion_length=task["max_tokens"],
            temperature=task["temperature"],
            shuffle_dataset=False,
            beta=0.0,
            num_iterations=1,
            epsilon=0.2,
            # The mean over sequences of the mean over tokens, as in grpo.py of TextPolicy.
            loss_type="grpo",
            scale_rewards="group",
            max_grad_norm=task["max_grad_norm"],
        ),
        train_dataset=Dataset.from_list(
            [{name: row[name] for name in ("prompt", "text", "example")} for row in task["rows"]]
        ),
        processing_class=tokenizer,
        optimizers=(optimizer, schedule),
    )
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    trainer.model.save_pretrained(output / "adapter")
    steps = [row for row in trainer.state.log_history if "reward" in row]
    answer = {name: [row[key] for row in steps] for name, key in CURVES.items()}
    answer |= {"seconds": seconds, "versions": {name: version(name) for name in PACKAGES}}
    (output / "answer.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
