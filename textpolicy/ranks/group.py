"""What ranks tell each other: sums of arrays, and bytes of any length.

Every method that exchanges something must be called by all ranks, in the same order. A single rank
exchanges nothing and computes nothing.
"""

import json
import struct
import time
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import mlx.core as mx
import numpy as np

from textpolicy.activity import doing
from textpolicy.errors import RunInterruptedError, TrainingError
from textpolicy.ranks.patience import Patience
from textpolicy.untrusted.parsing import parse_json

# One exchange carries so many bytes of each rank. A longer message takes a second exchange.
_SHORT = 4096
_LENGTH = struct.Struct("<q")
# mlx holds the bytes of all ranks at once, so a file is sent in pieces.
_PIECE = 1 << 24


class Ranks:
    """One rank of a group, and what it can exchange with the others.

    A wait for other ranks that lasts longer than the `patience` ends the process.
    """

    def __init__(
        self, group: mx.distributed.Group | None = None, *, patience: Patience | None = None
    ) -> None:
        self.rank = group.rank() if group else 0
        self.size = group.size() if group else 1
        self._group = group
        self._patience = patience or Patience(None)
        self._waited = 0.0
        self.lost_another = False
        """Whether an exchange has failed because another rank has ended."""

    @property
    def is_first(self) -> bool:
        """Whether this rank writes the run."""
        return self.rank == 0

    def own_part(self, count: int) -> range:
        """Return the numbers, among `count`, that this rank takes: a contiguous part of them."""
        return self.part_of(self.rank, count)

    def part_of(self, rank: int, count: int) -> range:
        """Return the numbers, among `count`, that a rank takes."""
        return range(count * rank // self.size, count * (rank + 1) // self.size)

    def take_waited(self) -> float:
        """Return the seconds that this rank has waited in exchanges since the last call."""
        waited, self._waited = self._waited, 0.0
        return waited

    def sum_arrays(self, arrays: Sequence[mx.array]) -> list[mx.array]:
        """Return the sums over all ranks, in float32, by one exchange."""
        if self._group is None:
            return list(arrays)
        flat = mx.concatenate([array.astype(mx.float32).flatten() for array in arrays])
        ends = list(accumulate(array.size for array in arrays))
        parts = mx.split(self._sum(flat), ends[:-1])
        return [
            part.reshape(array.shape).astype(array.dtype)
            for part, array in zip(parts, arrays, strict=True)
        ]

    def gather(self, message: bytes) -> list[bytes]:
        """Return the messages of all ranks, by rank."""
        if self._group is None:
            return [message]
        short = self._gather(_LENGTH.pack(len(message)) + message, _LENGTH.size + _SHORT)
        lengths = [_LENGTH.unpack_from(one)[0] for one in short]
        whole = [one[_LENGTH.size :] for one in short]
        if (longest := max(lengths)) > _SHORT:
            rest = self._gather(message[_SHORT:], longest - _SHORT)
            whole = [begin + end for begin, end in zip(whole, rest, strict=True)]
        return [one[:length] for one, length in zip(whole, lengths, strict=True)]

    def gather_json(self, value: Any) -> list[Any]:
        """Return the values of all ranks, by rank. JSON must be able to hold them."""
        if self._group is None:
            return [value]
        messages = self.gather(json.dumps(value).encode())
        return [parse_json(message, constants=True) for message in messages]

    def any(self, flag: bool) -> bool:
        """Return whether the flag of any rank is set."""
        return any(map(bool, self.gather(b"1" if flag else b"")))

    def send_first(self, message: bytes) -> bytes:
        """Return the message of the first rank. Those of other ranks are ignored."""
        if self._group is None:
            return message
        (length, *_) = self.gather_json(len(message))
        received = bytearray()
        while len(received) < length:
            count = min(_PIECE, length - len(received))
            piece = np.zeros(count, np.uint8)
            if self.is_first:
                piece[:] = np.frombuffer(message, np.uint8, count, len(received))
            received += np.array(self._sum(mx.array(piece))).tobytes()
        return bytes(received)

    def require_equal(self, digest: str, what: str) -> None:
        """Raise `TrainingError` if the digest of any rank differs from that of the first."""
        digests = self.gather_json(digest)
        if others := [str(rank) for rank, one in enumerate(digests) if one != digests[0]]:
            raise TrainingError(
                f"{what} of rank {' and '.join(others)} differ from those of rank 0, so the ranks "
                "no longer train one model. The ranks must run on machines that compute alike: "
                "the same processor or GPU, and the same versions of mlx and TextPolicy. Resume "
                "the run on such machines, or with one rank by --force"
            )

    def _sum(self, array: mx.array) -> mx.array:
        return self._exchange(array, mx.distributed.all_sum)

    def _gather(self, message: bytes, width: int) -> list[bytes]:
        """Return the first `width` bytes of each rank's message, filled up with zeros."""
        padded = np.zeros(width, np.uint8)
        own = np.frombuffer(message[:width], np.uint8)
        padded[: len(own)] = own
        all_ranks = np.array(self._exchange(mx.array(padded), mx.distributed.all_gather))
        return [part.tobytes() for part in all_ranks.reshape(self.size, width)]

    def _exchange(self, array: mx.array, collective: Any) -> mx.array:
        # What this rank itself has to compute is no wait for other ranks.
        mx.eval(array)
        began = time.perf_counter()
        try:
            with doing("waiting for other ranks"), self._patience.waiting():
                result: mx.array = collective(array, group=self._group)
                mx.eval(result)
        except RuntimeError as error:
            self.lost_another = True
            raise RunInterruptedError(
                f"another rank has ended, so rank {self.rank} of {self.size} cannot go on "
                f"({error}). What that rank wrote last says why. A run with a checkpoint can be "
                "resumed with the same number of ranks"
            ) from error
        self._waited += time.perf_counter() - began
        return result


ALONE = Ranks()
"""The only rank of a run in one process."""
