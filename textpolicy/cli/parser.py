"""What can be asked of the command. Imports nothing heavy, so that `--help` answers at once."""

from argparse import SUPPRESS, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from textpolicy.cli.flags import Parser, add_config_file, add_resume, add_setting, add_settings
from textpolicy.config import DEMO, SFTConfig, TrainConfig, settings_of
from textpolicy.config.settings import SEED, Limit, Option, Setting, above, at_least

DEFAULTS = TrainConfig()
_SETTINGS = {setting.key: setting for setting in settings_of(DEFAULTS)}
_TASK = tuple(key for key in _SETTINGS if key.startswith("task."))
_PLAIN_MODEL = ("model.name", "model.threads")
_UNTIMED = (
    *("evaluation", "tracking", "run"),
    *(f"trainer.{name}" for name in ("lr", "schedule", "warmup", "final_lr", "weight_decay")),
    *("trainer.max_grad_norm", "rollout.steps_per_generation", "rollout.refill_rounds"),
)
"""Sections and settings that do not change how long a step takes, or that `bench` does without."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command: `module` is the file in this folder that runs it."""

    module: str
    summary: str
    examples: Sequence[str]
    add_options: Callable[[ArgumentParser], None]


def build_parser(only: str | None = None) -> ArgumentParser:
    """The parser of every command; with `only`, the others are known by name and have no options,
    which takes a tenth of the time.
    """
    parser = ArgumentParser(
        prog="textpolicy",
        description="Reinforcement-learning post-training of language models with LoRA, on MLX.",
        epilog="start with:  textpolicy demo",
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=Parser
    )
    for name, command in COMMANDS.items():
        lines = "\n".join(f"  {example}" for example in command.examples)
        sub = commands.add_parser(
            name,
            help=command.summary,
            description=f"{command.summary[0].upper()}{command.summary[1:]}.",
            epilog=f"example{'s' if len(command.examples) > 1 else ''}:\n{lines}",
            formatter_class=RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.set_defaults(module=command.module)
        if only in (None, name):
            command.add_options(sub)
        sub.usage = _usage(sub)
        sub.add_argument(
            "--json", action="store_true", help="answer with one JSON object, the last line"
        )
    return parser


def _usage(parser: ArgumentParser) -> str:
    """One line: there may be a hundred options, which the help explains."""
    forms = {"None": "{0}", "?": "[{0}]", "*": "[{0} ...]", "+": "{0} [{0} ...]"}
    needed = [
        f"{action.option_strings[0]} {action.metavar}"
        if action.option_strings
        else forms[str(action.nargs)].format(action.metavar)
        for action in parser._actions
        if action.required or not action.option_strings
    ]
    return " ".join([parser.prog, *needed, "[OPTIONS]"])


def commands_of(parser: ArgumentParser) -> dict[str, ArgumentParser]:
    """The parser of each command."""
    (commands,) = (action.choices for action in parser._actions if action.dest == "command")
    return dict(cast(Mapping[str, ArgumentParser], commands))


def _own(
    parser: ArgumentParser,
    name: str,
    annotation: Any,
    default: Any,
    text: str,
    *,
    unset: str = "none",
    limit: Limit | None = None,
    **rest: Any,
) -> None:
    """A flag that belongs to one command and to no config."""
    known = {key: rest.pop(key) for key in ("flag", "metavar") if key in rest}
    option = Option(help=text, unset=unset, limit=limit, **known)
    setting = Setting(key=name, annotation=annotation, default=default, option=option)
    if rest.get("required"):
        rest["help"] = text
    add_setting(parser, setting, default=default, **rest)


def _run(parser: ArgumentParser) -> None:
    add_config_file(parser, DEFAULTS)
    add_resume(parser)
    _dry_run(parser, "show the settings and the memory of the run, and start nothing")
    add_settings(parser, DEFAULTS)


def _sft(parser: ArgumentParser) -> None:
    add_config_file(parser, SFTConfig())
    add_resume(parser)
    _dry_run(parser, "show the settings that the run would have, and start nothing")
    add_settings(parser, SFTConfig())


def _dry_run(parser: ArgumentParser, text: str) -> None:
    parser.add_argument("--dry-run", action="store_true", help=text)


def _demo(parser: ArgumentParser) -> None:
    add_settings(parser, DEMO, ("run.steps", "run.seed"))


def _evaluate(parser: ArgumentParser) -> None:
    add_config_file(parser, DEFAULTS)
    text = "tasks to show on which base and adapters earn most differently"
    _own(parser, "show", int, 5, text, limit=at_least(0))
    asked = ("count", "samples", "temperature", "good", "envs")
    keys = ["adapter.start", "sampling.max_tokens", *(f"evaluation.{name}" for name in asked)]
    add_settings(parser, DEFAULTS, (*_TASK, *_PLAIN_MODEL, "model.dtype", *keys))


def _plan(parser: ArgumentParser) -> None:
    keys = [key for key in _SETTINGS if key.startswith(("model.", "adapter."))]
    # What does not change the plan.
    idle = {"model.threads", "adapter.start", "adapter.dropout"}
    add_config_file(parser, DEFAULTS)
    add_settings(parser, DEFAULTS, [key for key in keys if key not in idle])


def _generate(parser: ArgumentParser) -> None:
    add_settings(parser, DEFAULTS, (*_PLAIN_MODEL, "model.dtype", "adapter.start"))
    _own(parser, "prompt", str, None, "what to say to the model", required=True)
    _own(parser, "n", int, 1, "completions to sample", flag="-n", limit=at_least(1))
    _drawing(parser)
    text = "end at this text; may be given several times"
    _own(parser, "stop", str, None, text, action="append")


def _chat(parser: ArgumentParser) -> None:
    add_settings(parser, DEFAULTS, (*_PLAIN_MODEL, "model.dtype", "adapter.start"))
    _own(parser, "system", str | None, None, "what the model is told before you")
    _drawing(parser)


def _drawing(parser: ArgumentParser) -> None:
    _own(parser, "max_tokens", int, 256, "longest completion", limit=at_least(1))
    _own(parser, "temperature", float, 1.0, "randomness; 0 is greedy", limit=at_least(0))
    text = "draw from the likeliest tokens with this much probability together"
    _own(parser, "top_p", float, 1.0, text, limit=above(0))
    text = "draw from this many likeliest tokens; 0 is all"
    _own(parser, "top_k", int, 0, text, limit=at_least(0))
    text = "draw from tokens at least this probable, relative to the likeliest"
    _own(parser, "min_p", float, 0.0, text, limit=at_least(0))
    _own(
        parser,
        "seed",
        int | None,
        None,
        "makes what is sampled repeatable",
        unset="random",
        limit=SEED,
    )


def _fuse(parser: ArgumentParser) -> None:
    add_settings(parser, DEFAULTS, (*_PLAIN_MODEL, "model.dtype", "adapter.start"))
    _own(parser, "output", Path, None, "folder to write the model to", required=True, metavar="DIR")
    text = "write a quantized base in floats, which keeps all of the update"
    parser.add_argument("--dequantize", action="store_true", help=text)
    text = "refuse where rounding leaves less than this share of the update"
    _own(parser, "min_survival", float, 0.9, text, limit=at_least(0))


def _check(parser: ArgumentParser) -> None:
    text = "the reward to try (default: the one of --env)"
    parser.add_argument(
        "task.reward", help=text, nargs="?", default=SUPPRESS, metavar="FILE.py[:NAME]"
    )
    text, known = "column of right answers", "gold, answer, solution, ... what there is"
    _own(parser, "gold_column", str | None, None, text, unset=known, metavar="NAME")
    text, known = "column of prompts", "prompt, question, problem, ... what there is"
    _own(parser, "prompt_column", str | None, None, text, unset=known, metavar="NAME")
    _own(parser, "rows", int, 64, "how many rows to try", limit=at_least(1))
    text = "sample this many completions a row, to see how often rewards differ"
    _own(parser, "sample", int | None, None, text, limit=at_least(2))
    keys = ("task.env", "task.data", "task.reward_timeout", "sampling.max_tokens")
    add_settings(parser, DEFAULTS, (*keys, *_PLAIN_MODEL))


def _inspect(parser: ArgumentParser) -> None:
    text = "an adapter file, or a folder of mlx-lm or PEFT"
    parser.add_argument("path", help=text, type=Path, metavar="PATH")


def _envs(parser: ArgumentParser) -> None:
    text = "an environment to check and show, as --env takes it (default: list all)"
    parser.add_argument("env", nargs="?", help=text, metavar="ENV")
    _own(parser, "data", str | None, None, "rows for it", unset="its own", metavar="FILE")


def _runs(parser: ArgumentParser) -> None:
    text = "folders of runs to list, or two runs and more to compare (default: runs)"
    parser.add_argument("paths", nargs="*", type=Path, help=text, metavar="PATH")


def _report(parser: ArgumentParser) -> None:
    text = "the directory of a run; several are laid over each other"
    parser.add_argument("paths", nargs="+", help=text, type=Path, metavar="RUN")
    text, unset = "the page to write", "report.html in the first run"
    _own(parser, "output", Path | None, None, text, unset=unset, metavar="FILE")


def _bench(parser: ArgumentParser) -> None:
    text = "seconds that it may take once the model is loaded; a step that is begun is finished"
    _own(parser, "seconds", float, 60.0, text, limit=above(0))
    add_config_file(parser, DEFAULTS)
    sections = {setting.key: setting.section for setting in _SETTINGS.values()}
    timed = [key for key, of in sections.items() if key not in _UNTIMED and of not in _UNTIMED]
    add_settings(parser, DEFAULTS, timed)


def _doctor(parser: ArgumentParser) -> None:
    """It has no options."""


COMMANDS = {
    "demo": Command(
        module="demo",
        summary="watch the embedded model learn addition",
        examples=("textpolicy demo",),
        add_options=_demo,
    ),
    "train": Command(
        module="train",
        summary="train adapters by reinforcement learning, so that a reward goes up",
        examples=(
            "textpolicy train --env sort --steps 100 --output runs/sort",
            "textpolicy train --data rows.jsonl --reward my_reward.py --model Qwen/Qwen3-0.6B",
            "textpolicy train --config run.toml --set trainer.lr=1e-5 --dry-run",
        ),
        add_options=_run,
    ),
    "sft": Command(
        module="sft",
        summary="train adapters on demonstrations: texts, completions of prompts, or conversations",
        examples=("textpolicy sft --data my_data --epochs 3 --output runs/mine",),
        add_options=_sft,
    ),
    "generate": Command(
        module="generate",
        summary="sample completions of a prompt",
        examples=(
            "textpolicy generate --prompt '347+185=' --temperature 0",
            "textpolicy generate --prompt '3+4=' -n 4 --adapter runs/add/adapters/best.safetensors",
        ),
        add_options=_generate,
    ),
    "chat": Command(
        module="chat",
        summary="talk with a model",
        examples=(
            "textpolicy chat --adapter runs/mine/adapters/latest.safetensors --temperature 0.7",
        ),
        add_options=_chat,
    ),
    "fuse": Command(
        module="fuse",
        summary="write a model with its adapters added into the weights, for mlx-lm to load",
        examples=("textpolicy fuse --adapter runs/add/adapters/latest.safetensors --output fused",),
        add_options=_fuse,
    ),
    "eval": Command(
        module="evaluate",
        summary="measure the reward on held-out tasks, without and with adapters",
        examples=(
            "textpolicy eval --env add --adapter runs/add/adapters/latest.safetensors",
            "textpolicy eval --config runs/add/config.toml --eval-samples 8",
            "textpolicy eval --env add --eval-envs sort,reverse --model Qwen/Qwen3-0.6B",
        ),
        add_options=_evaluate,
    ),
    "runs": Command(
        module="runs",
        summary="list runs and how far they came, or show where several differ",
        examples=("textpolicy runs", "textpolicy runs runs/add runs/add-2"),
        add_options=_runs,
    ),
    "plan": Command(
        module="plan",
        summary="show which layers an adapter config would train, and the bytes they take",
        examples=(
            "textpolicy plan --model tiny --rank 8 --keys self_attn.q_proj,self_attn.v_proj",
        ),
        add_options=_plan,
    ),
    "check": Command(
        module="check",
        summary="try a reward on right, wrong and empty answers before training on it",
        examples=("textpolicy check my_reward.py --data rows.jsonl",),
        add_options=_check,
    ),
    "inspect": Command(
        module="inspect",
        summary="show what an adapter is: modules, ranks, scales, version, base",
        examples=("textpolicy inspect runs/sort/adapters/latest.safetensors",),
        add_options=_inspect,
    ),
    "report": Command(
        module="report",
        summary="write runs as a page: curves, samples and settings in one HTML file",
        examples=("textpolicy report runs/add", "textpolicy report runs/add runs/add-2"),
        add_options=_report,
    ),
    "envs": Command(
        module="envs",
        summary="list the ready environments, or check and show one",
        examples=("textpolicy envs calculator",),
        add_options=_envs,
    ),
    "bench": Command(
        module="bench",
        summary="take training steps for a minute: where their time goes, and what to change",
        examples=(
            "textpolicy bench",
            "textpolicy bench --model Qwen/Qwen3-0.6B --env gsm8k --quantize 4",
            "textpolicy bench --config run.toml --seconds 120",
        ),
        add_options=_bench,
    ),
    "doctor": Command(
        module="doctor",
        summary="report what this installation runs on",
        examples=("textpolicy doctor",),
        add_options=_doctor,
    ),
}
