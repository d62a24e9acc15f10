"""Supervised fine-tuning: training on demonstrations."""

from textpolicy.training.sft.batches import BatchStream
from textpolicy.training.sft.data import SFTData, load_data, load_examples
from textpolicy.training.sft.demonstrations import Demonstration, Encoding
from textpolicy.training.sft.loss import sft_loss
from textpolicy.training.sft.parameters import (
    SaveReport,
    SFTEvent,
    SFTParameters,
    TrainReport,
    ValidationReport,
)
from textpolicy.training.sft.train import SFTResult, evaluate_sft, iterations_of, train_sft

__all__ = [
    "BatchStream",
    "Demonstration",
    "Encoding",
    "SFTData",
    "SFTEvent",
    "SFTParameters",
    "SFTResult",
    "SaveReport",
    "TrainReport",
    "ValidationReport",
    "evaluate_sft",
    "iterations_of",
    "load_data",
    "load_examples",
    "sft_loss",
    "train_sft",
]
