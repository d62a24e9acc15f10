"""Counts of requests, and all counts of the server in Prometheus' text form."""

from collections import Counter

from textpolicy.serving.engine_queue import ServedEngine


class RequestCounts:
    """How many requests were answered, by path and status."""

    def __init__(self) -> None:
        self._answers: Counter[tuple[str, int]] = Counter()

    def add(self, path: str, status: int) -> None:
        """Count an answer."""
        self._answers[path, status] += 1

    def lines(self) -> list[str]:
        """Return the counts as lines of Prometheus' text form."""
        return [
            "# TYPE textpolicy_requests_total counter",
            *(
                f'textpolicy_requests_total{{path="{path}",status="{status}"}} {number}'
                for (path, status), number in sorted(self._answers.items())
            ),
        ]


def prometheus_text(served: ServedEngine, requests: RequestCounts) -> str:
    """Return all counts of the server in Prometheus' text form."""
    counts = served.counts
    numbers = {
        "open_rows gauge": served.open_rows,
        "steps_total counter": counts.steps,
        "failed_steps_total counter": counts.failed_steps,
        "prompt_tokens_total counter": counts.prompt_tokens,
        "sampled_tokens_total counter": counts.sampled_tokens,
        "finished_rows_total counter": counts.finished_rows,
        "swaps_total counter": counts.swaps,
    }
    lines: list[str] = []
    for declared, number in numbers.items():
        lines += [f"# TYPE textpolicy_{declared}", f"textpolicy_{declared.split()[0]} {number}"]
    lines += ["# TYPE textpolicy_model_version gauge"]
    lines += [
        f'textpolicy_model_version{{model="{_escaped(name)}"}} {one.version}'
        for name, one in served.models.items()
    ]
    return "\n".join([*lines, *requests.lines(), ""])


def _escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
