"""`textpolicy eval`: greedy reward on held-out tasks, without and with adapters."""

from argparse import Namespace
from dataclasses import asdict

from textpolicy.adapters.container import AdapterContainer
from textpolicy.cli.experiment import find_task, measure
from textpolicy.cli.report import Report, table
from textpolicy.generation.mlx_generation import load_model
from textpolicy.generation.policy import ModelPolicy
from textpolicy.rewards import scorer_of
from textpolicy.types import Sampling


def run(options: Namespace) -> Report:
    environment, rewards = find_task(
        options.env,
        options.reward,
        data=options.data,
        prompt=options.prompt,
        timeout=options.reward_timeout,
        on_error=options.on_reward_error,
    )
    sampling = Sampling(max_tokens=options.max_tokens or environment.max_tokens)
    model, tokenizer = load_model(options.model, options.adapter)
    policy = ModelPolicy(model, tokenizer, sampling)
    tasks = environment.heldout(options.count)
    scores = {}
    with scorer_of(rewards) as scorer:
        if adapters := AdapterContainer.of(model):
            with adapters.disabled():
                scores["base"] = measure(policy, tasks, scorer)
            scores["adapter"] = measure(policy, tasks, scorer)
        else:
            scores["base"] = measure(policy, tasks, scorer)
    data = {name: asdict(score) for name, score in scores.items()}
    rows = [(name, f"{score}") for name, score in scores.items()]
    title = f"greedy reward of {options.model} on {len(tasks)} held-out tasks of {environment.name}"
    return Report(data={"env": environment.name, **data}, text=f"{title}\n{table(rows)}")
