"""Compare the embedded model in transformers with the same files in mlx-lm. Needs torch.

pip install torch transformers && python tools/check_tiny_model.py
"""

from importlib.metadata import version

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from textpolicy.environments import load
from textpolicy.generation.mlx_generation import load_model
from textpolicy.generation.model_files import tiny_model
from textpolicy.generation.prompts import encode_prompt


def main() -> None:
    import mlx.core as mx

    folder = str(tiny_model())
    model, tokenizer = load_model(folder)
    other = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    other_tokenizer = AutoTokenizer.from_pretrained(folder)
    largest = 0.0
    for name in ("add", "sort", "reverse", "countdown"):
        for task in load(name).heldout(16):
            tokens = encode_prompt(tokenizer, task.prompt)
            message = [{"role": "user", "content": task.prompt}]
            theirs = other_tokenizer.apply_chat_template(
                message, add_generation_prompt=True, return_dict=False
            )
            assert tokens == list(theirs), (tokens, theirs)
            with torch.no_grad():
                expected = other(torch.tensor([tokens])).logits.numpy()
            difference = np.abs(np.array(model(mx.array([tokens]))) - expected).max()
            largest = max(largest, float(difference))
    print(
        f"transformers {version('transformers')} with torch {torch.__version__}: same tokens, "
        f"logits within {largest:.1e} in float32"
    )


if __name__ == "__main__":
    main()
