"""What the records of real_learning.py show: gains, curves beside each other, and collapse.

A gain counts if the held-out score rises by more than two standard errors. The standard error of
the difference is that of two independent means, so a gain on the same tasks is judged strictly.

Two sides learn alike if their mean curves agree in at least nine tenths of the run, and if their
mean rewards over the whole run are no further apart than chance allows: in 19 of 20 cases by
Student's t, which is 2.78 standard errors for three seeds of each side. Two curves agree in a tenth
if the mean of one side lies between the lowest and the highest seed of the other side, or if the
means differ by no more than two standard errors. One spread over seeds holds for all tenths of both
sides, because three numbers alone tell a spread badly. If one side took more steps at a constant
rate, its first steps are compared.

A run has collapsed if an alarm about learning was raised, or if the mean of its last tenth is
10 % below that of its best tenth, and by more than three standard errors of the rewards of steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import hypot
from typing import Any

import numpy as np

Record = dict[str, Any]

# Student's t that 1 of 20 draws exceeds, by the degrees of freedom of two to five seeds a side.
_T = {2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31}
ENOUGH_SEEDS = 2
TENTHS = 10
ENOUGH_TENTHS = 9
# How far the last tenth of a run may be below its best tenth: as a share, and in standard errors.
FALL = 0.1
FALL_ERRORS = 3.0


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A difference of two means, with its standard error."""

    mean: float
    standard_error: float

    @property
    def is_clear(self) -> bool:
        return abs(self.mean) > 2 * self.standard_error

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ± {self.standard_error:.3f}"


def gain_of(record: Record) -> Difference:
    """Return how much the held-out score rose in a run."""
    before, after = record["before"], record["after"]
    return Difference(
        mean=after["mean"] - before["mean"],
        standard_error=hypot(before["standard_error"], after["standard_error"]),
    )


def learns(record: Record) -> bool:
    """Return whether the held-out score rose by more than two standard errors."""
    gain = gain_of(record)
    return gain.mean > 0 and gain.is_clear


def collapsed(record: Record) -> bool:
    """Return whether a run lost what it had: by an alarm about learning, or by its rewards."""
    return bool(record.get("alarms")) or fell(record["rewards"])


def fell(curve: Sequence[float]) -> bool:
    """Return whether the last tenth of a curve is clearly below the best tenth."""
    parts = tenths_of(curve)
    if len(curve) < 2 * TENTHS:
        # One step is too few to tell how much the rewards of steps vary.
        return False
    means = np.array([part.mean() for part in parts])
    within = sum(float(np.square(part - part.mean()).sum()) for part in parts)
    variance = within / (len(curve) - len(parts))
    fall = float(means.max() - means[-1])
    error = (2 * variance / len(parts[-1])) ** 0.5
    return fall > FALL * means.max() and fall > FALL_ERRORS * error


def is_expected(record: Record) -> bool:
    """Return whether a trained run learned without collapse, or a control did not learn."""
    if record["settings"]["control"]:
        return not learns(record)
    return learns(record) and not collapsed(record)


def tenths_of(curve: Sequence[float]) -> list[np.ndarray]:
    """Return the tenths of a curve. A curve of fewer than ten steps is cut into its steps."""
    return np.array_split(np.asarray(curve, dtype=np.float64), min(TENTHS, len(curve)))


def means_of_tenths(curves: Sequence[Sequence[float]]) -> np.ndarray:
    """Return the mean of each tenth of each curve."""
    return np.array([[part.mean() for part in tenths_of(curve)] for curve in curves])


@dataclass(frozen=True, kw_only=True)
class Alike:
    """How the runs of one side compare with the runs of the other, with several seeds each."""

    agreeing: int
    tenths: int
    steps: int
    area: Difference
    """Of the mean rewards over these steps."""
    heldout: Difference | None
    """Of the held-out scores after the runs, or None if one side took more steps."""
    ok: bool


def compare_sides(ours: Sequence[Record], theirs: Sequence[Record]) -> Alike | None:
    """Return the comparison, or None if a side has too few seeds to tell the spread."""
    sides = (ours, theirs)
    if min(map(len, sides)) < ENOUGH_SEEDS:
        return None
    lengths = {len(one["rewards"]) for one in (*ours, *theirs)}
    steps = min(lengths)
    curves = [[one["rewards"][:steps] for one in side] for side in sides]
    tenths = [means_of_tenths(side) for side in curves]
    agreeing, count = tenths_that_agree(*tenths), tenths[0].shape[1]
    area = difference(*([float(np.mean(curve)) for curve in side] for side in curves))
    heldout = difference(*([one["after"]["mean"] for one in side] for side in sides))
    limit = _T[len(ours) + len(theirs) - 2] * area.standard_error
    return Alike(
        agreeing=agreeing,
        tenths=count,
        steps=steps,
        area=area,
        heldout=heldout if len(lengths) == 1 else None,
        ok=agreeing >= count * ENOUGH_TENTHS / TENTHS and abs(area.mean) <= limit,
    )


def tenths_that_agree(ours: np.ndarray, theirs: np.ndarray) -> int:
    """Return in how many tenths two sides agree, from the means by seed and tenth."""
    sides = (ours, theirs)
    spread = np.mean([side.var(axis=0, ddof=1).mean() for side in sides])
    error = (spread * sum(1 / len(side) for side in sides)) ** 0.5
    means = [side.mean(axis=0) for side in sides]
    near = np.abs(means[0] - means[1]) <= 2 * error
    for mean, other in ((means[0], theirs), (means[1], ours)):
        near |= (other.min(axis=0) <= mean) & (mean <= other.max(axis=0))
    return int(near.sum())


def difference(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Return the difference of two means over seeds."""
    errors = [float(np.std(side, ddof=1)) / len(side) ** 0.5 for side in (ours, theirs)]
    return Difference(mean=float(np.mean(ours) - np.mean(theirs)), standard_error=hypot(*errors))
