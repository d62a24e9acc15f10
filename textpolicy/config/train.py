"""The config of a run of reinforcement learning, and the config of the demo."""

from dataclasses import dataclass, field

from textpolicy.config.sections import (
    AdapterOptions,
    AlgorithmOptions,
    EvaluationOptions,
    ModelOptions,
    RolloutOptions,
    RunOptions,
    SamplingOptions,
    TaskOptions,
    TrackingOptions,
    TrainerOptions,
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run of reinforcement learning."""

    task: TaskOptions = field(default_factory=TaskOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    algorithm: AlgorithmOptions = field(default_factory=AlgorithmOptions)
    trainer: TrainerOptions = field(default_factory=TrainerOptions)
    rollout: RolloutOptions = field(default_factory=RolloutOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    tracking: TrackingOptions = field(default_factory=TrackingOptions)
    run: RunOptions = field(default_factory=RunOptions)


DEMO = TrainConfig(task=TaskOptions(env="add"), run=RunOptions(steps=400))
