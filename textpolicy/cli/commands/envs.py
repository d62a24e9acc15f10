"""`textpolicy envs`: what there is to train on, and whether one keeps the contract."""

from argparse import Namespace
from importlib import import_module
from importlib.util import find_spec
from inspect import getdoc

from textpolicy.cli.answer import Report, table
from textpolicy.environments import check_env, gold_answers, load, ready_names
from textpolicy.environments.single_turn import prompt_text
from textpolicy.tracking.console import terminal_safe

_LIBRARIES = {
    "reasoning_gym:NAME": ("reasoning_gym", "reasoning-gym", "its tasks, such as basic_arithmetic"),
    "textarena:NAME": ("textarena", "textarena", "its games, such as TicTacToe-v0"),
}


def run(options: Namespace) -> Report:
    return _show(options.env, options.data) if options.env else _list()


def _list() -> Report:
    ready = {name: _summary(name) for name in ready_names()}
    others = {
        "FILE.py[:NAME]": "a file of yours; see docs/environments.md",
        "gymnasium:ID": "any Gymnasium environment of text",
    }
    for spec, (module, extra, what) in _LIBRARIES.items():
        absent = "" if find_spec(module) else f"; needs: pip install 'textpolicy[{extra}]'"
        others[spec] = what + absent
    return Report(
        data={"ready": ready, "others": others}, text=table([*ready.items(), *others.items()])
    )


def _summary(name: str) -> str:
    text = getdoc(import_module(f"textpolicy_envs.{name}")) or ""
    return text.partition("\n\n")[0].replace("\n", " ")


def _show(spec: str, data: str | None) -> Report:
    environment = load(spec, data)
    check_env(environment, 20)
    (task,) = environment.heldout(1)
    known = environment.gold is not None or "gold" in environment.make().reset(seed=task.seed)[1]
    gold = gold_answers(environment, task) if known else []
    prompt = prompt_text(task.prompt)
    rows = [("name", environment.name), ("prompt", terminal_safe(prompt))]
    rows += [("gold answer", terminal_safe(answer)) for answer in gold]
    rows += [("max tokens", f"{environment.max_tokens}"), ("contract", "kept")]
    found = {"env": environment.name, "prompt": prompt, "gold": gold}
    return Report(data=found | {"max_tokens": environment.max_tokens}, text=table(rows))
