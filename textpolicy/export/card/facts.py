"""What all parts of a model card are made from."""

from dataclasses import dataclass

from textpolicy.adapters.files.inspection import AdapterSummary
from textpolicy.export.format_facts import FORMAT_FACTS, FormatFacts
from textpolicy.export.run_facts import RunFacts
from textpolicy.export.source import Source


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """An export, its adapter and base, and the run that trained the adapter, if it is known."""

    name: str
    format: str
    source: Source
    adapter: AdapterSummary
    run: RunFacts | None
    base: str | None

    @property
    def facts(self) -> FormatFacts:
        return FORMAT_FACTS[self.format]

    @property
    def was_chosen_by_score(self) -> bool:
        """Whether the run kept this adapter because its held-out score was the best."""
        directory, run = self.source.directory, self.run
        if directory is None or run is None or self.source.adapter != directory.best:
            return False
        return directory.best_is_measured

    @property
    def base_name(self) -> str:
        return self.base or self.source.model_name
