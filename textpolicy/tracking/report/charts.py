"""The charts of the report: which metrics share a chart, and the order of the charts."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from textpolicy.tracking.named_numbers import ERRORS, REPORTED, NamedNumber, named_numbers


@dataclass(frozen=True)
class Line:
    """One metric in a chart. The shaded band is `spread` around the line, or `low` to `high`."""

    metric: str
    label: str
    spread: str | None = None
    low: str | None = None
    high: str | None = None


@dataclass(frozen=True)
class Chart:
    """Metrics over one pair of axes. `note` is a short explanation for the reader."""

    title: str
    lines: Sequence[Line]
    note: str = ""
    kind: Literal["lines", "stack"] = "lines"
    zero: bool = False
    """Whether the vertical axis begins at 0, as for shares and amounts."""


_TIMES = (
    *("wait", "generate", "reward", "logprobs", "update", "publish", "reload", "evaluate"),
    "checkpoint",
)
_REWARD = Chart(
    "Reward",
    [Line("reward", "mean reward", spread="reward_std")],
    "shaded: the spread inside a group",
)
_LOSS = Chart("Loss", [Line("loss", "training"), Line("validation/loss", "validation")])
_CHARTS = [
    Chart(
        "Groups",
        [Line(f"frac_{name}", name.replace("_", " ")) for name in ("mixed", "all_bad", "all_good")],
        "only mixed groups have a gradient",
        zero=True,
    ),
    Chart(
        "Length",
        [
            Line(
                "completions/mean_length",
                "tokens a completion",
                low="completions/min_length",
                high="completions/max_length",
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
            Line("sampling/sampling_logp_difference/mean", "difference of log-probabilities"),
            Line("sampling/mismatch_kl", "divergence"),
        ],
        "nats a token; tiny values are rounding",
    ),
    Chart("Gradient norm", [Line("grad_norm", "before clipping")], zero=True),
    Chart("Learning rate", [Line("learning_rate", "learning rate")], zero=True),
    Chart(
        "Adapters", [Line("adapters/delta_norm", "norm of the change of the weights")], zero=True
    ),
    Chart(
        "Time in a step",
        [Line(f"time/{name}", name) for name in _TIMES],
        "seconds, stacked",
        kind="stack",
        zero=True,
    ),
    Chart(
        "Who waited for whom",
        [
            Line("trainer/idle", "trainer, for groups of the workers"),
            Line("workers/idle", "workers, for jobs of the trainer"),
        ],
        "shares of the time",
        zero=True,
    ),
    Chart(
        "Staleness",
        [Line("staleness/mean", "mean"), Line("staleness/max", "stalest group")],
        "versions between sampling and training",
        zero=True,
    ),
    Chart("Speed", [Line("tokens_per_second", "tokens a second")], zero=True),
    Chart("Memory", [Line("memory/peak_gb", "peak, in gigabytes")], zero=True),
]
STACKED_METRICS = frozenset(
    line.metric for chart in _CHARTS if chart.kind == "stack" for line in chart.lines
)
"""Metrics of stacked charts. A step needs a value for each of them, or the stack has gaps."""
_HELD_OUT = "eval/"
_NOT_DRAWN = ("version", "sink_errors", "num_tokens", "time/train", "time/step", "alarm/", "data/")


def charts_for(metrics: Mapping[str, bool]) -> list[dict[str, Any]]:
    """Return the charts of these metrics. A value of `metrics` is True if the metric is ever not 0.

    Charts with only zeros, and charts of metrics without a place of their own, come last and have
    the mark `more`.
    """
    names = list(metrics)
    main = _REWARD if "reward" in names else _LOSS
    means = [n for n in names if n.startswith("rewards/") and n.endswith("/mean")]
    lines = [Line(name, name.split("/")[1], spread=f"{name[:-5]}/std") for name in means]
    # The mean of a single reward function equals the reward.
    functions = [Chart("Reward functions", lines)] if len(lines) > 1 else []
    named = [_chart_of_number(one, names) for one in _named_in(names)]
    candidates = [main, *_evaluation_charts(names), *functions, *named, *_CHARTS]
    kept = [
        replace(chart, lines=[line for line in chart.lines if line.metric in metrics])
        for chart in candidates
    ]
    charts = [chart for chart in kept if chart.lines]
    used = {metric for chart in charts for line in chart.lines for metric in asdict(line).values()}
    unused = [n for n in names if n not in used and not n.startswith(_NOT_DRAWN)]
    # The band around a number shows its standard error.
    others = [n for n in unused if f"/{ERRORS}" not in n]
    nonzero = [chart for chart in charts if any(metrics[line.metric] for line in chart.lines)]
    more = [chart for chart in charts if chart not in nonzero]
    more += [Chart(name, [Line(name, name)]) for name in sorted(others)]
    return [asdict(chart) | {"more": chart in more} for chart in [*nonzero, *more]]


def _named_in(names: Sequence[str]) -> list[NamedNumber]:
    """Return the numbers that rewards report beside their values, in training or held out.

    The values of several rewards are among them if they were measured on held-out tasks.
    """
    found = named_numbers(dict.fromkeys(names, 0.0))
    known = {one.key for one in found}
    held_out = named_numbers(dict.fromkeys(names, 0.0), _HELD_OUT)
    found += [one for one in held_out if one.key.removeprefix(_HELD_OUT) not in known]
    measured = {one.key.removeprefix(_HELD_OUT) for one in held_out}
    return [one for one in found if not one.key.endswith("/mean") or one.key in measured]


def _chart_of_number(number: NamedNumber, names: Sequence[str]) -> Chart:
    """Return the chart of a number in training and on held-out tasks, under its short name."""
    key = number.key.removeprefix(_HELD_OUT)
    error = f"{_HELD_OUT}{ERRORS}{key.removeprefix(REPORTED)}"
    held_out = Line(f"{_HELD_OUT}{key}", "greedy, held out", spread=error)
    return Chart(
        number.name,
        [Line(key, "sampled in training"), held_out],
        "a number of the reward; shaded: the standard error" if error in names else "",
    )


def _evaluation_charts(names: Sequence[str]) -> list[Chart]:
    """Return one chart for each evaluated environment."""
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
