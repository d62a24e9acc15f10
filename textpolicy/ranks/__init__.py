"""Ranks: the processes that train one model together, on one machine or on several."""

from textpolicy.ranks.group import ALONE, Ranks
from textpolicy.ranks.joining import join_ranks

__all__ = ["ALONE", "Ranks", "join_ranks"]
