"""Recorded decode steps give the numbers of the model, and end when the model changes."""

import os
import subprocess
import sys
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import pytest

from tests.generation.test_generation import RAGGED, row_of
from textpolicy.adapters import AdapterConfig, AdapterContainer, quantize
from textpolicy.adapters.layers.adapter_layer import AdapterLayer
from textpolicy.fast_cpu.mlx_operations import can_record, recording
from textpolicy.generation.decode_step import logits_by_model
from textpolicy.generation.decoding_batch import DecodingRow
from textpolicy.generation.engine import Engine
from textpolicy.generation.prompts import encode_prompt
from textpolicy.types import Sampling

pytestmark = pytest.mark.skipif(not can_record(), reason="steps are recorded on a Linux CPU")


def counted(model: nn.Module) -> list[int]:
    """Let the model list the number of rows of each call of its Python code."""
    calls: list[int] = []
    plain = type(model)

    class Counted(plain):
        def __call__(self, tokens, **options):
            calls.append(tokens.shape[0])
            return super().__call__(tokens, **options)

    model.__class__ = Counted
    return calls


def rows_of(tokenizer, max_tokens: int = 40) -> list[DecodingRow]:
    return [
        row_of(
            encode_prompt(tokenizer, prompt),
            member=number,
            stop=lambda tokens: None,
            sampling=Sampling(max_tokens=max_tokens + number),
        )
        for number, prompt in enumerate(RAGGED)
    ]


def results_of(engine: Engine, rows: list[DecodingRow]) -> list[tuple[list[int], list[float]]]:
    for row in rows:
        engine.submit([row])
    while engine.can_step:
        engine.step()
    return [(row.tokens, row.logprobs) for row in rows]


def by_model(model: nn.Module, rows: list[DecodingRow]) -> list[tuple[list[int], list[float]]]:
    """Return the same from an engine that records nothing."""
    engine = Engine(model)
    engine._recorder.next_logits = partial(logits_by_model, model)
    return results_of(engine, rows)


def adapted(model: nn.Module, scale: float = 2.0) -> AdapterContainer:
    container = AdapterContainer.from_model(model, AdapterConfig(rank=4, scale=scale))
    container.swap({name: array + 0.02 for name, array in container.parameters().items()})
    return container


@pytest.mark.parametrize("launch_ahead", [False, True])
@pytest.mark.parametrize("kind", ["plain", "adapted", "quantized"])
def test_a_record_gives_the_bits_of_the_model_without_its_python_code(
    load_tiny, kind, launch_ahead
):
    model, tokenizer = load_tiny()
    if kind == "quantized":
        quantize(model, bits=4, group_size=32)
    if kind != "plain":
        adapted(model)
    expected = by_model(model, rows_of(tokenizer))
    calls = counted(model)
    assert results_of(Engine(model, launch_ahead=launch_ahead), rows_of(tokenizer)) == expected
    # Prompts, ten steps, the record, and the comparison; then ten steps of two rows, and one row.
    assert len(calls) < 35
    calls.clear()
    by_model(model, rows_of(tokenizer))
    assert len(calls) > 40


def test_a_cache_grows_beyond_its_memory_between_records(load_tiny):
    model, tokenizer = load_tiny()
    model.eval()
    expected = by_model(model, rows_of(tokenizer, max_tokens=300))
    calls = counted(model)
    assert results_of(Engine(model), rows_of(tokenizer, max_tokens=300)) == expected
    assert len(calls) < 60


CHANGES = {
    "adapters": lambda model, container: container.swap(
        {name: 2 * array for name, array in container.parameters().items()}
    ),
    "scale": lambda model, container: first_layer(container).set_scale(-3.0),
    "gate": lambda model, container: first_layer(container).set_enabled(mx.array(False)),
    "layer": lambda model, container: setattr(model.layers[1], "mlp", model.layers[0].mlp),
    "option": lambda model, container: setattr(model.layers[0].input_layernorm, "eps", 0.5),
}


def first_layer(container: AdapterContainer) -> AdapterLayer:
    return next(iter(container.layers().values()))


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_model_is_in_the_next_step(load_tiny, change):
    def decoded(*, record: bool = True, changed: bool = True) -> list[float]:
        model, _ = load_tiny()
        container = adapted(model)
        engine = Engine(model)
        if not record:
            engine._recorder.next_logits = partial(logits_by_model, model)
        row = row_of([5, 6, 7], stop=lambda tokens: None, sampling=Sampling(max_tokens=40))
        engine.submit([row])
        for _ in range(20):
            engine.step()
        assert bool(engine._recorder._records) == record
        if changed:
            CHANGES[change](model, container)
        while engine.can_step:
            engine.step()
        return row.logprobs

    assert decoded() == decoded(record=False)
    assert decoded()[:20] == decoded(changed=False)[:20]
    assert decoded()[20] != decoded(changed=False)[20]


class AsksForItsLength(nn.Module):
    """A model that asks a cache for a number that changes from step to step."""

    def __init__(self, model: nn.Module, ask) -> None:
        super().__init__()
        self.inner = model
        self.ask = ask

    @property
    def layers(self):
        return self.inner.layers

    def __call__(self, tokens, cache=None):
        logits = self.inner(tokens, cache=cache)
        return logits * self.ask(cache) if cache and tokens.shape[1] == 1 else logits


@pytest.mark.parametrize(
    "ask",
    [
        pytest.param(lambda cache: 1 + 1 / cache[0].used, id="a number that no record has"),
        pytest.param(lambda cache: cache[0].offset[0].item(), id="a number of an array"),
        pytest.param(
            lambda cache: 1 + (cache[0].keys[0, 0, :, 0] != 0).sum(), id="no number at all"
        ),
        pytest.param(
            lambda cache: 1 + 9 * (type(cache[0]).__name__ == "_RecordedCache"),
            id="a record that differs",
        ),
    ],
)
def test_a_model_whose_step_depends_on_more_decodes_by_its_python_code(load_tiny, ask):
    model, tokenizer = load_tiny()
    asking = AsksForItsLength(model, ask).eval()
    expected = by_model(asking, rows_of(tokenizer))
    assert results_of(Engine(asking), rows_of(tokenizer)) == expected


def test_records_are_dropped_when_no_row_decodes(load_tiny):
    model, tokenizer = load_tiny()
    engine = Engine(model)
    rows = rows_of(tokenizer)
    for row in rows:
        engine.submit([row])
    kept = 0
    while engine.can_step:
        engine.step()
        kept = max(kept, len(engine._recorder._records))
    assert kept > 0 and not engine._recorder._records


def test_recording_joins_no_operations_and_joins_them_afterwards(tmp_path):
    def names_of(record: bool) -> str:
        function = mx.compile(lambda x: mx.exp(x) * 2 + 1)
        if record:
            with recording():
                y = function(mx.ones(3))
        else:
            y = function(mx.ones(3))
        mx.export_to_dot(str(tmp_path / "graph"), y)
        return (tmp_path / "graph").read_text()

    assert "CompiledExp" not in names_of(record=True)
    assert "CompiledExp" in names_of(record=False)


def test_whoever_turns_compiling_off_gets_no_records():
    program = (
        "import mlx.core as mx\n"
        "from textpolicy.fast_cpu.mlx_operations import can_record\n"
        "print(can_record())\n"
        "mx.disable_compile()\n"
        "print(can_record())\n"
    )
    for environment, expected in (
        ({}, "True\nFalse\n"),
        ({"MLX_DISABLE_COMPILE": "1"}, "False\nFalse\n"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, **environment},
        )
        assert done.stdout == expected
