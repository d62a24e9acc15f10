"""Decode steps of transformers: `generate` after random tokens, where only the last step ends.

transformers computes on a GPU where torch has CUDA, and on the CPU otherwise.
"""

from typing import Any

import torch
import transformers
from protocol import Steps, read_task
from transformers import AutoModelForCausalLM


def main() -> None:
    steps, task = Steps(), read_task()
    torch.set_num_threads(task["threads"])
    dtype = getattr(torch, task.get("dtype", "float32"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        # mlx uses TF32 for float32 products too.
        torch.set_float32_matmul_precision("high")
    model = AutoModelForCausalLM.from_pretrained(task["model"], dtype=dtype).to(device)
    prompts = torch.tensor(task["prompts"], device=device)

    def generate(tokens: int) -> Any:
        made = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            pad_token_id=0,
        )
        assert made.shape[1] == prompts.shape[1] + tokens
        if device == "cuda":
            torch.cuda.synchronize()

    generate(2)
    steps.ready(torch=torch.__version__, transformers=transformers.__version__)
    while steps.wait():
        generate(1)
        steps.lap("prompt")
        generate(1 + task["steps"])
        steps.lap("prompt and steps")
        steps.done()
    steps.end()


if __name__ == "__main__":
    main()
