"""`textpolicy eval`: greedy reward on held-out tasks, without and with adapters."""

from argparse import Namespace
from dataclasses import asdict

from textpolicy.adapters.container import AdapterContainer
from textpolicy.cli.assembly import sampling_of
from textpolicy.cli.flags import configured
from textpolicy.cli.report import Report, table
from textpolicy.cli.tasks import find_task
from textpolicy.cli.threads import use_threads
from textpolicy.config import TrainConfig
from textpolicy.evaluation import measure
from textpolicy.generation.mlx_generation import load_model
from textpolicy.generation.policy import ModelPolicy
from textpolicy.rewards import scorer_of


def run(options: Namespace) -> Report:
    config = configured(TrainConfig(), options)
    use_threads(config.model)
    environment, rewards = find_task(config.task)
    model, tokenizer = load_model(config.model.name, config.adapter.start)
    policy = ModelPolicy(model, tokenizer, sampling_of(config, environment))
    tasks = environment.heldout(config.evaluation.count)
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
    title = (
        f"greedy reward of {config.model.name} on {len(tasks)} held-out tasks of {environment.name}"
    )
    return Report(data={"env": environment.name, **data}, text=f"{title}\n{table(rows)}")
