"""From instruction rows to a merged model, with a config in the words of PEFT.

python examples/4_instructions_to_merged_model.py [EPOCHS]
"""

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import textpolicy as tp
from textpolicy.adapters import print_trainable_parameters
from textpolicy.training.optimizer import build_optimizer
from textpolicy.training.sft import Encoding, iterations_of, load_data

LORA_CONFIG = {
    "r": 64,
    "lora_alpha": 128,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "lora_dropout": 0.05,
    "bias": "none",
    "task_type": "CAUSAL_LM",
}
ROWS = [
    {"instruction": "Add the numbers.", "input": f"{n}+{n}=", "output": str(2 * n)}
    for n in range(10, 34)
]


def main(epochs: int = 3) -> None:
    model, tokenizer = tp.load_model("tiny")
    adapters = tp.AdapterContainer.from_model(model, tp.AdapterConfig.from_dict(LORA_CONFIG))
    print_trainable_parameters(model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        encoding = Encoding(tokenizer=tokenizer, system="You are a calculator.")
        data = load_data(folder / "train.jsonl", encoding, validation_share=0.1)
        print(data)
        # 4 rows in memory, 16 an update.
        parameters = tp.SFTParameters(batch_size=4, accumulation=4, checkpoint_gradients=True)
        updates = iterations_of(epochs, data.train, parameters)
        parameters = replace(parameters, iterations=updates)
        optimizer = build_optimizer(2e-4, warmup=1, updates=updates, weight_decay=0.01)
        result = tp.train_sft(model, data.train, data.valid, optimizer, parameters=parameters)
        print(f"validation loss {result.validation_loss:.3f} after {result.iteration} updates")

        adapters.save(folder / "for-peft", layout="peft")
        print(sorted(path.name for path in (folder / "for-peft").iterdir()))
        policy = tp.create_policy(
            adapters.merge_and_unload(), tokenizer, {"max_tokens": 4, "temperature": 0.0}
        )
        messages = [{"role": "user", "content": "Add the numbers.\n\n21+21="}]
        print(f"the merged model answers {policy(messages).text!r}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
