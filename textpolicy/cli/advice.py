"""What a bench measured, what it comes to, and what to change: no advice without a number."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from textpolicy.cli.answer import table
from textpolicy.types import Metrics

# What others share a machine with varies by less than this.
_CLEAR = 1.1
_SLOW_PRODUCT = 1.3
_MANY_CUT = 0.25
_SLOW_REWARDS = 0.1
_LONG_SCORES = 0.05


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a bench found out, nothing of it computed from anything but measurements, except for
    `planned_bytes`. `metrics` are means over the steps.

    played: whether the task is an environment, whose several turns are not planned
    scores_reference: whether options ask for scores of a reference, and the algorithm does not
    threads: median seconds of a step by the number of threads, that of the run first
    widths: tokens generated a second by the rows that are sampled together
    products: milliseconds of a matrix product by number format, that of the model first
    blas: billions of float32 operations a second, of mlx's products and of others
    """

    model: str
    task: str
    device: str
    groups: int
    group_size: int
    max_tokens: int
    steps: int
    warmed_up: bool
    metrics: Metrics
    prompt_tokens: int
    completion_tokens: int
    planned_bytes: int | None
    played: bool
    scores_reference: bool
    scores_afresh: bool
    isolated: bool
    threads: Mapping[int, float]
    widths: Mapping[int, float]
    products: Mapping[str, float]
    blas: Mapping[str, float]

    @property
    def rows(self) -> int:
        """Completions of a step."""
        return self.groups * self.group_size

    @property
    def seconds(self) -> dict[str, float]:
        """Of a step, by what they are spent on; they add up to the step."""
        metrics = self.metrics
        parts = {
            "generation": metrics["time/generate"],
            "rewards": metrics["time/reward"],
            "scores": metrics["time/score"],
            "update": metrics["time/update"],
            "publishing": metrics["time/publish"] + metrics["time/reload"],
        }
        return parts | {"rest": max(0.0, metrics["time/step"] - sum(parts.values()))}

    @property
    def shares(self) -> dict[str, float]:
        """The same, of 1."""
        return {name: part / self.metrics["time/step"] for name, part in self.seconds.items()}

    @property
    def generated_per_second(self) -> float:
        """Sampled tokens a second of generation."""
        return self.metrics["num_tokens"] / self.metrics["time/generate"]

    @property
    def trained_per_second(self) -> float:
        """Sampled tokens a second of scoring and updating."""
        taken = self.metrics["time/score"] + self.metrics["time/update"]
        return self.metrics["num_tokens"] / taken


def advice_of(measured: Measured) -> list[str]:
    """What to change; none where nothing measured is out of the ordinary."""
    return [text for advise in _ADVISERS if (text := advise(measured))]


def shown(measured: Measured, advice: list[str]) -> str:
    """The tables and the advice, for people."""
    steps = f"{measured.steps} step{'s' if measured.steps > 1 else ''}"
    after = "after one to warm up" if measured.warmed_up else "and no time left to warm up"
    lines = [
        f"{measured.model} on {measured.task}, {measured.groups} x {measured.group_size} "
        f"completions a step, on the {measured.device}: {steps}, {after}",
        "",
        table(_time_rows(measured)),
        "",
        table(_other_rows(measured)),
        "",
        "what to change",
    ]
    return "\n".join([*lines, *(f"- {text}" for text in advice or ["nothing that was measured"])])


def _time_rows(measured: Measured) -> list[tuple[str, str]]:
    speeds = {
        "generation": f"  {measured.generated_per_second:,.0f} tokens/s",
        "update": f"  {measured.trained_per_second:,.0f} tokens/s, scores included",
    }
    shares = measured.shares
    rows = [
        (f"  {name}", f"{seconds:7.3f} s  {shares[name]:4.0%}{speeds.get(name, '')}")
        for name, seconds in measured.seconds.items()
    ]
    return [("a step", f"{measured.metrics['time/step']:7.3f} s"), *rows]


def _other_rows(measured: Measured) -> list[tuple[str, str]]:
    metrics, planned = measured.metrics, measured.planned_bytes
    unknown = "several turns are not planned" if measured.played else "no plan for this model"
    plan = unknown if planned is None else f"planned {planned / 1e6:,.1f} MB"
    rows = [
        ("peak memory", f"{metrics['memory/peak_gb'] * 1e3:,.1f} MB, {plan}"),
        ("prompt", f"up to {measured.prompt_tokens} tokens"),
        ("completion", _lengths(measured)),
        ("padding", f"{metrics['padding']:.0%} of the places that the update reads"),
        ("rows", _several(measured.widths, "{:g}: {:,.0f}", "tokens/s generated")),
        ("threads", _several(measured.threads, "{:g}: {:.3f}", "s a step")),
        ("product", _several(measured.products, "{}: {:.3f}", f"ms for {measured.rows} rows")),
        ("BLAS", _several(measured.blas, "{}: {:.0f}", "GFLOP/s in float32")),
    ]
    return [(name, value) for name, value in rows if value]


def _lengths(measured: Measured) -> str:
    metrics = measured.metrics
    return (
        f"{metrics['completions/mean_length']:.1f} tokens on average, "
        f"the longest of a step {metrics['completions/max_length']:.1f}, "
        f"{metrics['completions/clipped_ratio']:.0%} cut off at {measured.max_tokens}"
    )


def _several(values: Mapping[Any, float], form: str, unit: str) -> str:
    joined = ", ".join(form.format(name, value) for name, value in values.items())
    return f"{joined} {unit}" if joined else ""


def _blas(measured: Measured) -> str | None:
    """The library inside mlx's Linux wheel is slow; numpy's shows what the machine can do."""
    ours, other = measured.blas.get("mlx", 0.0), measured.blas.get("numpy", 0.0)
    if other < _CLEAR * ours:
        return None
    return (
        f"mlx multiplies at {ours:.0f} GFLOP/s, and numpy on this machine at {other:.0f}: "
        "pip install scipy-openblas32 (and leave TEXTPOLICY_BLAS unset)"
    )


def _threads(measured: Measured) -> str | None:
    if not measured.threads:
        return None
    now = next(iter(measured.threads))
    best = min(measured.threads, key=lambda count: measured.threads[count])
    if measured.threads[now] < _CLEAR * measured.threads[best]:
        return None
    return (
        f"--threads {best}: a step took {measured.threads[best]:.3f} s with it, and "
        f"{measured.threads[now]:.3f} s with {now}"
    )


def _products(measured: Measured) -> str | None:
    if _blas(measured):
        # With a fast one the float products are others.
        return None
    now = next(iter(measured.products))
    best = min(measured.products, key=lambda name: measured.products[name])
    if measured.products[now] < _SLOW_PRODUCT * measured.products[best]:
        return None
    change = f"--dtype {best}" + (" and no --quantize" if "bit " in now else "")
    return (
        f"{change}: the largest matrix of a block takes {measured.products[best]:.2f} ms for "
        f"{measured.rows} rows in {best}, and {measured.products[now]:.2f} ms as it is, in {now}; "
        "`textpolicy plan` shows what the weights then take"
    )


def _width(measured: Measured) -> str | None:
    if len(measured.widths) < 2:
        return None
    rows = max(measured.widths)
    now, wider = measured.widths[measured.rows], measured.widths[rows]
    if rows == measured.rows or wider < _CLEAR * now:
        return None
    return (
        f"sample {rows} rows at once: {wider:,.0f} tokens/s, and {now:,.0f} with {measured.rows}; "
        f"generation is {measured.shares['generation']:.0%} of a step. --groups-per-step "
        f"{2 * measured.groups}, or --steps-per-generation 2 for steps as large as now"
    )


def _rewards(measured: Measured) -> str | None:
    if measured.shares["rewards"] < _SLOW_REWARDS:
        return None
    each = 1e3 * measured.seconds["rewards"] / measured.rows
    where = (
        "more workers in its Rewards(..., workers=) may share them"
        if measured.isolated
        else "--reward-timeout SECONDS calls it in several processes at once"
    )
    return (
        f"rewards take {measured.shares['rewards']:.0%} of a step, {each:.1f} ms a completion: "
        f"{where}"
    )


def _reference(measured: Measured) -> str | None:
    asked = measured.scores_reference or measured.scores_afresh
    if not asked or measured.shares["scores"] < _LONG_SCORES:
        return None
    share = f"{measured.shares['scores']:.0%} of a step"
    if measured.scores_reference and measured.scores_afresh:
        return f"reference and --old-logprobs fresh together take {share}; they are options"
    if measured.scores_reference:
        return f"the reference takes {share}: without --beta, --reward-kl and --reference it is 0"
    return f"--old-logprobs fresh takes {share}: with recorded ones it is 0"


def _truncated(measured: Measured) -> str | None:
    cut = measured.metrics["completions/clipped_ratio"]
    if cut < _MANY_CUT:
        return None
    return (
        f"{cut:.0%} of completions are cut off at {measured.max_tokens} tokens, and have cost all "
        "of them: raise --max-tokens, or teach the model to end (`textpolicy sft`) first"
    )


_ADVISERS: tuple[Callable[[Measured], str | None], ...] = (
    _blas,
    _products,
    _threads,
    _width,
    _rewards,
    _reference,
    _truncated,
)
