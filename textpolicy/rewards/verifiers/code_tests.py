"""Run tests of code that a model wrote, isolated from this machine and from the tests.

Nothing runs unless a reward calls `code_share` or `run_code`. The code runs in a process of its own
under bubblewrap (Linux) with nothing to read or write, and the tests run in another one. Where that
isolation cannot be had the call is refused, unless `unsafe=True` allows plain processes.

The code receives the arguments of calls and returns plain values. Comparisons are made where the
tests are, so an object that equals everything, an early end, a forged message or a changed built-in
of Python passes no test.
"""

from collections.abc import Sequence
from contextlib import closing

from textpolicy.rewards.verifiers.sandbox.code_judge import CodeJudge, CodeRun


def code_share(
    completion: str, tests: Sequence[str], *, seconds: float = 4.0, unsafe: bool = False
) -> float:
    """Return the share of `tests`, such as "assert add(1, 2) == 3", that the Python code passes.

    The code runs afresh for each test, for up to `seconds`. A fence of ``` around the code is
    removed.
    """
    with closing(CodeJudge(python_in(completion), unsafe=unsafe)) as judge:
        runs = [judge.run(test, seconds) for test in tests]
    return sum(run.passed for run in runs) / len(runs) if runs else 0.0


def run_code(
    code: str, test: str = "", *, seconds: float = 4.0, memory: int = 1 << 29, unsafe: bool = False
) -> CodeRun:
    """Run Python code and then a test, with up to `memory` bytes and `seconds` of wall time."""
    with closing(CodeJudge(code, memory=memory, unsafe=unsafe)) as judge:
        return judge.run(test, seconds)


def python_in(completion: str) -> str:
    """Return the last fenced block of a completion, or the whole completion if there is none."""
    _, opening, rest = completion.rpartition("```python\n")
    return rest.partition("```")[0] if opening else completion
