"""Compare the throughput of the server with that of its engine alone.

    python benchmarks/serving.py --model build/smollm2-135m --json

Clients in a process of their own ask at the same time, each for one answer, by the official client
of OpenAI's API: as whole answers, and as streams. The engine alone samples the same rows with the
same seeds, submitted at once, and without HTTP. All take turns in one run, after a turn that is not
counted. The script reports the medians, and the share of the engine's throughput that is left.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

from openai import OpenAI
from setting import setting

from textpolicy import fast_cpu
from textpolicy.generation.decoding_batch import DecodingRow
from textpolicy.generation.engine import Engine, can_launch_ahead
from textpolicy.generation.mlx_generation import load_model
from textpolicy.generation.prompts import encode_prompt
from textpolicy.generation.sampling import random_keys
from textpolicy.generation.stop_rules import StopAtStrings
from textpolicy.serving.app import create_app
from textpolicy.serving.engine_queue import ServedEngine
from textpolicy.serving.server import running_server
from textpolicy.types import Sampling

Turn = Callable[[], tuple[int, float]]
"""Samples all answers; returns how many tokens they have, and the seconds that it took."""


def question(number: int) -> str:
    return f"Tell me a story about {number} ships."


def engine_alone(model: Any, tokenizer: Any, clients: int, max_tokens: int) -> Turn:
    """Return a turn of the engine without a server."""
    prompts = [encode_prompt(tokenizer, question(number)) for number in range(clients)]

    def turn() -> tuple[int, float]:
        started = time.perf_counter()
        engine = Engine(model, launch_ahead=can_launch_ahead())
        rows = [
            DecodingRow(
                context=prompt,
                sampling=Sampling(max_tokens=max_tokens),
                stop=StopAtStrings(tokenizer, ()),
                key=random_keys(number, [(0, 0)])[0],
            )
            for number, prompt in enumerate(prompts)
        ]
        for row in rows:
            engine.submit([row])
        while engine.can_step:
            engine.step()
        return sum(len(row.tokens) for row in rows), time.perf_counter() - started

    return turn


def through_server(
    served: ServedEngine, pool: Pool, address: str, clients: int, max_tokens: int, *, stream: bool
) -> Turn:
    """Return a turn of the clients, which ask while this thread samples."""

    def turn() -> tuple[int, float]:
        # A new version has read no prompt yet.
        served.put("model", served.model, version=0)
        asked = pool.apply_async(
            ask_all, (address, clients, max_tokens, stream), callback=lambda _: served.wake()
        )
        served.run(until=asked.ready)
        return asked.get()

    return turn


def ask_all(address: str, clients: int, max_tokens: int, stream: bool) -> tuple[int, float]:
    """Ask for one answer for each client at the same time."""
    with (
        OpenAI(base_url=f"{address}/v1", api_key="-", timeout=600) as client,
        ThreadPoolExecutor(clients) as threads,
    ):

        def ask(number: int) -> int:
            options: Any = {"model": "model", "seed": number, "max_tokens": max_tokens}
            options["messages"] = [{"role": "user", "content": question(number)}]
            if not stream:
                return client.chat.completions.create(**options).usage.completion_tokens
            usage = {"include_usage": True}
            *_, last = client.chat.completions.create(**options, stream=True, stream_options=usage)
            return last.usage.completion_tokens

        started = time.perf_counter()
        tokens = sum(threads.map(ask, range(clients)))
        return tokens, time.perf_counter() - started


def compare(model_name: str, clients: int, max_tokens: int, runs: int) -> dict[str, Any]:
    """Return tokens per second of each way, and each way's share of the engine's."""
    model, tokenizer = load_model(model_name)
    served = ServedEngine(model, tokenizer)
    served.put("model", model, version=0)
    context = multiprocessing.get_context("spawn")
    with running_server(create_app(served)) as address, context.Pool(1) as pool:
        turns = {
            "engine": engine_alone(model, tokenizer, clients, max_tokens),
            "server": through_server(served, pool, address, clients, max_tokens, stream=False),
            "streams": through_server(served, pool, address, clients, max_tokens, stream=True),
        }
        counted = [{name: turn() for name, turn in turns.items()} for _ in range(runs + 1)][1:]
    rates = {
        name: statistics.median(tokens / seconds for tokens, seconds in (t[name] for t in counted))
        for name in turns
    }
    return {
        "clients": clients,
        "tokens": {name: counted[0][name][0] for name in turns},
        "tokens_per_second": {name: round(rate, 1) for name, rate in rates.items()},
        "share_of_the_engine": {
            name: round(rates[name] / rates["engine"], 3) for name in ("server", "streams")
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    if options.runs < 1:
        parser.error(f"--runs is {options.runs}; expected at least 1")
    if options.threads:
        fast_cpu.enable()
        fast_cpu.set_threads(options.threads)
    found = compare(options.model, options.clients, options.max_tokens, options.runs)
    record = {"setting": {**setting(), "runs": options.runs, "model": Path(options.model).name}}
    text = json.dumps(record | found, indent=None if options.json else 2)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
