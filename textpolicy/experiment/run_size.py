"""How large a run is: the memory and the disk space that it takes, estimated from its config.

No weight is read. `textpolicy train --dry-run` shows the same numbers by which the start of a run
decides (`experiment/preflight.py`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import ceil
from typing import Any

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer

from textpolicy.adapters.merged_copy import check_mergeable, weight_format
from textpolicy.adapters.quantization.number_formats import NumberFormat
from textpolicy.config import SFTConfig, TrainConfig, changed, staleness_bound
from textpolicy.config.train import ModelOptions
from textpolicy.device_sizes import sizes_of
from textpolicy.environments import Dataset, Environment
from textpolicy.environments.agent_processes import DEFAULT_PROCESSES
from textpolicy.errors import ModelError
from textpolicy.experiment.assembly import (
    RunConfig,
    adapter_config,
    dtype_of,
    load_sft_data,
    quantization_of,
    sampling_of,
    template_arguments_of,
)
from textpolicy.experiment.run_time import plan_run_time, usual_lengths
from textpolicy.generation.model_files import find_model, read_architecture_file
from textpolicy.generation.policy import rollout_bytes
from textpolicy.generation.prompts import encode_prompt
from textpolicy.planning.adapter_plan import plan_adapters
from textpolicy.planning.memory_plan import MemoryPlan, plan_memory
from textpolicy.planning.time_plan import TimePlan
from textpolicy.planning.unloaded_model import build_unloaded_model, stored_dtype
from textpolicy.rewards.judge import asks_a_judge
from textpolicy.training.sft import SFTData
from textpolicy.types import Prompt

READ_PROMPTS = 64
"""Prompts that are tokenized to find the longest. Of rows of data, these are the longest texts."""
_CHARACTERS_A_TOKEN = 4
_SAMPLE_BYTES = 400  # of a row of samples.jsonl, beside its texts
_STEP_BYTES = 2500  # of a row of metrics.jsonl
_PROCESS_BYTES = 90_000_000  # of a rollout worker, beside its model: Python and its libraries


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """The most tokens of a prompt and of a completion; `read` is the number of prompts measured."""

    prompt: int
    completion: int
    read: int = 0
    usual: tuple[float, float] = (0.0, 0.0)
    """The tokens of a usual prompt and of a usual completion."""
    context: int | None = None
    """The most tokens that the model can read and write together, if it says so."""


@dataclass(frozen=True, kw_only=True)
class RunSize:
    """Estimates for one run. `memory` is None for a model whose memory is not known: `unknown`."""

    lengths: Lengths
    memory: MemoryPlan | None
    unknown: str = ""
    completions: int = 0
    """The most completions that are held at once, of a step or of a measurement."""
    samples_bytes: int = 0
    steps_bytes: int = 0
    checkpoints: int = 1
    evaluations: int = 0
    workers: int = 0
    worker_bytes: int = 0
    """The bytes of each rollout worker at its peak, its copy of the weights among them."""

    @property
    def peaks(self) -> dict[str, int]:
        """The bytes at the peak of each phase."""
        if self.memory is None:
            return {}
        peaks = self.memory.peaks
        return peaks if self.completions else {"training": peaks["training"]}

    @property
    def rollout_bytes(self) -> int:
        """The bytes of the completions of a step as Python objects."""
        return self.completions * rollout_bytes(self.lengths.prompt + self.lengths.completion)

    @property
    def memory_bytes(self) -> int:
        """The bytes that the run needs at once."""
        own = max(self.peaks.values(), default=0) + self.rollout_bytes
        return own + self.workers * self.worker_bytes

    @property
    def checkpoint_bytes(self) -> int:
        """The bytes of a checkpoint: the adapters and two moments of Adam."""
        return 3 * self._adapter_bytes

    @property
    def needed_disk_bytes(self) -> int:
        """The bytes without which no checkpoint can be kept: the new one beside the kept ones."""
        return (self.checkpoints + 1) * self.checkpoint_bytes + 3 * self._adapter_bytes

    @property
    def disk_bytes(self) -> int:
        """The bytes that the whole run writes."""
        rows = self.samples_bytes + self.steps_bytes
        return self.needed_disk_bytes + self.evaluations * self._adapter_bytes + rows

    @property
    def _adapter_bytes(self) -> int:
        return self.memory.arrays["adapters"].bytes if self.memory else 0


class SizeEstimator:
    """Estimates runs of one task and model with other numbers; reads files and prompts once."""

    def __init__(self, config: RunConfig, environment: Environment | None) -> None:
        self._config = config
        self._architecture = read_architecture(config.model)
        self._network = cache(self._build_network)
        self.data: SFTData | None = None
        """The rows of a supervised run."""
        if isinstance(config, TrainConfig):
            assert environment
            self._agents = agents_of(config, environment)
            self._has_judge = asks_a_judge(environment.reward)
            self._held_out = _count_held_out(environment, config.evaluation.count)
            self.lengths = _rl_lengths(config, environment, self._architecture)
        else:
            self.data = load_sft_data(config, read_tokenizer(config.model))
            self.lengths = _sft_lengths(config, self.data)

    def estimate(self, config: RunConfig) -> RunSize:
        """Return the size of the run with this config."""
        if isinstance(config, SFTConfig):
            return self._estimate_sft(config)
        rollout, run, evaluation = config.rollout, config.run, config.evaluation
        lengths = self.lengths
        if config.sampling.max_tokens:
            lengths = replace(lengths, completion=config.sampling.max_tokens)
        step = rollout.groups_per_step * rollout.group_size
        measured = min(self._held_out, evaluation.count) * max(1, evaluation.samples)
        groups = rollout.groups_per_step
        groups = groups if run.sample_groups is None else min(run.sample_groups, groups)
        text = _CHARACTERS_A_TOKEN * (lengths.prompt + lengths.completion)
        return self._size(
            workers=rollout.workers_here,
            worker_bytes=self._worker_bytes(config, lengths) if rollout.workers_here else 0,
            plan=lambda: self._plan_rl(config, lengths),
            lengths=lengths,
            completions=max(step * _steps_in_memory(config), measured),
            samples_bytes=run.steps * groups * rollout.group_size * (_SAMPLE_BYTES + text),
            steps_bytes=run.steps * _STEP_BYTES,
            checkpoints=run.keep_checkpoints,
            # Beside the best one; the oldest are removed.
            evaluations=1 + run.keep_adapters,
        )

    def check_merging(self, config: TrainConfig) -> None:
        """Raise `ConfigError` if `merge_adapters` is on and an adapted weight is not float32."""
        if not config.sampling.merge_adapters:
            return
        network = self._network()
        modules = dict(network.named_modules())
        rows = plan_adapters(network, adapter_config(config.adapter)).modules
        adapted = [row for row in rows if row.kind != "none"]
        check_mergeable(
            {row.path: row.quantization or weight_format(modules[row.path]) for row in adapted}
        )

    def plan_time(self, config: TrainConfig, steps_done: int = 0) -> TimePlan:
        """Return how long the steps take that are not done; times products of the model now."""
        time = plan_run_time(
            config,
            self._network(),
            self._architecture,
            usual=self.lengths.usual,
            held_out=self._held_out,
            steps_done=steps_done,
        )
        return replace(time, beside="the judge") if self._has_judge else time

    def _estimate_sft(self, config: SFTConfig) -> RunSize:
        steps = (config.trainer.iterations or 1000) // config.run.steps_per_report
        return self._size(
            lambda: self._plan_sft(config), lengths=self.lengths, steps_bytes=steps * _STEP_BYTES
        )

    def _size(self, plan: Callable[[], MemoryPlan], **numbers: Any) -> RunSize:
        try:
            return RunSize(memory=plan(), **numbers)
        except ModelError as error:
            return RunSize(memory=None, unknown=str(error), **numbers)

    def _plan_rl(self, config: TrainConfig, lengths: Lengths) -> MemoryPlan:
        tokens = {"prompt_tokens": lengths.prompt, "completion_tokens": lengths.completion}
        return plan_step(config, tokens | self._agents, self._network())

    def _worker_bytes(self, config: TrainConfig, lengths: Lengths) -> int:
        """Return the bytes of a worker that samples its share of a step."""
        groups = ceil(config.rollout.groups_per_step / config.rollout.workers)
        share = changed(config, {"rollout.groups_per_step": groups})
        try:
            sampling = self._plan_rl(share, lengths).peaks["sampling"]
        except ModelError:
            return _PROCESS_BYTES
        completions = groups * config.rollout.group_size
        held = completions * rollout_bytes(lengths.prompt + lengths.completion)
        return _PROCESS_BYTES + sampling + held

    def _plan_sft(self, config: SFTConfig) -> MemoryPlan:
        trainer = config.trainer
        rows = trainer.batch_size * (2 if trainer.accumulation > 1 else 1)
        return plan_memory(
            self._network(),
            adapter_config(config.adapter),
            batch=rows,
            micro_batch_size=trainer.batch_size,
            checkpoint_gradients=trainer.checkpoint_gradients,
            prompt_tokens=self.lengths.prompt,
            completion_tokens=self.lengths.completion,
            stored=stored_dtype(self._architecture),
            sizes=sizes_of(config.sizes),
        )

    def _build_network(self) -> nn.Module:
        return build_unloaded_model(self._architecture, dtype_of(self._config.model))


def plan_step(
    config: TrainConfig, lengths: Mapping[str, int], network: nn.Module | None = None
) -> MemoryPlan:
    """Return the memory plan of a step; raise ModelError for a model whose memory is not known.

    `lengths` are arguments of `plan_memory`: `prompt_tokens`, `completion_tokens`, and of agents
    the `segments` of a rollout and the number of `agents`.
    """
    rollout, trainer, reference = config.rollout, config.trainer, config.algorithm.reference
    other = None if reference in (None, "base") else ModelOptions(name=reference)
    return plan_memory(
        network or read_architecture(config.model),
        adapter_config(config.adapter),
        batch=rollout.groups_per_step * rollout.group_size,
        group_size=rollout.group_size,
        micro_batch_size=trainer.micro_batch_size,
        checkpoint_gradients=trainer.checkpoint_gradients,
        dtype=dtype_of(config.model),
        stored=stored_dtype(read_architecture(config.model)),
        reference=read_architecture(other) if other else None,
        sizes=sizes_of(config.sizes),
        merge_adapters=config.sampling.merge_adapters,
        **lengths,
    )


def read_architecture(options: ModelOptions) -> dict[str, Any]:
    """Return the content of the model's config.json, quantized as the options say."""
    architecture = read_architecture_file(find_model(options.name))
    quantization = quantization_of(options)
    if quantization is None:
        return architecture
    return architecture | {"quantization": NumberFormat(**quantization).options()}


def has_turns(environment: Environment) -> bool:
    """Return whether an episode may have several turns."""
    return has_agent(environment) or replies_within(environment)


def replies_within(environment: Environment) -> bool:
    """Return whether rows continue after replies, for which sampling holds more caches."""
    return any(task.env is not None for task in environment.heldout(1))


def has_agent(environment: Environment) -> bool:
    """Return whether an agent plays the episodes."""
    return any(task.agent is not None for task in environment.heldout(1))


def agents_of(config: TrainConfig, environment: Environment) -> dict[str, int]:
    """Return how many rollouts agents play at once, as `plan_step` takes it."""
    if not has_agent(environment):
        return {}
    return {"agents": config.task.agent_processes or DEFAULT_PROCESSES}


def read_tokenizer(options: ModelOptions) -> TokenizerWrapper:
    """Return the tokenizer of a model whose weights are not read."""
    folder = find_model(options.name)
    try:
        return load_tokenizer(folder, {"trust_remote_code": False})
    except (ValueError, TypeError, KeyError, RuntimeError, OSError) as error:
        raise ModelError(
            f"cannot load the tokenizer in {folder}: {error}. Download the model again"
        ) from error


def _rl_lengths(
    config: TrainConfig, environment: Environment, architecture: dict[str, Any]
) -> Lengths:
    tokenizer, prompts = read_tokenizer(config.model), _longest_prompts(environment)
    context = architecture.get("max_position_embeddings") or architecture.get("n_positions")
    options: dict[str, Any] = {
        "allow_special_tokens": config.model.allow_special_tokens,
        "chat_template_kwargs": template_arguments_of(config.model, tokenizer),
    }

    def encode(prompt: Prompt) -> int:
        return len(encode_prompt(tokenizer, prompt, **options))

    most = sampling_of(config, environment).max_tokens
    return Lengths(
        prompt=max(map(encode, prompts)),
        completion=most,
        read=len(prompts),
        usual=usual_lengths(environment, encode, lambda text: len(tokenizer.encode(text)), most),
        context=context if isinstance(context, int) else None,
    )


def _sft_lengths(config: SFTConfig, data: SFTData) -> Lengths:
    rows = [*data.train, *data.valid]
    longest = (
        config.data.max_length if config.data.packing else max(len(row.tokens) for row in rows)
    )
    return Lengths(prompt=1, completion=longest - 1, read=len(rows))


def _count_held_out(environment: Environment, count: int) -> int:
    tasks = environment.tasks
    return min(count, len(tasks.held_out)) if isinstance(tasks, Dataset) else count


def _longest_prompts(environment: Environment) -> Sequence[Prompt]:
    """Return the longest prompts of rows of data, or the first held-out prompts."""
    tasks = environment.tasks
    if not isinstance(tasks, Dataset):
        return [task.asked for task in environment.heldout(READ_PROMPTS)]
    prompts = [task.asked for task in (*tasks.train, *tasks.held_out)]
    return sorted(prompts, key=_count_characters, reverse=True)[:READ_PROMPTS]


def _count_characters(prompt: Prompt) -> int:
    texts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
    return sum(map(len, texts))


def _steps_in_memory(config: TrainConfig) -> int:
    """Return for how many steps there are groups at the same time."""
    rollout = config.rollout
    return 1 + staleness_bound(rollout.max_staleness, rollout.steps_per_generation)
