"""Every error this library raises on purpose: ours, and the standard library's kind beside it."""


class TextPolicyError(Exception):
    """Base of all deliberate errors. The message says what, got, expected and what to do next."""


class ConfigError(TextPolicyError, ValueError):
    """An option, or a combination of options, that cannot be honoured."""


class ModelError(TextPolicyError, ValueError):
    """A model that cannot be found, loaded or used as asked."""


class AdapterError(TextPolicyError, ValueError):
    """Adapters that do not fit the model, or a file that is not a whole adapter."""


class UnwritableError(AdapterError):
    """A file that could not be written: no permission, no room, no such disk."""


class RunInterruptedError(TextPolicyError, RuntimeError):
    """A run that the machine ended, and that goes on from its checkpoint when it can."""


class PromptError(TextPolicyError, ValueError):
    """A prompt the model cannot be given: empty, too long, or with ids outside the vocabulary."""


class RewardError(TextPolicyError, RuntimeError):
    """A reward function that raised, or returned something that is not a finite number or None."""


class TaskError(TextPolicyError, ValueError):
    """An environment that does not exist, or whose tasks break its contract."""


class DataError(TextPolicyError, ValueError):
    """Rows that cannot be read, or that lack a column that was asked for."""


class TrainingError(TextPolicyError, RuntimeError):
    """A training step that cannot be taken, or that would change nothing."""
