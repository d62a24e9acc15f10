"""Every option of a run, declared once: default, check, help, TOML. Imports nothing heavy."""

from textpolicy.config.settings import changed, settings_of
from textpolicy.config.sft import SFTConfig
from textpolicy.config.toml import check_can_be_read_back, config_from, read_toml, to_toml
from textpolicy.config.train import (
    ALGORITHMS,
    DEMO,
    DYNAMIC_ROUNDS,
    TrainConfig,
    staleness_bound,
)

__all__ = [
    "ALGORITHMS",
    "DEMO",
    "DYNAMIC_ROUNDS",
    "SFTConfig",
    "TrainConfig",
    "changed",
    "check_can_be_read_back",
    "config_from",
    "read_toml",
    "settings_of",
    "staleness_bound",
    "to_toml",
]
