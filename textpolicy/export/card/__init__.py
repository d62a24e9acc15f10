"""The model card of an export: a README.md with the front matter of the hub, and a picture."""

from textpolicy.export.card.result import PICTURE
from textpolicy.export.card.writing import CARD, write_card

__all__ = ["CARD", "PICTURE", "write_card"]
