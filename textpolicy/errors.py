"""The errors that this library raises on purpose. Most are an error of the standard library too."""


class TextPolicyError(Exception):
    """Base class: a message says what was wrong, what was expected, and what to do next."""


class ConfigError(TextPolicyError, ValueError):
    """An option, or a combination of options, is not allowed."""


class ModelError(TextPolicyError, ValueError):
    """A model cannot be found, cannot be loaded, or cannot be used in this way."""


class AdapterError(TextPolicyError, ValueError):
    """Adapters do not fit the model, or a file does not hold complete adapters."""


class UnwritableError(AdapterError):
    """A file cannot be written: permission is missing, or the disk is full or absent."""


class ExportError(TextPolicyError, ValueError):
    """A format cannot hold what was trained, or what was written is not what was trained."""


class UploadError(TextPolicyError, RuntimeError):
    """The hub refused an upload, or the connection to it was lost."""


class RunInterruptedError(TextPolicyError, RuntimeError):
    """The machine ended the run. The run can be resumed from its checkpoint."""


class PromptError(TextPolicyError, ValueError):
    """The model cannot read a prompt: it is empty, too long, or rejected by the chat template."""


class RewardError(TextPolicyError, RuntimeError):
    """A reward function raised, or returned neither a finite number nor None."""


class TooManyFailuresError(RewardError):
    """So many of the last calls of rewards and environments failed that the run ends."""


class TaskError(TextPolicyError, ValueError):
    """An environment does not exist, breaks its contract, or has no more tasks."""


class DataError(TextPolicyError, ValueError):
    """A row of a data set cannot be read, or lacks a column that was asked for."""


class UnreadableError(TextPolicyError, ValueError):
    """A file is no regular file, is too large, or does not hold what was expected in it."""


class TrainingError(TextPolicyError, RuntimeError):
    """A training step is impossible, or would change nothing."""
