"""The circle on SmolLM2-135M-Instruct: its tokenizer, its samples, one update."""

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest

from textpolicy.adapters import AdapterConfig, AdapterContainer
from textpolicy.algorithms import grpo
from textpolicy.generation.mlx_generation import create_policy
from textpolicy.generation.prompts import encode_prompt
from textpolicy.rollout.worker import collect
from textpolicy.training.trainer import Trainer
from textpolicy.types import Task

TASKS = [Task(id="0", prompt="What is the capital of France?"), Task(id="1", prompt="Count to 9.")]


def share_of_capitals(prompt: str, completion: str, example: object) -> float:
    letters = [letter for letter in completion if letter.isalpha()]
    return sum(letter.isupper() for letter in letters) / max(len(letters), 1)


@pytest.mark.parametrize("text", ["It's 1,234 miles: naïve? 日本\n\n  def f(x):", " \t<a>  é 0007"])
def test_text_survives_the_tokenizer_and_digits_are_single_tokens(real_model, text):
    _, tokenizer = real_model
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    digits = [tokenizer.decode([token]) for token in tokens if tokenizer.decode([token]).isdigit()]
    assert digits == [letter for letter in text if letter.isdigit()]


def test_the_model_answers_a_question_in_its_template(real_model):
    model, tokenizer = real_model
    prompt = tokenizer.decode(encode_prompt(tokenizer, "What is the capital of France?"))
    assert prompt.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")
    policy = create_policy(model, tokenizer, {"max_tokens": 16, "temperature": 0.0})
    ((completion,),) = policy.generate(["What is the capital of France?"])
    assert "Paris" in completion.text


@pytest.mark.slow
def test_an_update_moves_the_sampler_and_sampler_and_trainer_agree(real_model):
    model, tokenizer = real_model
    adapters = AdapterContainer.from_model(model, AdapterConfig(rank=4, num_layers=2))
    trainer = Trainer(
        model,
        advantage_fn=grpo.compute_advantages,
        loss_fn=grpo.policy_loss,
        optimizer=optim.Adam(learning_rate=1e-3),
    )
    policy = create_policy(model, tokenizer, {"max_tokens": 12})
    groups = collect(TASKS, policy, share_of_capitals, group_size=4, seed=0)
    metrics = trainer.train(groups)
    assert metrics["sampling/sampling_logp_difference/mean"] < 1e-4
    assert trainer.version == 1
    again = trainer.train(collect(TASKS, policy, share_of_capitals, group_size=4, seed=1))
    assert again["sampling/sampling_logp_difference/mean"] < 1e-4

    trained = np.array(model(mx.array([[1, 2, 3]])))
    adapters.unload()
    assert np.abs(np.array(model(mx.array([[1, 2, 3]]))) - trained).max() > 0
