"""Recorded decode steps give the numbers of the model, and end when the model changes."""

import os
import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import pytest

from tests.generation.test_generation import RAGGED, row_of
from textpolicy.adapters import AdapterConfig, AdapterContainer, quantize
from textpolicy.adapters.layers.adapter_layer import AdapterLayer
from textpolicy.fast_cpu import decoder_block
from textpolicy.fast_cpu.mlx_operations import can_record, recording
from textpolicy.generation import recorded_step
from textpolicy.generation.decoding_batch import DecodingRow
from textpolicy.generation.engine import Engine
from textpolicy.generation.prefix_cache import PrefixCache
from textpolicy.generation.prompts import encode_prompt
from textpolicy.types import Sampling

pytestmark = pytest.mark.skipif(not can_record(), reason="steps are recorded on a Linux CPU")


@pytest.fixture(autouse=True)
def plain_blocks(monkeypatch) -> None:
    """Let blocks compute their steps by operations of mlx, as those of most models do.

    Steps of compiled blocks are not recorded.
    """
    monkeypatch.setattr(decoder_block.CompiledLinear, "of", lambda layer: None)


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
    return results_of(Engine(model, record_steps=False), rows)


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
        engine = Engine(model, record_steps=record)
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


class Scaled(nn.Module):
    """A model whose logits are multiplied by what `factor` makes of the cache."""

    def __init__(self, model: nn.Module, factor) -> None:
        super().__init__()
        self.inner = model
        self.factor = factor
        self.calls = 0

    @property
    def layers(self):
        return self.inner.layers

    def __call__(self, tokens, cache=None):
        self.calls += 1
        logits = self.inner(tokens, cache=cache)
        return logits * self.factor(cache) if cache and tokens.shape[1] == 1 else logits


class Uncounted(Scaled):
    """The same without a number that changes in each step."""

    def __setattr__(self, name, value):
        if name != "calls":
            super().__setattr__(name, value)

    calls = 0


@pytest.mark.parametrize(
    ("factor", "kind"),
    [
        pytest.param(lambda cache: 1 + 1 / cache[0].used, Uncounted, id="a number of the cache"),
        pytest.param(lambda cache: cache[0].offset[0].item(), Uncounted, id="a number of an array"),
        pytest.param(lambda cache: keys_of(cache).shape[2], Uncounted, id="the length of the keys"),
        pytest.param(lambda cache: mx.array(1.0), Scaled, id="a model that counts its calls"),
    ],
)
def test_a_model_that_no_record_can_stand_for_runs_in_each_step(load_tiny, factor, kind):
    model, tokenizer = load_tiny()
    other = kind(model, factor).eval()
    expected = results_of(Engine(other, record_steps=False), rows_of(tokenizer))
    engine = Engine(other)
    assert results_of(engine, rows_of(tokenizer)) == expected
    assert not engine._recorder._can_record and not Engine(other)._recorder._can_record


def keys_of(cache) -> mx.array:
    """Return the keys that attention gets, which are more in a record."""
    keys = cache[0].keys
    return keys if type(cache[0]).__name__ == "_RecordedCache" else keys[:, :, : cache[0].used]


def test_a_model_with_other_operations_of_its_own_is_recorded(load_tiny):
    model, tokenizer = load_tiny()
    other = Uncounted(model, lambda cache: 1 + cache[0].offset[:, None, None] / 64).eval()
    expected = results_of(Engine(other, record_steps=False), rows_of(tokenizer))
    calls = counted(other)
    assert results_of(Engine(other), rows_of(tokenizer)) == expected
    assert len(calls) < 40


def test_records_are_dropped_when_no_row_decodes(load_tiny):
    model, tokenizer = load_tiny()
    engine = Engine(model)
    rows = rows_of(tokenizer)
    for row in rows:
        engine.submit([row])
    had_records = False
    while engine.can_step:
        engine.step()
        had_records = had_records or bool(engine._recorder._records)
    assert had_records and not engine._recorder._records


@pytest.mark.parametrize("most", [1, 8])
@pytest.mark.parametrize("launch_ahead", [False, True])
def test_rows_enter_and_continue_between_steps_from_records(
    load_tiny, monkeypatch, launch_ahead, most
):
    monkeypatch.setattr(recorded_step, "_MOST_RECORDS", most)
    model, tokenizer = load_tiny()

    def decoded(*, record: bool) -> tuple[list[list[float]], bool]:
        engine = Engine(
            model, launch_ahead=launch_ahead, record_steps=record, prefixes=PrefixCache(2**20)
        )
        waiting = rows_of(tokenizer, max_tokens=60)
        for row in waiting:
            row.may_continue = row.keep_prefix = True
        turns, steps, had_records = [], 0, False
        while engine.can_step or waiting:
            if steps % 17 == 0 and waiting:
                engine.submit([waiting.pop()])
            for row in engine.step():
                turns.append(row)
                if len(turns) < 7:
                    engine.reply(row, [7, 8, 9])
            had_records = had_records or bool(engine._recorder._records)
            steps += 1
        return [turn.logprobs for turn in turns], had_records

    (found, had_records), (expected, _) = decoded(record=True), decoded(record=False)
    assert had_records and len(found) == 10
    assert found == expected


def test_comparing_a_record_takes_no_second_cache(load_tiny):
    model, _ = load_tiny()
    model.model.layers = model.model.layers * 4

    def peak(*, record: bool) -> int:
        rows = [
            row_of([5] * 1000, member=n, stop=lambda _: None, sampling=Sampling(max_tokens=40))
            for n in range(8)
        ]
        engine = Engine(model, record_steps=record)
        engine.submit(rows)
        engine.step()
        mx.reset_peak_memory()
        while engine.can_step:
            engine.step()
        return mx.get_peak_memory()

    layer = 2 * 8 * 1040 * 4 * model.layers[0].self_attn.k_proj.weight.shape[0]
    assert len(model.layers) == 8
    # mlx begins with one layer before it has freed the copy of the one before.
    assert peak(record=True) < peak(record=False) + 3 * layer


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
    with pytest.raises(ValueError, match="interrupted"), recording():
        raise ValueError("interrupted")
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
