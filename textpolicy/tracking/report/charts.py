"""Which numbers are drawn together, and in what order people look at them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Line:
    """One metric in a chart. What is shaded is `spread` above and below it, or `low` to `high`."""

    metric: str
    label: str
    spread: str | None = None
    low: str | None = None
    high: str | None = None


@dataclass(frozen=True)
class Chart:
    """Metrics over one pair of axes; `note` says what a reader would ask."""

    title: str
    lines: Sequence[Line]
    note: str = ""
    kind: Literal["lines", "stack"] = "lines"
    zero: bool = False
    """Whether the axis begins at 0, for shares and amounts."""


_LENGTH = "completions/{}_length"
_SAMPLING = "sampling/"
_REWARD = Chart(
    "Reward",
    [Line("reward", "mean reward", spread="reward_std")],
    "shaded: the spread inside a group",
)
_SUPERVISED = [
    Chart("Loss", [Line("loss", "training"), Line("validation/loss", "validation")]),
]
_CHARTS = [
    Chart(
        "Groups",
        [
            Line("frac_mixed", "mixed"),
            Line("frac_all_bad", "all bad"),
            Line("frac_all_good", "all good"),
        ],
        "mixed groups are what is learned from",
        zero=True,
    ),
    Chart(
        "Length",
        [
            Line(
                _LENGTH.format("mean"),
                "tokens a completion",
                low=_LENGTH.format("min"),
                high=_LENGTH.format("max"),
            )
        ],
        "shaded: shortest to longest",
        zero=True,
    ),
    Chart("Cut off", [Line("completions/clipped_ratio", "share at the limit")], zero=True),
    Chart("Entropy", [Line("entropy", "nats a token")], zero=True),
    Chart("KL divergence", [Line("kl", "from the reference")]),
    Chart(
        "Clipping",
        [
            Line("clip_ratio/low_mean", "from below"),
            Line("clip_ratio/high_mean", "from above"),
            Line("cispo_clip_ratio", "weights capped"),
        ],
        "share of tokens",
        zero=True,
    ),
    Chart(
        "Sampler and trainer",
        [
            Line(f"{_SAMPLING}sampling_logp_difference/mean", "difference of log-probabilities"),
            Line(f"{_SAMPLING}mismatch_kl", "divergence"),
        ],
        "nats a token; rounding, as long as it is tiny",
    ),
    Chart("Gradient norm", [Line("grad_norm", "before clipping")], zero=True),
    Chart("Learning rate", [Line("learning_rate", "learning rate")], zero=True),
    Chart("Adapters", [Line("adapters/delta_norm", "norm of what they add")], zero=True),
    Chart(
        "Time in a step",
        [
            Line("time/generate", "generate"),
            Line("time/reward", "reward"),
            Line("time/score", "score"),
            Line("time/update", "update"),
            Line("time/publish", "publish"),
            Line("time/reload", "reload"),
            Line("time/evaluate", "evaluate"),
            Line("time/checkpoint", "checkpoint"),
        ],
        "seconds, one on top of the other",
        kind="stack",
        zero=True,
    ),
    Chart("Speed", [Line("tokens_per_second", "tokens a second")], zero=True),
    Chart("Memory", [Line("memory/peak_gb", "peak, in gigabytes")], zero=True),
]
STACKED_METRICS = frozenset(
    line.metric for chart in _CHARTS if chart.kind == "stack" for line in chart.lines
)
"""Metrics that are drawn on top of each other, so that each needs a value wherever one has."""
_NOT_DRAWN = ("version", "sink_errors", "num_tokens", "time/train", "time/step", "alarm/")


def charts_for(metrics: Mapping[str, bool]) -> list[dict[str, Any]]:
    """The charts of these metrics, each with whether it is ever anything but 0.

    Charts that are only 0, and of metrics that have no place, come last and are marked as `more`.
    """
    names = list(metrics)
    first = [_REWARD] if "reward" in names else _SUPERVISED
    chosen = [*first, *_evaluation(names), *_parts(names), *_CHARTS]
    drawn = [chart for chart in (_with_data(chart, set(names)) for chart in chosen) if chart.lines]
    used = {metric for chart in drawn for line in chart.lines for metric in asdict(line).values()}
    others = [n for n in names if n not in used and not n.startswith(_NOT_DRAWN)]
    alive = [chart for chart in drawn if any(metrics[line.metric] for line in chart.lines)]
    more = [chart for chart in drawn if chart not in alive]
    more += [Chart(name, [Line(name, name)]) for name in sorted(others)]
    return [asdict(chart) | {"more": chart in more} for chart in [*alive, *more]]


def _with_data(chart: Chart, names: set[str]) -> Chart:
    lines = [line for line in chart.lines if line.metric in names]
    return Chart(chart.title, lines, chart.note, chart.kind, chart.zero)


def _evaluation(names: Sequence[str]) -> list[Chart]:
    """One chart for each environment that was evaluated."""
    folders = dict.fromkeys(n.rpartition("/")[0] for n in names if n.startswith("eval/"))
    return [
        Chart(
            f"Evaluation{folder.removeprefix('eval').replace('/', ' of ')}",
            [
                Line(f"{folder}/reward", "greedy", spread=f"{folder}/standard_error"),
                *(
                    Line(name, name.rpartition("/")[2])
                    for name in names
                    if name.startswith((f"{folder}/pass@", f"{folder}/avg@"))
                ),
            ],
            "on held-out tasks; shaded: the standard error",
        )
        for folder in folders
    ]


def _parts(names: Sequence[str]) -> list[Chart]:
    """The means of several reward functions; of one alone, it is the reward again."""
    means = [n for n in names if n.startswith("rewards/") and n.endswith("/mean")]
    lines = [Line(name, name.split("/")[1], spread=f"{name[:-5]}/std") for name in means]
    return [Chart("Reward functions", lines)] if len(lines) > 1 else []
