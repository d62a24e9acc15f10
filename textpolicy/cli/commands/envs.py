"""`textpolicy envs`: list the environments, or check one and show a task of it."""

from argparse import Namespace
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from inspect import getdoc

from textpolicy.cli.answer import Answer, table
from textpolicy.environments import check_env, gold_answers, load, ready_names
from textpolicy.environments.chat import prompt_text

_LIBRARIES = {
    "reasoning_gym:NAME": ("reasoning_gym", "reasoning-gym", "a task, such as basic_arithmetic"),
    "textarena:NAME": ("textarena", "textarena", "a game, such as TicTacToe-v0"),
    "openenv:URL": ("openenv", "openenv", "an OpenEnv server, such as http://127.0.0.1:8000"),
    "verifiers:NAME": ("verifiers", "verifiers", "a taskset of verifiers, played by the library"),
}


def run(options: Namespace) -> Answer:
    return _show(options.env, options.data) if options.env else _list()


def _list() -> Answer:
    ready = {name: _summary(name) for name in ready_names()}
    others = {
        "FILE.py[:NAME]": "a file of yours; see docs/environments.md",
        "gymnasium:ID": "any Gymnasium environment of text",
    }
    for spec, (module, extra, text) in _LIBRARIES.items():
        missing = "" if find_spec(module) else f"; needs: pip install 'textpolicy[{extra}]'"
        others[spec] = text + missing
    first_scores = import_module("textpolicy_envs").FIRST_SCORES
    text = "\n\n".join(_paragraphs(ready, others, first_scores))
    return Answer(data={"ready": ready, "others": others, "first_scores": first_scores}, text=text)


def _paragraphs(
    ready: Mapping[str, str],
    others: Mapping[str, str],
    first_scores: Mapping[str, Mapping[str, float]],
) -> Iterator[str]:
    """Yield the tasks by the model that they suit, with the first greedy scores of that model."""
    left = dict(ready)
    for model, scores in first_scores.items():
        rows = [(name, f"{score:.2f}  {left.pop(name)}") for name, score in scores.items()]
        yield f"for {model}, with its greedy score before training:\n{table(rows)}"
    yield f"for larger models, for your own rows, or of several turns:\n{table([*left.items()])}"
    yield f"others:\n{table([*others.items()])}"
    yield (
        "To see what another model earns before training:\n"
        "  textpolicy check --env NAME --model MODEL --sample 8"
    )


def _summary(name: str) -> str:
    """Return the first paragraph of the docstring of a ready environment."""
    text = getdoc(import_module(f"textpolicy_envs.{name}")) or ""
    return text.partition("\n\n")[0].replace("\n", " ")


def _show(spec: str, data: str | None) -> Answer:
    environment = load(spec, data)
    check_env(environment, 20)
    (task,) = environment.heldout(1)
    has_gold = environment.gold is not None or (
        environment.agent is None and "gold" in environment.make().reset(seed=task.seed)[1]
    )
    gold = gold_answers(environment, task) if has_gold else []
    prompt = prompt_text(task.prompt)
    rows = [("name", environment.name), ("prompt", prompt)]
    rows += [("gold answer", answer) for answer in gold]
    rows += [("max tokens", f"{environment.max_tokens}"), ("check", "passed")]
    rows += [("note", note)] if (note := environment.split_note) else []
    data_found = {"env": environment.name, "prompt": prompt, "gold": gold, "note": note}
    return Answer(data=data_found | {"max_tokens": environment.max_tokens}, text=table(rows))
