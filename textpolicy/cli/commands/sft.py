"""`textpolicy sft`: supervised training of adapters on rows of text."""

import sys
import time
from argparse import Namespace
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from textpolicy.cli.answer import Report
from textpolicy.cli.flags import configured
from textpolicy.cli.resuming import WATCHING, taken_up, to_go_on
from textpolicy.config import SFTConfig, to_toml
from textpolicy.errors import ConfigError
from textpolicy.experiment.assembly import adapt, dtype_of, optimizer_of
from textpolicy.experiment.recording import plain, tracker_of
from textpolicy.experiment.signals import StopRequest, stopping
from textpolicy.experiment.threads import use_threads
from textpolicy.generation.mlx_generation import load_model
from textpolicy.runs import RunDirectory, claim, new_directory
from textpolicy.tracking.console import Console, terminal_safe
from textpolicy.tracking.jsonl import read_metrics
from textpolicy.tracking.report import write_report
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

ITERATIONS = 1000
# What may change when a run goes on: how it is watched, and how long it is.
FREE = WATCHING | {
    "run.steps_per_report",
    "run.steps_per_eval",
    "run.validation_batches",
    "run.save_every",
    "trainer.iterations",
    "trainer.epochs",
    "trainer.patience",
}
# What decides which rows an update has: a checkpoint is gone on with where all of it is the same.
FIXED = frozenset(
    {"trainer.batch_size", "trainer.accumulation", "data.packing", "run.seed", "data"}
)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run achieved; losses are means over the tokens that are learned."""

    result: SFTResult
    test_loss: float | None
    seconds: float
    data: SFTData
    parameters: SFTParameters
    request: StopRequest


def run(options: Namespace) -> Report:
    directory = None
    if options.resume:
        config, directory = taken_up(SFTConfig(), options, FREE, FIXED)
    else:
        config = configured(SFTConfig(), options)
    use_threads(config.model)
    source = config.data.source
    if source is None:
        raise ConfigError("there is nothing to learn from: name rows of text, --data DIR")
    if options.dry_run:
        return Report(data={"config": plain(config)}, text=to_toml(config))
    if directory is None:
        output = config.run.output
        directory = RunDirectory(output) if output else new_directory(Path(source).stem)
        claim(directory)
    with (
        closing(Console(sys.stderr, config.trainer.iterations or ITERATIONS)) as console,
        directory.lock(),
        to_go_on(directory, "sft"),
    ):
        outcome = _train(config, source, directory, console)
    write_report([directory.path])
    return Report(
        data=_data(outcome, directory),
        text=_text(outcome, directory),
        exit_code=outcome.request.exit_code,
    )


def _train(config: SFTConfig, source: str, directory: RunDirectory, console: Console) -> Outcome:
    started = time.perf_counter()
    directory.remove_partial_files()
    model, tokenizer = load_model(config.model.name, dtype=dtype_of(config.model))
    data = data_of(config, source, tokenizer)
    console.note(terminal_safe(str(data)))
    adapt(model, config.adapter, config.model, config.run.seed)
    parameters = parameters_of(config, directory, data)
    checkpoint = parameters.checkpoint_file
    resume = checkpoint if checkpoint and checkpoint.exists() else None
    resume_step = checkpoint_iteration(resume) + 1 if resume else 0
    optimizer = optimizer_of(config.trainer, parameters.iterations)
    noted = resume is None
    if noted:
        directory.write_config(to_toml(config))
    mx.random.seed(config.run.seed)
    mx.reset_peak_memory()
    tracking = tracker_of(config, directory, console, resume_step=resume_step, sample_groups=0)
    with tracking as tracker, stopping(console.note) as request:

        def on_progress(event: Event) -> Progress:
            nonlocal noted
            if not noted:
                # Of a run that is gone on with: only now is it known to take these options.
                directory.write_config(to_toml(config))
                noted = True
            console.note(str(event))
            if metrics := _metrics(event):
                tracker.write(event.iteration, metrics)
            return Progress.STOP if request.signal else Progress.MORE

        result = train_sft(
            model,
            data.train,
            data.valid,
            optimizer,
            parameters=parameters,
            resume=resume,
            on_progress=on_progress,
        )
    test = (
        evaluate_sft(model, data.test, batch_size=config.trainer.batch_size) if data.test else None
    )
    return Outcome(
        result=result,
        test_loss=test,
        seconds=time.perf_counter() - started,
        data=data,
        parameters=parameters,
        request=request,
    )


def data_of(config: SFTConfig, source: str, tokenizer: TokenizerWrapper) -> SFTData:
    """The rows of `source`, as tokens, in their parts."""
    encoding = Encoding(
        tokenizer=tokenizer,
        learn=config.data.learn,
        system=config.data.system,
        max_length=config.data.max_length,
    )
    return load_data(source, encoding, validation_share=config.data.validation_share)


def parameters_of(config: SFTConfig, directory: RunDirectory, data: SFTData) -> SFTParameters:
    """What `train_sft` is told; epochs are so many updates on these data."""
    trainer, run = config.trainer, config.run

    def parameters(iterations: int) -> SFTParameters:
        return SFTParameters(
            batch_size=trainer.batch_size,
            iterations=iterations,
            steps_per_report=run.steps_per_report,
            steps_per_eval=run.steps_per_eval,
            validation_batches=run.validation_batches,
            save_every=run.save_every,
            adapter_path=directory.latest,
            best_path=directory.best,
            checkpoint_path=directory.checkpoints / "latest.safetensors",
            accumulation=trainer.accumulation,
            packing=config.data.packing,
            max_length=config.data.max_length,
            checkpoint_gradients=trainer.checkpoint_gradients,
            patience=trainer.patience,
            seed=run.seed,
        )

    if trainer.epochs is None:
        return parameters(trainer.iterations or ITERATIONS)
    return parameters(iterations_of(trainer.epochs, data.train, parameters(0)))


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


def _facts(outcome: Outcome, directory: RunDirectory) -> dict[str, object]:
    """What a person wants to know of a finished run."""
    result = outcome.result
    rows = read_metrics(directory.metrics)
    losses = [row["validation/loss"] for row in rows if "validation/loss" in row]
    how = {"finished": "", "stopped": " (stopped)", "early": " (out of patience)"}[result.ended]
    facts: dict[str, object] = {
        "data": outcome.data,
        "iterations": f"{result.iteration}{how} in {outcome.seconds:.0f} s",
    }
    if result.validation_loss is not None:
        # A file that could not be written to has none.
        before = f"{losses[0]:.4f} before, " if losses else ""
        facts["validation loss"] = f"{before}{result.validation_loss:.4f} after"
    if outcome.test_loss is not None:
        facts["test loss"] = f"{outcome.test_loss:.4f}"
    facts["adapters"] = directory.latest
    if result.best_loss is not None:
        facts["best adapters"] = (
            f"{outcome.parameters.best_file} (validation loss {result.best_loss:.4f} after "
            f"{result.best_iteration} iterations)"
        )
    return facts


def _text(outcome: Outcome, directory: RunDirectory) -> str:
    facts = _facts(outcome, directory) | {"report": directory.report}
    if outcome.request.signal:
        facts["stopped"] = outcome.request.farewell(directory.path, "sft")
    return "\n".join(f"{name}: {terminal_safe(str(value))}" for name, value in facts.items())


def _data(outcome: Outcome, directory: RunDirectory) -> dict[str, Any]:
    best = outcome.parameters.best_file if outcome.result.best_loss is not None else None
    return asdict(outcome.result) | {
        "test_loss": outcome.test_loss,
        "truncated": outcome.data.truncated,
        "dropped": outcome.data.dropped,
        "seconds": outcome.seconds,
        "adapters": str(directory.latest),
        "best_adapters": best and str(best),
        "report": str(directory.report),
    }
