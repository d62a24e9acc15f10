"""Which problems are held out: a hash of the problem decides, so every run holds out the same."""

from collections.abc import Collection
from hashlib import blake2b

# One problem in four is held out, so that an environment with few problems has held-out ones too.
HELD_OUT_ONE_IN = 4
HELD_OUT_SEED = 2024
DRAWS_PER_HELD_OUT_TASK = 20


def is_held_out(problem: str) -> bool:
    """Return whether the hash of the problem is in the part that is held out."""
    return blake2b(problem.encode(), digest_size=1).digest()[0] < 256 // HELD_OUT_ONE_IN


def choose_held_out(candidates: Collection[str], *, of: int) -> frozenset[str]:
    """Return the candidates with the smallest hashes: one for every four of `of`, at least one."""
    by_hash = sorted(candidates, key=lambda text: blake2b(text.encode(), digest_size=8).digest())
    return frozenset(by_hash[: max(1, of // HELD_OUT_ONE_IN)])
