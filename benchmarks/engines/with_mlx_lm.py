"""Log-probabilities of mlx-lm, in float32."""

import mlx.core as mx
import mlx_lm
import numpy as np
from question import chat, read_question, write_answer


def main() -> None:
    question = read_question()
    prompts, rows = [], {}
    for name, adapter in question.cases.items():
        model, tokenizer = mlx_lm.load(question.model, adapter_path=adapter)
        model.set_dtype(mx.float32)
        prompts = [
            tokenizer.apply_chat_template(chat(text), add_generation_prompt=True)
            for text in question.texts
        ]
        logits = [model(mx.array([ids]))[0, -1] for ids in question.contexts]
        rows[name] = [np.array(row - mx.logsumexp(row)) for row in logits]
    write_answer(["mlx-lm", "mlx"], prompts, rows)


if __name__ == "__main__":
    main()
