"""Let vf-eval of verifiers 0.4 play tasks against our server, and compare its trace with ours.

    python benchmarks/verifiers_eval.py --python /path/to/its/bin/python

The train client of verifiers turns messages into token ids itself, asks /inference/v1/generate, and
keeps token ids and log-probabilities for a trainer. The script serves a model, runs vf-eval with
the taskset in `verifiers_tasks/`, and compares each rollout of its trace with what the server says
that it has sampled. Then it asks the server again with the prompts and the seeds of the rollouts.

A row fails if one token id differs, or if one log-probability of the trace differs at all. The
control compares each rollout with the sampled tokens of another one, and fails if no difference is
noticed. The exit code is 1 if a row fails. verifiers needs `uv`, beside its Python or on the PATH,
which installs packages of its chat program at run time.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
from setting import setting

from textpolicy.generation.mlx_generation import load_model
from textpolicy.generation.model_files import find_model
from textpolicy.serving.adapters import ServedAdapters
from textpolicy.serving.app import create_app
from textpolicy.serving.engine_queue import ServedEngine
from textpolicy.serving.exchange import Exchange
from textpolicy.serving.security import hosts_for, one_key
from textpolicy.serving.server import running_server

KEY = "a-key-of-the-benchmark"
TASKS = Path(__file__).parent / "verifiers_tasks"
CONTROL = "the trace with other rollouts, as a control"
# One request alone is summed up in another order than several in a batch.
EMBEDDED_BOUND, BOUND = 1e-5, 1e-4
PROGRAM = "import sys; from verifiers.v1.cli.eval.main import main; sys.exit(main())"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How many rollouts have the same token ids, and how far log-probabilities are from ours."""

    what: str
    rollouts: int
    tokens: int
    same_ids: int
    difference: float
    bound: float

    @property
    def ok(self) -> bool:
        if self.what == CONTROL:
            return self.same_ids < self.rollouts
        same = self.same_ids == self.rollouts > 0
        return same and self.difference <= self.bound


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """The token ids of a prompt, those sampled after it, and their log-probabilities."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]


class Server:
    """A served model, which notes every answer. `run` samples while a function runs."""

    def __init__(self, model: str) -> None:
        self.exchanges: list[Exchange] = []
        self.served = ServedEngine(*load_model(model))
        ServedAdapters(self.served, "served", allowed=[])
        self.app = create_app(
            self.served,
            owner_of=one_key(KEY),
            hosts=hosts_for("127.0.0.1"),
            on_exchange=self.exchanges.append,
        )

    def run(self, function: Any, *arguments: Any) -> Any:
        future: Future[Any] = Future()
        future.add_done_callback(lambda _: self.served.wake())
        Thread(target=lambda: future.set_result(function(*arguments)), daemon=True).start()
        self.served.run(until=future.done)
        return future.result()


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    server = Server(options.model)
    with running_server(server.app) as address, tempfile.TemporaryDirectory() as folder:
        done = server.run(evaluate, options, address, Path(folder))
        if done.returncode:
            sys.exit(f"vf-eval failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        traces, versions = read_traces(Path(folder))
        theirs = [sampled_in(trace) for trace in traces]
        exchanges = [*server.exchanges]
        again = [server.run(ask_again, address, exchange) for exchange in exchanges]
    ours = [sampled_by(exchange) for exchange in exchanges]
    pairs = matched(theirs, ours)
    bound = EMBEDDED_BOUND if options.model == "tiny" else BOUND
    others = [other for _, other in pairs]
    rows = [
        compare("the trace of vf-eval", pairs),
        compare(CONTROL, list(zip(theirs, [*others[1:], *others[:1]], strict=True))),
        compare("the same requests again", list(zip(again, ours, strict=True)), bound),
    ]
    for row in rows:
        print(f"{'ok' if row.ok else 'WRONG':6}{row}")
    record = {"setting": setting() | versions, "rows": [asdict(row) for row in rows]}
    if options.output:
        options.output.write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    return int(not all(row.ok for row in rows))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", default=sys.executable, help="the Python that has verifiers")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--rollouts", type=int, default=2, help="rollouts of each task")
    parser.add_argument("--max-tokens", type=int, default=8)
    parser.add_argument("--output", type=Path, help="write the record to this file")
    return parser.parse_args(arguments)


def evaluate(
    options: argparse.Namespace, address: str, folder: Path
) -> subprocess.CompletedProcess[str]:
    """Run vf-eval in a process of its own."""
    given = {
        "--model": "served",
        "--select.limit": str(options.tasks),
        "--num-rollouts": str(options.rollouts),
        "--client.type": "train",
        "--client.base-url": f"{address}/v1",
        "--client.api-key-var": "SERVED_KEY",
        "--client.renderer-model-name": str(find_model(options.model)),
        "--env.agent.harness.id": "null",
        "--env.agent.runtime.type": "subprocess",
        "--sampling.max-tokens": str(options.max_tokens),
        "--sampling.temperature": "1.0",
        "--output-dir": str(folder),
        "--push": "False",
    }
    flags = [word for pair in given.items() for word in pair]
    beside = str(Path(options.python).parent)
    environment = os.environ | {
        "SERVED_KEY": KEY,
        "PATH": os.pathsep.join([beside, os.environ.get("PATH", "")]),
        "PYTHONPATH": os.pathsep.join([str(TASKS), os.environ.get("PYTHONPATH", "")]),
    }
    command = [options.python, "-c", PROGRAM, "doubling", *flags]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def read_traces(folder: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Return the traces of all rollouts, and the version of verifiers."""
    (file,) = folder.rglob("traces.jsonl")
    episodes = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    failed = [episode["traces"][0]["errors"] for episode in episodes if not episode["ok"]]
    if failed or not episodes:
        sys.exit(f"vf-eval played {len(episodes)} rollouts; failed: {failed[:3]}")
    traces = [episode["traces"][0] for episode in episodes]
    return traces, {"verifiers": traces[0]["verifiers"]["version"]}


def sampled_in(trace: dict[str, Any]) -> Sampled:
    """Return what was sampled in a rollout of one turn, by its trace."""
    before, answer = trace["nodes"]
    sampled = [
        token for token, mine in zip(answer["token_ids"], answer["mask"], strict=True) if mine
    ]
    opening = answer["token_ids"][: len(answer["token_ids"]) - len(sampled)]
    return Sampled(
        prompt=before["token_ids"] + opening, tokens=sampled, logprobs=trace["info"]["logprobs"]
    )


def sampled_by(exchange: Exchange) -> Sampled:
    return Sampled(
        prompt=exchange.prompt_tokens, tokens=exchange.tokens, logprobs=exchange.logprobs
    )


def ask_again(address: str, exchange: Exchange) -> Sampled:
    """Ask the server for the same prompt with the same seed."""
    sampling = {"seed": exchange.seed, "temperature": exchange.sampling.temperature, "logprobs": 1}
    body = {
        "model": "served",
        "token_ids": exchange.prompt_tokens,
        "sampling_params": sampling | {"max_tokens": len(exchange.tokens)},
    }
    headers = {"Authorization": f"Bearer {KEY}"}
    answer = httpx.post(f"{address}/inference/v1/generate", json=body, headers=headers).json()
    (choice,) = answer["choices"]
    return Sampled(
        prompt=exchange.prompt_tokens,
        tokens=choice["token_ids"],
        logprobs=[one["logprob"] for one in choice["logprobs"]["content"]],
    )


def compare(what: str, pairs: Sequence[tuple[Sampled, Sampled]], bound: float = 0.0) -> Comparison:
    """Compare the two sides of each pair."""
    return Comparison(
        what=what,
        rollouts=len(pairs),
        tokens=sum(len(one.tokens) for one, _ in pairs),
        same_ids=sum(is_same(one, other) for one, other in pairs),
        difference=max((difference(one, other) for one, other in pairs), default=0.0),
        bound=bound,
    )


def matched(theirs: Sequence[Sampled], ours: Sequence[Sampled]) -> list[tuple[Sampled, Sampled]]:
    """Return each rollout with what the server has sampled that is nearest to it."""
    left = [*ours]
    pairs: list[tuple[Sampled, Sampled]] = []
    for one in theirs:
        nearest = min(left, key=lambda other: (not is_same(one, other), difference(one, other)))
        left.remove(nearest)
        pairs.append((one, nearest))
    return pairs


def is_same(one: Sampled, other: Sampled) -> bool:
    sides = [(each.prompt, each.tokens, len(each.logprobs)) for each in (one, other)]
    return sides[0] == sides[1]


def difference(one: Sampled, other: Sampled) -> float:
    """Return the largest difference of log-probabilities, as far as both sides have them."""
    pairs = zip(one.logprobs, other.logprobs, strict=False)
    return max((abs(a - b) for a, b in pairs), default=0.0)


if __name__ == "__main__":
    sys.exit(main())
