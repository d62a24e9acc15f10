"""Log-probabilities of Transformers, and of PEFT for adapters, in float32."""

import torch
from peft import PeftModel
from question import chat, read_question, write_answer
from transformers import AutoModelForCausalLM, AutoTokenizer


@torch.no_grad()
def main() -> None:
    question = read_question()
    tokenizer = AutoTokenizer.from_pretrained(question.model)
    prompts = [
        tokenizer.apply_chat_template(
            chat(text), add_generation_prompt=True, tokenize=True, return_dict=False
        )
        for text in question.texts
    ]
    rows = {}
    for name, adapter in question.cases.items():
        model = AutoModelForCausalLM.from_pretrained(question.model, dtype=torch.float32)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, adapter)
        model = model.eval()
        logits = [model(torch.tensor([ids])).logits[0, -1] for ids in question.contexts]
        rows[name] = [torch.log_softmax(row, -1).numpy() for row in logits]
    write_answer(["transformers", "peft", "torch"], prompts, rows)


if __name__ == "__main__":
    main()
