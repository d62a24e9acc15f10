"""`textpolicy sft`: supervised training of adapters on rows of text."""

import json
import sys
import time
from argparse import Namespace
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from textpolicy.adapters.config import AdapterConfig
from textpolicy.adapters.container import AdapterContainer
from textpolicy.adapters.quantization import quantize
from textpolicy.cli.experiment import ADAPTERS, METRICS, claim, fresh_folder
from textpolicy.cli.options import RunSettings, SFTSettings
from textpolicy.cli.plan import read_config
from textpolicy.cli.report import Report
from textpolicy.errors import ConfigError
from textpolicy.generation.mlx_generation import load_model
from textpolicy.tracking.console import Console, visible
from textpolicy.tracking.html_report import write_html_report
from textpolicy.tracking.jsonl import MetricsFile, forget_after, read_metrics
from textpolicy.tracking.sink import Sink
from textpolicy.tracking.tensorboard import TensorBoardRun
from textpolicy.tracking.wandb_run import WandbRun
from textpolicy.training.optimizer import build_optimizer
from textpolicy.training.sft import (
    Encoding,
    Event,
    SFTData,
    SFTParameters,
    SFTResult,
    TrainReport,
    ValidationReport,
    evaluate_sft,
    iterations_of,
    load_data,
    train_sft,
)
from textpolicy.training.sft.checkpoint import checkpoint_iteration
from textpolicy.types import Metrics, Progress

CONFIG = "config.json"
REPORT = "report.html"
ITERATIONS = 1000
# What may change when a run goes on: how it is watched, and how long it is.
_FREE = {
    *(
        "iterations",
        "epochs",
        "steps_per_report",
        "steps_per_eval",
        "validation_batches",
        "save_every",
    ),
    *("patience", "wandb", "tensorboard"),
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run achieved; losses are means over the tokens that are learned."""

    result: SFTResult
    test_loss: float | None
    seconds: float
    data: SFTData
    parameters: SFTParameters


def run(options: Namespace) -> Report:
    settings = SFTSettings(**{f.name: getattr(options, f.name) for f in fields(SFTSettings)})
    if settings.iterations and settings.epochs:
        raise ConfigError("both --iterations and --epochs are given; expected one of them")
    output = options.output or fresh_folder(Path(settings.data).stem)
    if options.resume:
        _check_same(output, settings)
    else:
        claim(output)
    with closing(Console(sys.stderr, settings.iterations or ITERATIONS)) as console:
        outcome = _train(settings, output, console, resume=options.resume)
    _write_report(outcome, settings, output)
    return Report(data=_data(outcome, output), text=_text(outcome, output))


def _train(settings: SFTSettings, output: Path, console: Console, *, resume: bool) -> Outcome:
    started = time.perf_counter()
    dtype: mx.Dtype | None = getattr(mx, settings.dtype) if settings.dtype else None
    model, tokenizer = load_model(settings.model, dtype=dtype)
    data = _load(settings, tokenizer)
    console.note(visible(str(data)))
    _adapt(model, settings)
    parameters = _parameters(settings, output, data)
    checkpoint = parameters.checkpoint_file if resume else None
    if checkpoint:
        forget_after(output / METRICS, checkpoint_iteration(checkpoint))
    else:
        (output / METRICS).unlink(missing_ok=True)
    (output / CONFIG).write_text(json.dumps(asdict(settings), indent=2) + "\n", "utf-8")
    mx.random.seed(settings.seed)
    mx.reset_peak_memory()
    with ExitStack() as opened:
        sinks = [opened.enter_context(closing(sink)) for sink in _sinks(settings, output)]

        def on_progress(event: Event) -> Progress:
            console.note(str(event))
            for sink in sinks if (metrics := _metrics(event)) else []:
                sink.write(event.iteration, metrics)
            return Progress.MORE

        result = train_sft(
            model,
            data.train,
            data.valid,
            build_optimizer(
                settings.lr,
                schedule=settings.schedule,
                warmup=settings.warmup,
                updates=parameters.iterations,
                weight_decay=settings.weight_decay,
            ),
            parameters=parameters,
            resume=checkpoint,
            on_progress=on_progress,
        )
    test = evaluate_sft(model, data.test, batch_size=settings.batch_size) if data.test else None
    return Outcome(
        result=result,
        test_loss=test,
        seconds=time.perf_counter() - started,
        data=data,
        parameters=parameters,
    )


def _load(settings: SFTSettings, tokenizer: TokenizerWrapper) -> SFTData:
    encoding = Encoding(
        tokenizer=tokenizer,
        learn=settings.learn,
        system=settings.system,
        max_length=settings.max_length,
    )
    return load_data(settings.data, encoding, validation_share=settings.validation_share)


def _adapt(model: nn.Module, settings: SFTSettings) -> AdapterContainer:
    """Fresh adapters on the model, or those of a file."""
    words = ("adapter_config", "target_modules", "rank", "alpha", "scale", "dropout")
    given = [f"--{w.replace('_', '-')}" for w in words if getattr(settings, w) is not None]
    if settings.adapter and (given or settings.quantize):
        raise ConfigError(
            f"--adapter is given beside {given or ['--quantize']}; adapters of a file bring their "
            "own config, and the base that they were made over"
        )
    if settings.adapter:
        return AdapterContainer.from_directory(settings.adapter).load(model)
    if settings.quantize:
        quantize(model, bits=settings.quantize)
    return AdapterContainer.from_model(model, _adapter_config(settings, given), seed=settings.seed)


def _adapter_config(settings: SFTSettings, given: list[str]) -> AdapterConfig:
    if settings.adapter_config:
        if others := [name for name in given if name != "--adapter-config"]:
            raise ConfigError(f"--adapter-config is given beside {others}; put them in the file")
        return read_config(Path(settings.adapter_config))
    if settings.alpha is not None and settings.scale is not None:
        raise ConfigError("both --alpha and --scale are given; alpha is rank times the scale")
    rank = settings.rank or RunSettings.rank
    scale = RunSettings.scale if settings.scale is None else settings.scale
    alpha = rank * scale if settings.alpha is None else settings.alpha
    dropout = settings.dropout or 0.0
    if not settings.target_modules:
        return AdapterConfig(rank=rank, scale=alpha / rank, dropout=dropout)
    return AdapterConfig.from_dict(
        {
            "target_modules": settings.target_modules.split(","),
            "r": rank,
            "lora_alpha": alpha,
            "lora_dropout": dropout,
        }
    )


def _parameters(settings: SFTSettings, output: Path, data: SFTData) -> SFTParameters:
    def parameters(iterations: int) -> SFTParameters:
        names = {f.name for f in fields(SFTParameters)} & {f.name for f in fields(SFTSettings)}
        shared = {name: getattr(settings, name) for name in names - {"iterations"}}
        return SFTParameters(**shared, iterations=iterations, adapter_path=output / ADAPTERS)

    if settings.epochs is None:
        return parameters(settings.iterations or ITERATIONS)
    return parameters(iterations_of(settings.epochs, data.train, parameters(0)))


def _check_same(output: Path, settings: SFTSettings) -> None:
    """Refuse to go on with a run that was begun otherwise."""
    path = output / CONFIG
    if not path.is_file():
        raise ConfigError(f"{output} holds no run to go on with; start it without --resume")
    then, now = json.loads(path.read_text("utf-8")), asdict(settings)
    differing = [
        f"{name} was {then.get(name)!r} and is {value!r}"
        for name, value in now.items()
        if name not in _FREE and then.get(name) != value
    ]
    if differing:
        raise ConfigError(
            f"the run in {output} was begun with other options: {'; '.join(differing)}. Give those "
            "again, or start another run"
        )


def _sinks(settings: SFTSettings, output: Path) -> list[Sink]:
    sinks: list[Sink] = [MetricsFile(output / METRICS)]
    if settings.wandb:
        sinks.append(WandbRun(settings.wandb, folder=output, config=asdict(settings)))
    if settings.tensorboard:
        sinks.append(TensorBoardRun(output / "tensorboard"))
    return sinks


def _metrics(event: Event) -> Metrics:
    if isinstance(event, TrainReport):
        return {
            "loss": event.loss,
            "learning_rate": event.learning_rate,
            "iterations_per_second": event.iterations_per_second,
            "tokens_per_second": event.tokens_per_second,
            "memory/peak_gb": mx.get_peak_memory() / 1e9,
        }
    if isinstance(event, ValidationReport):
        return {"validation/loss": event.loss, "time/validation": event.seconds}
    return {}


def _write_report(outcome: Outcome, settings: SFTSettings, output: Path) -> None:
    write_html_report(
        output / REPORT,
        f"Supervised training of {settings.model} on {settings.data}",
        plots={"loss": ["loss", "validation/loss"], "learning rate": ["learning_rate"]},
        rows=read_metrics(output / METRICS),
        facts=_facts(outcome, output),
        settings=asdict(settings),
    )


def _facts(outcome: Outcome, output: Path) -> dict[str, object]:
    """What a person wants to know of a finished run."""
    result = outcome.result
    losses = [
        r["validation/loss"] for r in read_metrics(output / METRICS) if "validation/loss" in r
    ]
    how = {"finished": "", "stopped": " (stopped)", "early": " (out of patience)"}[result.ended]
    facts: dict[str, object] = {
        "data": outcome.data,
        "iterations": f"{result.iteration}{how} in {outcome.seconds:.0f} s",
    }
    if result.validation_loss is not None:
        facts["validation loss"] = f"{losses[0]:.4f} before, {result.validation_loss:.4f} after"
    if outcome.test_loss is not None:
        facts["test loss"] = f"{outcome.test_loss:.4f}"
    facts["adapters"] = output / ADAPTERS
    if result.best_loss is not None:
        facts["best adapters"] = (
            f"{outcome.parameters.best_file} (validation loss {result.best_loss:.4f} after "
            f"{result.best_iteration} iterations)"
        )
    return facts


def _text(outcome: Outcome, output: Path) -> str:
    facts = _facts(outcome, output) | {"report": output / REPORT}
    return "\n".join(f"{name}: {visible(str(value))}" for name, value in facts.items())


def _data(outcome: Outcome, output: Path) -> dict[str, Any]:
    best = outcome.parameters.best_file if outcome.result.best_loss is not None else None
    return asdict(outcome.result) | {
        "test_loss": outcome.test_loss,
        "truncated": outcome.data.truncated,
        "dropped": outcome.data.dropped,
        "seconds": outcome.seconds,
        "adapters": str(output / ADAPTERS),
        "best_adapters": best and str(best),
        "report": str(output / REPORT),
    }
