"""The commands and their options. Imports nothing heavy, so that `--help` answers at once."""

from argparse import SUPPRESS, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

from textpolicy.cli.flags import (
    CommandsParser,
    FlagParser,
    add_config_file,
    add_resume,
    add_setting,
    add_settings,
)
from textpolicy.config import DEMO, SFTConfig, TrainConfig, settings_of
from textpolicy.config.settings import SEED, Limit, Option, Setting, above, at_least
from textpolicy.config.train import OF_DEVICE

_DEFAULTS = TrainConfig()
_SETTINGS = {setting.key: setting for setting in settings_of(_DEFAULTS)}
_TASK = tuple(key for key in _SETTINGS if key.startswith("task."))
_PLAIN_MODEL = ("model.name", "model.threads")
_PROMPTS = ("model.thinking", "model.chat_template_kwargs", "model.allow_special_tokens")
"""Settings that decide how a prompt becomes tokens."""
_PROMPTED_MODEL = (*_PLAIN_MODEL, *_PROMPTS)
CHECKED = (
    *(f"task.{key}" for key in ("env", "data", "columns", "data_stream", "prompt", "system")),
    *(f"task.{key}" for key in ("few_shot", "gold_column", "reward_timeout")),
    *(*_PROMPTED_MODEL, "adapter.start", "sampling.max_tokens"),
)
"""Settings that have a flag in `check`."""
CHECKED_ROWS, GRADED_ROWS, CHECK_SECONDS = 64, 1000, 45.0
"""The rows of `check`, without and with grades, and its seconds, if none are given."""
_SAMPLED = ("task.system", *_PROMPTED_MODEL, "model.dtype", "adapter.start")
_UNTIMED = (
    *("evaluation", "tracking", "run"),
    *(f"trainer.{name}" for name in ("lr", "schedule", "warmup", "final_lr", "weight_decay")),
    *("trainer.max_grad_norm", "rollout.steps_per_generation", "rollout.refill_rounds"),
    *("rollout.max_staleness", "rollout.workers", "rollout.worker_deadline", "rollout.swap"),
    "rollout.ray",
    *("model.allow_special_tokens", "task.eval_data"),
)
"""Sections and settings that `bench` leaves out: they do not change the time of a step that one
process takes."""


START = """\
TextPolicy trains language models by reinforcement learning, with LoRA, on MLX.

  textpolicy doctor                   see what this installation runs on
  textpolicy demo                     see the embedded model learn to add, in about a minute
  textpolicy init my-project          write a project: a reward, rows, settings and a README
  textpolicy train --config run.toml  train it, or: textpolicy train --env sort
  textpolicy runs                     list the runs; chat, serve and export use their models
  textpolicy envs                     list the ready tasks
  textpolicy --help                   list all commands; textpolicy COMMAND --help its options"""

EXIT_CODES = """\
  0    done
  1    failed after the work had begun
  2    nothing was begun: the command line, a setting, or something that they name is wrong
  75   stopped with a checkpoint; type the line that the command prints to resume the run
  130  ended by Ctrl-C; 143 by SIGTERM"""


class Command:
    """A command: what it does, its options and examples. `cli/commands/NAME.py` runs it."""

    def __init__(
        self, summary: str, add_options: Callable[[ArgumentParser], None], *examples: str
    ) -> None:
        self.summary = summary
        self.add_options = add_options
        self.examples = examples


def build_parser(only: str | None = None) -> ArgumentParser:
    """Return the parser of all commands.

    With `only`, the other commands have no options, which takes a tenth of the time.
    """
    parser = CommandsParser(
        prog="textpolicy",
        description="Reinforcement-learning post-training of language models with LoRA, on MLX.",
        epilog=f"exit codes:\n{EXIT_CODES}\n\nstart with:  textpolicy demo",
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    text = "show the versions of TextPolicy, mlx, mlx-lm and Python"
    parser.add_argument("--version", action="store_true", help=text)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=FlagParser)
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
        if only in (None, name):
            command.add_options(sub)
        sub.usage = _usage(sub)
        sub.add_argument(
            "--json",
            action="store_true",
            help="print the result as one JSON object on the last line",
        )
    return parser


def _usage(parser: ArgumentParser) -> str:
    """Return a usage line without the options, of which there may be a hundred."""
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
    """Return the parser of each command."""
    (commands,) = (action.choices for action in parser._actions if action.dest == "command")
    return dict(cast(Mapping[str, ArgumentParser], commands))


def _add_flag(
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
    """Add a flag that belongs to this command and is no setting of a config."""
    known = {key: rest.pop(key) for key in ("flag", "metavar") if key in rest}
    option = Option(help=text, unset=unset, limit=limit, **known)
    setting = Setting(key=name, annotation=annotation, default=default, option=option)
    if rest.get("required"):
        rest["help"] = text
    add_setting(parser, setting, default=default, **rest)


def _train(parser: ArgumentParser) -> None:
    add_config_file(parser, _DEFAULTS)
    add_resume(parser)
    _dry_run_of_training(parser)
    text = "with --dry-run: take two steps, and correct the estimated memory by measured peaks"
    parser.add_argument("--measure", action="store_true", help=text)
    _ranks(parser)
    add_settings(parser, _DEFAULTS)


def _ranks(parser: ArgumentParser) -> None:
    """Add the options of a run by several processes, which train together."""
    _add_flag(
        parser,
        "ranks",
        int | None,
        None,
        "start so many processes on this machine, which divide the work of each step",
        unset="one process, or those of mpirun or mlx.launch",
        metavar="N",
        limit=at_least(1),
    )
    _add_flag(
        parser,
        "backend",
        Literal["ring", "mpi", "nccl"],
        "ring",
        "how the processes of --ranks exchange messages: by TCP, by Open MPI, or between NVIDIA "
        "GPUs, one a process",
    )
    _add_flag(
        parser,
        "rank_deadline",
        float,
        600.0,
        "seconds that one of several processes waits for the others before the run ends, with the "
        "exit code 75",
        metavar="SECONDS",
        limit=above(0),
    )


def _sft(parser: ArgumentParser) -> None:
    add_config_file(parser, SFTConfig())
    add_resume(parser)
    _dry_run_of_training(parser)
    add_settings(parser, SFTConfig())


def _dry_run_of_training(parser: ArgumentParser) -> None:
    _dry_run(parser, "show the estimated memory of the run and its settings, and start nothing")
    text = "with --dry-run: show every setting, also those that have their defaults"
    parser.add_argument("--all-settings", action="store_true", help=text)


def _dry_run(parser: ArgumentParser, text: str) -> None:
    parser.add_argument("--dry-run", action="store_true", help=text)


def _demo(parser: ArgumentParser) -> None:
    add_settings(parser, DEMO, ("run.steps", "run.seed"))


def _eval(parser: ArgumentParser) -> None:
    add_config_file(parser, _DEFAULTS)
    text = "adapters, a run or RUN@VERSION with which the adapters are compared"
    unset = "the base model"
    _add_flag(parser, "before", str | None, None, text, unset=unset, metavar="ADAPTER")
    text = "tasks to show: the largest gains and losses, or the highest and lowest rewards"
    _add_flag(parser, "show", int, 5, text, limit=at_least(0))
    asked = ("count", "samples", "temperature", "good", "envs")
    keys = ["adapter.start", "sampling.max_tokens", "sampling.merge_adapters"]
    keys += [f"evaluation.{name}" for name in asked]
    keys += ["sizes.decoding_rows", "sizes.prefill_tokens"]
    helps = _help_of_adapter("adapters to measure, beside the base model or those of --before")
    asked_model = (*_TASK, *_PROMPTED_MODEL, "model.dtype", *keys)
    add_settings(parser, _DEFAULTS, asked_model, helps=helps)


def _help_of_adapter(use: str) -> dict[str, str]:
    """Return the help line of --adapter for a command that trains nothing."""
    forms = "a file, a run, RUN@VERSION, a GGUF LoRA, or a folder of mlx-lm or PEFT"
    return {"adapter.start": f"{use}: {forms} (default: the base model alone)"}


def _plan(parser: ArgumentParser) -> None:
    keys = [key for key in _SETTINGS if key.startswith(("model.", "adapter."))]
    # These settings do not change the plan.
    idle = {"model.threads", *_PROMPTS, "adapter.start", "adapter.dropout"}
    add_config_file(parser, _DEFAULTS)
    add_settings(parser, _DEFAULTS, [key for key in keys if key not in idle])


def _generate(parser: ArgumentParser) -> None:
    helps = _help_of_adapter("adapters to generate with")
    add_settings(parser, _DEFAULTS, _SAMPLED, helps=helps)
    _add_flag(parser, "prompt", str, None, "text for the model", required=True)
    _add_flag(parser, "n", int, 1, "number of completions", flag="-n", limit=at_least(1))
    _add_sampling_flags(parser)
    text = "stop at this text; may be repeated"
    _add_flag(parser, "stop", str, None, text, action="append")


def _chat(parser: ArgumentParser) -> None:
    add_settings(parser, _DEFAULTS, [key for key in _SAMPLED if key != "adapter.start"])
    text = "an adapter, a run or RUN@VERSION that answers; may be repeated, to compare answers"
    _add_flag(parser, "adapter", str, None, text, action="append", metavar="[NAME=]ADAPTER")
    text = "let the base model answer too, beside the adapters"
    parser.add_argument("--base", action="store_true", help=text)
    _add_sampling_flags(parser)


def _add_sampling_flags(parser: ArgumentParser) -> None:
    _add_flag(parser, "max_tokens", int, 256, "most tokens of a completion", limit=at_least(1))
    _add_flag(
        parser, "temperature", float, 1.0, "sampling temperature; 0 is greedy", limit=at_least(0)
    )
    text = "sample from the most likely tokens whose probabilities sum to this"
    _add_flag(parser, "top_p", float, 1.0, text, limit=above(0))
    text = "sample from this many most likely tokens; 0 is all"
    _add_flag(parser, "top_k", int, 0, text, limit=at_least(0))
    text = "sample from tokens with at least this share of the highest probability"
    _add_flag(parser, "min_p", float, 0.0, text, limit=at_least(0))
    _add_flag(
        parser,
        "seed",
        int | None,
        None,
        "seed of sampling; the same seed repeats the completions",
        unset="random",
        limit=SEED,
    )


def _serve(parser: ArgumentParser) -> None:
    add_settings(parser, _DEFAULTS, (*_PROMPTED_MODEL, "model.dtype"))
    text = "serve an adapter, a run or RUN@VERSION under a name; may be repeated"
    _add_flag(parser, "adapter", str, None, text, action="append", metavar="[NAME=]ADAPTER")
    text = "serve the newest version of a run that is still training; may be repeated"
    _add_flag(parser, "follow", str, None, text, action="append", metavar="[NAME=]RUN")
    text = "address to listen on; only this machine can reach the default"
    _add_flag(parser, "host", str, "127.0.0.1", text, metavar="HOST")
    port = Limit(holds=lambda x: 0 <= x < 2**16, words=" from 0 to 65535")
    _add_flag(parser, "port", int, 8000, "port to listen on; 0 is any free one", limit=port)
    text = "key that clients have to send; the variable TEXTPOLICY_TOKEN sets it too"
    _add_flag(parser, "token", str | None, None, text, unset="random", metavar="TOKEN")
    text = "let everybody on this machine ask, without a key"
    parser.add_argument("--no-token", action="store_true", help=text)
    text = "another name by which clients may reach the server; may be repeated"
    _add_flag(parser, "allow_host", str, None, text, action="append", metavar="NAME")
    text = "folder that clients may load adapters from, beside runs/; may be repeated"
    _add_flag(parser, "allow_load", Path, None, text, action="append", metavar="DIR")
    text = "most answers of one adapter that are sampled together"
    _add_flag(parser, "max_rows", int | None, None, text, unset=OF_DEVICE, limit=at_least(1))
    text = "most tokens of a prompt and its answer"
    unset = "the model's context"
    _add_flag(parser, "max_model_len", int | None, None, text, unset=unset, limit=at_least(2))
    text = "most tokens of an answer whose request names no limit"
    _add_flag(parser, "max_tokens", int, 1024, text, limit=at_least(1))


def _export(parser: ArgumentParser) -> None:
    text = "the folder of a run (its best adapter, or else its latest), or an adapter"
    parser.add_argument("source", help=text, type=Path, metavar="RUN|ADAPTER")
    formats = "mlx, hf, peft, mlx-lm, gguf, gguf-lora, ollama, vllm or lmstudio"
    _add_flag(parser, "to", str, None, formats, required=True, metavar="FORMAT")
    _add_flag(parser, "output", Path, None, "folder for the export", required=True, metavar="DIR")
    text = "base model of the adapter"
    _add_flag(parser, "model", str | None, None, text, unset="that of the run", metavar="NAME")
    text = "number format of merged weights; q8_0 is for GGUF"
    formats = Literal["float32", "bfloat16", "float16", "q8_0"] | None
    _add_flag(parser, "dtype", formats, None, text, unset="that of the checkpoint")
    text = "write a quantized base as floats, which keeps the whole update"
    parser.add_argument("--dequantize", action="store_true", help=text)
    text = "write an adapter of a quantized base for its float base, where it computes otherwise"
    parser.add_argument("--over-float-base", action="store_true", help=text)
    text = "refuse if less than this share of the update, or of its effect, is left"
    _add_flag(parser, "min_survival", float, 0.9, text, limit=at_least(0))
    text, unset = "largest difference of log-probabilities", "that of the format, on docs/export.md"
    _add_flag(parser, "tolerance", float | None, None, text, unset=unset, limit=at_least(0))
    text = "replace an earlier export at --output"
    parser.add_argument("--force", action="store_true", help=text)
    add_settings(parser, _DEFAULTS, ("model.threads",))


def _push(parser: ArgumentParser) -> None:
    parser.add_argument("folder", help="the folder of an export", type=Path, metavar="FOLDER")
    text = "repository on the hub, such as USER/MODEL; without a user it is in your account"
    _add_flag(parser, "repo", str, None, text, required=True, metavar="NAME")
    text = "make a new repository that everybody can see; it is private otherwise"
    parser.add_argument("--public", action="store_true", help=text)
    text = "list the files, their sizes and the repository, and upload nothing"
    parser.add_argument("--dry-run", action="store_true", help=text)


def _init(parser: ArgumentParser) -> None:
    text = "folder of the project, which may hold other files (default: this folder)"
    parser.add_argument("folder", nargs="?", type=Path, help=text, metavar="DIR", default=Path())
    kinds = parser.add_mutually_exclusive_group()
    kinds.set_defaults(kind="reward")
    text = "a judge grades the answers by a rubric, where no program can check them"
    kinds.add_argument("--judge", dest="kind", action="store_const", const="judge", help=text)
    text = "an environment answers the model, in episodes of several turns"
    kinds.add_argument("--env", dest="kind", action="store_const", const="environment", help=text)


def _check(parser: ArgumentParser) -> None:
    text = "the reward to check (default: the reward of --env)"
    parser.add_argument(
        "task.reward", help=text, nargs="?", default=SUPPRESS, metavar="FILE.py[:NAME]"
    )
    add_config_file(parser, _DEFAULTS)
    text, known = "column of prompts", "the first of prompt, question, problem, ... that exists"
    _add_flag(parser, "prompt_column", str | None, None, text, unset=known, metavar="NAME")
    unset = f"{CHECKED_ROWS}; {GRADED_ROWS} with --label-column"
    text = "number of rows to check"
    _add_flag(parser, "rows", int | None, None, text, unset=unset, limit=at_least(1))
    text = (
        "column of your own grades of the answers in the column completion, to compare rewards with"
    )
    _add_flag(parser, "label_column", str | None, None, text, metavar="NAME")
    text = "completions to sample for each row, to see how often rewards differ"
    _add_flag(parser, "sample", int | None, None, text, limit=at_least(2))
    text = "seconds for sampling; rows that do not fit into this time are not sampled"
    _add_flag(parser, "seconds", float, CHECK_SECONDS, text, limit=above(0))
    add_settings(parser, _DEFAULTS, CHECKED, helps=_help_of_adapter("adapters to sample with"))


def _inspect(parser: ArgumentParser) -> None:
    text = "an adapter file, a GGUF LoRA, or a folder of mlx-lm or PEFT"
    parser.add_argument("path", help=text, type=Path, metavar="PATH")


def _envs(parser: ArgumentParser) -> None:
    text = "environment to check and show, as for --env (default: list all)"
    parser.add_argument("env", nargs="?", help=text, metavar="ENV")
    _add_flag(
        parser,
        "data",
        str | None,
        None,
        "rows for the environment",
        unset="its own rows",
        metavar="FILE",
    )


def _runs(parser: ArgumentParser) -> None:
    text = "folders of runs to list, or two or more runs to compare (default: runs)"
    parser.add_argument("paths", nargs="*", type=Path, help=text, metavar="PATH")


def _report(parser: ArgumentParser) -> None:
    text = "directory of a run; the curves of several runs share the charts"
    parser.add_argument("paths", nargs="+", help=text, type=Path, metavar="RUN")
    text, unset = (
        "file of the page",
        "report.html in the run, or compare-OTHER.html in the first of several runs",
    )
    _add_flag(parser, "output", Path | None, None, text, unset=unset, metavar="FILE")


def _bench(parser: ArgumentParser) -> None:
    text = "seconds that it may take once the model is loaded; a step that is begun is finished"
    _add_flag(parser, "seconds", float, 60.0, text, limit=above(0))
    add_config_file(parser, _DEFAULTS)
    sections = {setting.key: setting.section for setting in _SETTINGS.values()}
    timed = [key for key, of in sections.items() if key not in _UNTIMED and of not in _UNTIMED]
    add_settings(parser, _DEFAULTS, timed)


def _doctor(parser: ArgumentParser) -> None:
    """Add nothing: the command has no options."""


COMMANDS = {
    "demo": Command(
        "train the embedded model on addition and show the accuracy before and after",
        _demo,
        "textpolicy demo",
    ),
    "init": Command(
        "write a project to start from: a reward, rows, settings and a README",
        _init,
        "textpolicy init my-project",
        "textpolicy init my-project --judge",
    ),
    "train": Command(
        "train adapters by reinforcement learning on your reward",
        _train,
        "textpolicy train --env sort --steps 100 --output runs/sort",
        "textpolicy train --data rows.jsonl --reward my_reward.py --model Qwen/Qwen3-0.6B",
        "textpolicy train --config run.toml --set trainer.lr=1e-5 --dry-run",
    ),
    "sft": Command(
        "train adapters on demonstrations: texts, prompt and completion, or conversations",
        _sft,
        "textpolicy sft --data my_data --epochs 3 --output runs/mine",
        "textpolicy sft --data rows.jsonl --prompt 'Solve: {question}' --gold-column answer",
    ),
    "generate": Command(
        "sample completions of a prompt",
        _generate,
        "textpolicy generate --prompt '347+185=' --temperature 0",
        "textpolicy generate --prompt '3+4=' -n 4 --adapter runs/add",
    ),
    "chat": Command(
        "chat with a model, or with several side by side",
        _chat,
        "textpolicy chat --adapter runs/mine --base",
        "textpolicy chat --adapter runs/mine@10 --adapter runs/mine@20 --temperature 0.7",
    ),
    "serve": Command(
        "answer OpenAI's API with a model and its adapters",
        _serve,
        "textpolicy serve --adapter runs/add",
        "textpolicy serve --model Qwen/Qwen3-0.6B --adapter old=runs/one --adapter new=runs/two",
        "textpolicy serve --follow runs/add --port 8001",
    ),
    "export": Command(
        "write what was trained for another program, and prove that it is what was trained",
        _export,
        "textpolicy export runs/add --to mlx --output add-mlx",
        "textpolicy export runs/add --to gguf --dtype q8_0 --output add-gguf",
        "textpolicy export runs/add/adapters/latest.safetensors --to peft --output add-peft",
    ),
    "push": Command(
        "upload an export to a model hub, privately unless you say otherwise",
        _push,
        "textpolicy push add-peft --repo me/add --dry-run",
        "textpolicy push add-peft --repo me/add",
    ),
    "eval": Command(
        "measure the reward on held-out tasks, without and with adapters",
        _eval,
        "textpolicy eval --env add --adapter runs/add",
        "textpolicy eval --config runs/add/config.toml --adapter runs/add --before runs/add@10",
        "textpolicy eval --env add --eval-envs sort,reverse --model Qwen/Qwen3-0.6B",
    ),
    "runs": Command(
        "list runs and their progress, or show how several runs differ",
        _runs,
        "textpolicy runs",
        "textpolicy runs runs/add runs/add-2",
    ),
    "plan": Command(
        "show which layers an adapter config trains, and their bytes",
        _plan,
        "textpolicy plan --model tiny --rank 8 --keys self_attn.q_proj,self_attn.v_proj",
    ),
    "check": Command(
        "check a reward on right, wrong and empty answers before training on it",
        _check,
        "textpolicy check my_reward.py --data rows.jsonl",
        "textpolicy check --config run.toml --sample 4",
        "textpolicy check my_reward.py --data rows.jsonl --sample 8 --adapter runs/mine",
        "textpolicy check my_judge.py --data graded.jsonl --label-column grade",
    ),
    "inspect": Command(
        "show the contents of an adapter: modules, ranks, scales, version, base",
        _inspect,
        "textpolicy inspect runs/sort/adapters/latest.safetensors",
    ),
    "report": Command(
        "write curves, samples and settings of runs to one HTML file",
        _report,
        "textpolicy report runs/add",
        "textpolicy report runs/add runs/add-2",
    ),
    "envs": Command(
        "list the ready environments, or check and show one", _envs, "textpolicy envs calculator"
    ),
    "bench": Command(
        "take training steps for a minute; show where their time goes and their peak memory",
        _bench,
        "textpolicy bench",
        "textpolicy bench --model Qwen/Qwen3-0.6B --env gsm8k --quantize 4",
        "textpolicy bench --config run.toml --seconds 120",
    ),
    "doctor": Command("show what this installation runs on", _doctor, "textpolicy doctor"),
}
