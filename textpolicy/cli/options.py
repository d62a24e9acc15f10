"""What can be asked of the command. Imports nothing heavy, so that `--help` answers at once."""

from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

OnError = str | float


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """One training run. The defaults of `train` are here; `demo` is a run with its own."""

    env: str | None = None
    data: str | None = None
    prompt: str | None = None
    model: str = "tiny"
    reward: str | None = None
    reward_timeout: float | None = None
    on_reward_error: OnError | None = None
    algorithm: str = "grpo"
    beta: float = 0.0
    steps: int = 200
    lr: float = 5e-4
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: int = 0
    weight_decay: float = 0.0
    rank: int = 16
    scale: float = 2.0
    quantize: int | None = None
    group_size: int = 8
    groups_per_step: int = 16
    mini_batches: int | None = None
    epochs: int = 1
    refill_rounds: int | None = None
    micro_batch_size: int | None = None
    checkpoint_gradients: bool = False
    max_tokens: int | None = None
    temperature: float = 1.0
    count: int = 512
    seed: int = 0
    stop_on_collapse: bool = False
    wandb: str | None = None


@dataclass(frozen=True, kw_only=True)
class SFTSettings:
    """One run of supervised training, with the defaults of `sft`."""

    model: str = "tiny"
    data: str = ""
    learn: Literal["answers", "everything"] = "answers"
    system: str | None = None
    max_length: int = 2048
    validation_share: float = 0.1
    adapter: str | None = None
    adapter_config: str | None = None
    target_modules: str | None = None
    rank: int | None = None
    alpha: float | None = None
    scale: float | None = None
    dropout: float | None = None
    quantize: int | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    iterations: int | None = None
    epochs: int | None = None
    batch_size: int = 4
    accumulation: int = 1
    packing: bool = False
    checkpoint_gradients: bool = False
    lr: float = 2e-4
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: int = 0
    weight_decay: float = 0.0
    steps_per_report: int = 10
    steps_per_eval: int = 100
    validation_batches: int = 10
    save_every: int = 100
    patience: int | None = None
    seed: int = 0
    wandb: str | None = None
    tensorboard: bool = False


DYNAMIC_ROUNDS = 10
ALGORITHMS = (
    "grpo",
    "dr_grpo",
    "dapo",
    "gspo",
    "luspo",
    "cispo",
    "sapo",
    "vespo",
    "lite_ppo",
    "reinforce",
    "reinforce_pp",
    "reinforce_pp_baseline",
    "rloo",
    "maxrl",
    "gdpo",
    "dpo",
)
DEMO = RunSettings(env="add", steps=400)


def build_parser() -> ArgumentParser:
    """The parser of every command; `module` names the file in this folder that runs it."""
    parser = ArgumentParser(
        prog="textpolicy",
        description="Reinforcement-learning post-training of language models with LoRA, on MLX.",
        epilog="start with:  textpolicy demo",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary, example, add_options) in _COMMANDS.items():
        command = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=f"example:\n  {example}",
            formatter_class=RawDescriptionHelpFormatter,
        )
        command.set_defaults(module=module)
        add_options(command)
        command.add_argument(
            "--json", action="store_true", help="answer with one JSON object, the last line"
        )
    return parser


def at_least(low: float, kind: type[int] | type[float] = int) -> Callable[[str], Any]:
    """A converter for numbers with a smallest allowed value."""

    def convert(text: str) -> Any:
        number = _parse(text, kind)
        if not low <= number < float("inf"):
            noun = "a whole number" if kind is int else "a number"
            raise ArgumentTypeError(f"{text!r}; expected {noun}, at least {low}")
        return number

    return convert


def positive(text: str) -> float:
    """A converter for numbers above 0."""
    number = _parse(text, float)
    if not 0 < number < float("inf"):
        raise ArgumentTypeError(f"{text!r}; expected a number above 0")
    return number


def on_error(text: str) -> OnError:
    """A converter for what is done about a failing reward."""
    if text == "fail" or text == "skip":
        return text
    number = _parse(text, float)
    if not float("-inf") < number < float("inf"):
        raise ArgumentTypeError(f"{text!r}; expected fail, skip or a number")
    return number


def _parse(text: str, kind: type[int] | type[float]) -> float:
    try:
        return kind(text)
    except ValueError:
        return float("nan")


def _option(parser: ArgumentParser, name: str, text: str, default: Any = None, **rest: Any) -> None:
    shown = "" if default is None or rest.get("required") else f" (default: {default})"
    parser.add_argument(f"--{name}", help=text + shown, default=default, **rest)


def _model(parser: ArgumentParser) -> None:
    text = "'tiny' (the embedded model), a folder, or a hub id"
    _option(parser, "model", text, RunSettings.model)
    text = "CPU threads of matrix products (default: all cores; 1 for 'tiny')"
    _option(parser, "threads", text, type=at_least(1))


def _adapter(parser: ArgumentParser) -> None:
    text = "adapters to put on the model: a file, or a folder of mlx-lm or PEFT (default: none)"
    _option(parser, "adapter", text, type=Path, metavar="PATH")


def _task(parser: ArgumentParser) -> None:
    text = "a name that `textpolicy envs` lists, or FILE.py[:NAME] (default: --data's rows alone)"
    _option(parser, "env", text)
    text = "rows: a .jsonl, .csv or .parquet file, a saved dataset, hf:NAME (default: --env's)"
    _option(parser, "data", text, metavar="FILE")
    text = "template of the prompt over the columns of --data (default: the column 'prompt')"
    _option(parser, "prompt", text, metavar="TEXT")
    text = "your reward function, instead of the environment's own"
    _option(parser, "reward", text, metavar="FILE.py[:NAME]")
    _reward_limits(parser)
    text = "held-out tasks to measure on"
    _option(parser, "count", text, RunSettings.count, type=at_least(2))


def _reward_limits(parser: ArgumentParser) -> None:
    text = "seconds after which a reward is killed, in a process of its own (default: no limit)"
    _option(parser, "reward-timeout", text, type=positive, metavar="SECONDS")
    text = "when a reward fails: fail, skip the sample, or a number to score it (default: fail)"
    _option(parser, "on-reward-error", text, type=on_error, metavar="POLICY")


def _max_tokens(parser: ArgumentParser) -> None:
    text = "longest completion (default: what the task needs)"
    _option(parser, "max-tokens", text, type=at_least(1))


def _train(parser: ArgumentParser) -> None:
    _model(parser)
    _task(parser)
    text = "folder for the adapters, config and metrics (default: a new one in runs)"
    _option(parser, "output", text, type=Path, metavar="DIR")
    run = RunSettings
    text = "what is maximised: " + ", ".join(ALGORITHMS)
    _option(parser, "algorithm", text, run.algorithm, metavar="NAME")
    text = "weight of the KL divergence from the model without adapters; 0 is none"
    _option(parser, "beta", text, run.beta, type=at_least(0, float))
    _option(parser, "steps", "rounds of sampling and training", run.steps, type=at_least(1))
    text = "learning rate of Adam"
    _option(parser, "lr", text, run.lr, type=positive)
    text = "how the learning rate falls to 0 by the end, if it does"
    _option(parser, "schedule", text, run.schedule, choices=("constant", "linear", "cosine"))
    text = "updates over which the learning rate rises at the start"
    _option(parser, "warmup", text, run.warmup, type=at_least(0))
    text = "share of each weight, times the learning rate, that an update takes off"
    _option(parser, "weight-decay", text, run.weight_decay, type=at_least(0, float))
    _option(parser, "rank", "rank of the low-rank product", run.rank, type=at_least(1))
    _option(parser, "scale", "what multiplies the low-rank product", run.scale, type=positive)
    text = "quantize the frozen model to this many bits, QLoRA (default: no)"
    _option(parser, "quantize", text, type=int, choices=(2, 3, 4, 5, 6, 8))
    text = "completions of each task, compared with each other"
    _option(parser, "group-size", text, run.group_size, type=at_least(2))
    text = "tasks in each update"
    _option(parser, "groups-per-step", text, run.groups_per_step, type=at_least(1))
    text = "updates that a step's tasks are dealt to (default: the algorithm's, mostly 1)"
    _option(parser, "mini-batches", text, type=at_least(1))
    text = "times that a step goes through its rollouts"
    _option(parser, "epochs", text, run.epochs, type=at_least(1))
    text = (
        "rounds of sampling in which groups without signal are replaced; 1 is no replacement "
        f"(default: 1, and {DYNAMIC_ROUNDS} with dapo)"
    )
    _option(parser, "refill-rounds", text, type=at_least(1))
    text = "compute activations again in the backward pass: less memory, more time"
    parser.add_argument("--checkpoint-gradients", help=text, action="store_true")
    text = "rollouts in memory at once while training (default: all)"
    _option(parser, "micro-batch-size", text, type=at_least(1))
    _max_tokens(parser)
    text = "randomness of the sampled completions"
    _option(parser, "temperature", text, run.temperature, type=positive)
    _option(parser, "seed", "makes the run repeatable", run.seed, type=int)
    text = "end the run at the first alarm, and keep the adapter with the best rolling reward"
    parser.add_argument("--stop-on-collapse", help=text, action="store_true")
    text = "log to this project of Weights & Biases too; offline without an API key (default: no)"
    _option(parser, "wandb", text, metavar="PROJECT")


def _sft(parser: ArgumentParser) -> None:
    run = SFTSettings
    _model(parser)
    text = "a folder with train, valid and test as .jsonl or .txt, one file of rows, or hf:NAME"
    _option(parser, "data", text, required=True, metavar="DIR")
    text = "folder for the adapters, checkpoint, metrics and report (default: a new one in runs)"
    _option(parser, "output", text, type=Path, metavar="DIR")
    text = "go on with the run in --output, given with the options that it was begun with"
    parser.add_argument("--resume", help=text, action="store_true")
    _sft_data(parser, run)
    _sft_adapters(parser, run)
    _sft_course(parser, run)
    text = "log to this project of Weights & Biases too; offline without an API key (default: no)"
    _option(parser, "wandb", text, metavar="PROJECT")
    text = "log to event files of TensorBoard too, in the folder tensorboard of --output"
    parser.add_argument("--tensorboard", help=text, action="store_true")


def _sft_data(parser: ArgumentParser, run: type[SFTSettings]) -> None:
    text = "what of a row is learned: the answers, or everything"
    _option(parser, "learn", text, run.learn, choices=("answers", "everything"))
    text = "system message of conversations that have none (default: none)"
    _option(parser, "system", text, metavar="TEXT")
    text = "tokens at which a row is cut, which is reported, and the length of packed rows"
    _option(parser, "max-length", text, run.max_length, type=at_least(2))
    text = "share of the rows to validate on where the data has no valid part; 0 is none"
    _option(parser, "validation-share", text, run.validation_share, type=at_least(0, float))


def _sft_adapters(parser: ArgumentParser, run: type[SFTSettings]) -> None:
    text = "adapters to go on training, a file or a folder (default: fresh ones)"
    _option(parser, "adapter", text, metavar="PATH")
    text = "JSON of adapter options: rules, or those of mlx-lm or PEFT (instead of those below)"
    _option(parser, "adapter-config", text, metavar="FILE")
    text = "names of layers, such as q_proj,v_proj (default: every linear layer of the blocks)"
    _option(parser, "target-modules", text, metavar="NAMES")
    text = f"rank of the low-rank product (default: {RunSettings.rank})"
    _option(parser, "rank", text, type=at_least(1))
    text = "rank times the scale, as PEFT gives it (default: --scale)"
    _option(parser, "alpha", text, type=positive)
    text = f"what multiplies the low-rank product (default: {RunSettings.scale})"
    _option(parser, "scale", text, type=positive)
    text = "share of the adapters' inputs that is left out while training (default: 0)"
    _option(parser, "dropout", text, type=at_least(0, float))
    text = "quantize the frozen model to this many bits, QLoRA (default: no)"
    _option(parser, "quantize", text, type=int, choices=(2, 3, 4, 5, 6, 8))
    text = (
        "number format of the frozen model; adapters are float32 over any (default: the model's "
        "own, and float32 on a CPU, which computes in 16 bits many times slower)"
    )
    _option(parser, "dtype", text, choices=("float32", "bfloat16", "float16"))


def _sft_course(parser: ArgumentParser, run: type[SFTSettings]) -> None:
    text = "updates to take in all (default: 1000)"
    _option(parser, "iterations", text, type=at_least(1))
    text = "times to go through the data, instead of --iterations"
    _option(parser, "epochs", text, type=at_least(1))
    _option(parser, "batch-size", "rows in memory at once", run.batch_size, type=at_least(1))
    text = "batches whose gradients make one update"
    _option(parser, "accumulation", text, run.accumulation, type=at_least(1))
    text = "fill rows of --max-length tokens with several demonstrations, kept apart"
    parser.add_argument("--packing", help=text, action="store_true")
    text = "compute activations again in the backward pass: less memory, more time"
    parser.add_argument("--checkpoint-gradients", help=text, action="store_true")
    _option(parser, "lr", "learning rate of Adam", run.lr, type=positive)
    text = "how the learning rate falls to 0 by the end, if it does"
    _option(parser, "schedule", text, run.schedule, choices=("constant", "linear", "cosine"))
    text = "updates over which the learning rate rises at the start"
    _option(parser, "warmup", text, run.warmup, type=at_least(0))
    text = "share of each weight, times the learning rate, that an update takes off"
    _option(parser, "weight-decay", text, run.weight_decay, type=at_least(0, float))
    number = at_least(1)
    _option(parser, "steps-per-report", "updates in a report", run.steps_per_report, type=number)
    text = "updates from one validation to the next"
    _option(parser, "steps-per-eval", text, run.steps_per_eval, type=number)
    text = "batches to validate on; 0 is all"
    _option(parser, "validation-batches", text, run.validation_batches, type=at_least(0))
    _option(parser, "save-every", "updates from one save to the next", run.save_every, type=number)
    text = "validations in a row without a better loss that end the run (default: no limit)"
    _option(parser, "patience", text, type=number)
    _option(parser, "seed", "makes the run repeatable", run.seed, type=int)


def _demo(parser: ArgumentParser) -> None:
    _option(parser, "steps", "updates to take", DEMO.steps, type=at_least(1))
    _option(parser, "seed", "makes the run repeatable", DEMO.seed, type=int)
    parser.set_defaults(model=DEMO.model, threads=None)


def _generate(parser: ArgumentParser) -> None:
    _model(parser)
    _adapter(parser)
    _option(parser, "prompt", "what to say to the model", required=True, metavar="TEXT")
    text = "completions to sample (default: 1)"
    parser.add_argument("-n", help=text, default=1, type=at_least(1))
    number = at_least(0, float)
    _option(parser, "max-tokens", "longest completion", 256, type=at_least(1))
    _option(parser, "temperature", "randomness; 0 is greedy", 1.0, type=number)
    text = "draw from the likeliest tokens with this much probability together"
    _option(parser, "top-p", text, 1.0, type=number)
    _option(parser, "top-k", "draw from this many likeliest tokens; 0 is all", 0, type=at_least(0))
    text = "draw from tokens at least this probable, relative to the likeliest"
    _option(parser, "min-p", text, 0.0, type=number)
    text = "end at this text; may be given several times (default: none)"
    _option(parser, "stop", text, action="append", metavar="TEXT")
    _option(parser, "seed", "makes the sample repeatable (default: random)", type=int)


def _evaluate(parser: ArgumentParser) -> None:
    _model(parser)
    _adapter(parser)
    _task(parser)
    _max_tokens(parser)


def _plan(parser: ArgumentParser) -> None:
    _model(parser)
    text = "JSON of adapter options: rules, or those of mlx-lm or PEFT (instead of those below)"
    _option(parser, "adapter-config", text, type=Path, metavar="FILE")
    text = "adapt this many blocks from the end; -1 is all (default: -1)"
    _option(parser, "num-layers", text, type=int)
    text = "paths of layers to adapt, with commas between (default: every linear layer)"
    _option(parser, "keys", text, metavar="PATHS")
    _option(parser, "kind", "lora or dora (default: lora)", choices=("lora", "dora"))
    text = f"rank of the low-rank product (default: {RunSettings.rank})"
    _option(parser, "rank", text, type=at_least(1))
    text = f"what multiplies the low-rank product (default: {RunSettings.scale})"
    _option(parser, "scale", text, type=positive)


def _check(parser: ArgumentParser) -> None:
    text = "the reward to try (default: the one of --env)"
    parser.add_argument("reward", help=text, nargs="?", metavar="FILE.py[:NAME]")
    text = "rows to try it on: a .jsonl or .csv file (default: those of --env)"
    _option(parser, "data", text, metavar="FILE")
    _option(parser, "env", "an environment to try it on (default: none)", metavar="NAME")
    text = "column of right answers (default: gold, answer, solution, ... what there is)"
    _option(parser, "gold-column", text, metavar="NAME")
    text = "column of prompts (default: prompt, question, problem, ... what there is)"
    _option(parser, "prompt-column", text, metavar="NAME")
    _option(parser, "rows", "how many rows to try", 64, type=at_least(1))
    text = "sample this many completions a row, to see how often rewards differ (default: none)"
    _option(parser, "sample", text, type=at_least(2), metavar="N")
    text = "seconds after which the reward is killed, in its own process (default: no limit)"
    _option(parser, "reward-timeout", text, type=positive, metavar="SECONDS")
    _model(parser)
    _max_tokens(parser)


def _inspect(parser: ArgumentParser) -> None:
    text = "an adapter file, or a folder of mlx-lm or PEFT"
    parser.add_argument("path", help=text, type=Path, metavar="PATH")
    parser.set_defaults(model=None, threads=None)


def _envs(parser: ArgumentParser) -> None:
    text = "an environment to check and show, as --env takes it (default: list all)"
    parser.add_argument("env", nargs="?", help=text, metavar="ENV")
    _option(parser, "data", "rows for it (default: its own)", metavar="FILE")
    parser.set_defaults(model=None, threads=None)


def _doctor(parser: ArgumentParser) -> None:
    parser.set_defaults(model=None, threads=None)


_COMMANDS = {
    "demo": ("demo", "watch the embedded model learn addition", "textpolicy demo", _demo),
    "train": (
        "train",
        "train adapters by reinforcement learning, so that a reward goes up",
        "textpolicy train --env sort --steps 100 --output runs/sort",
        _train,
    ),
    "sft": (
        "sft",
        "train adapters on demonstrations: texts, prompts with completions, or conversations",
        "textpolicy sft --data my_data --epochs 3 --output runs/mine",
        _sft,
    ),
    "generate": (
        "generate",
        "sample completions of a prompt",
        "textpolicy generate --prompt '347+185=' --temperature 0 --adapter runs/add/"
        "adapters.safetensors",
        _generate,
    ),
    "eval": (
        "evaluate",
        "measure the greedy reward on held-out tasks, without and with adapters",
        "textpolicy eval --env add --adapter runs/add/adapters.safetensors",
        _evaluate,
    ),
    "plan": (
        "plan",
        "show which layers an adapter config would train, and the bytes they take",
        "textpolicy plan --model tiny --rank 8 --keys self_attn.q_proj,self_attn.v_proj",
        _plan,
    ),
    "check": (
        "check",
        "try a reward on right, wrong and empty answers before training on it",
        "textpolicy check my_reward.py --data rows.jsonl",
        _check,
    ),
    "inspect": (
        "inspect",
        "show what an adapter is: modules, ranks, scales, version, base",
        "textpolicy inspect runs/sort/adapters.safetensors",
        _inspect,
    ),
    "envs": (
        "envs",
        "list the ready environments, or check and show one",
        "textpolicy envs calculator",
        _envs,
    ),
    "doctor": ("doctor", "report what this installation runs on", "textpolicy doctor", _doctor),
}
