"""Groups in, fresh groups out."""

from collections.abc import Iterable

from textpolicy.types import RolloutGroup


class Buffer:
    """Holds rollout groups between sampling and training, and knows how stale each one is.

    A group's staleness is how many adapter versions the trainer has made since its oldest member
    was sampled. `take` drops what is staler than `max_staleness` and counts it in `dropped`.
    """

    def __init__(self, max_staleness: int = 0) -> None:
        self.max_staleness = max_staleness
        self.dropped = 0
        self._groups: list[RolloutGroup] = []

    def __len__(self) -> int:
        return len(self._groups)

    def extend(self, groups: Iterable[RolloutGroup]) -> None:
        """Add groups, oldest first."""
        self._groups.extend(groups)

    def take(self, version: int, limit: int | None = None) -> list[RolloutGroup]:
        """Remove and return up to `limit` groups that are fresh enough for `version`."""
        fresh = [g for g in self._groups if version - g.version <= self.max_staleness]
        self.dropped += len(self._groups) - len(fresh)
        limit = len(fresh) if limit is None else limit
        self._groups = fresh[limit:]
        return fresh[:limit]
