"""The options of [sizes] on the command line, and the sizes that `textpolicy doctor` prints."""

import json
from dataclasses import asdict

import pytest
from mlx_lm.models.qwen3 import Qwen3Model

from textpolicy.cli import main
from textpolicy.device_sizes import device_sizes, saturating_rows

GIVEN = {
    "head_chunk_bytes": 5000,
    "micro_batch_tokens": 64,
    "decoding_rows": 2,
    "prefill_tokens": 32,
}
SIZES = (
    *("--head-chunk-bytes", "5000", "--micro-batch-tokens", "64"),
    *("--decoding-rows", "2", "--prefill-tokens", "32"),
)


@pytest.fixture
def decoded_rows(monkeypatch):
    """Return the numbers of rows that models decode together from now on."""
    numbers: list[int] = []
    forward = Qwen3Model.__call__

    def record(self, inputs, *arguments, **named):
        if inputs.shape[1] == 1:
            numbers.append(inputs.shape[0])
        return forward(self, inputs, *arguments, **named)

    monkeypatch.setattr(Qwen3Model, "__call__", record)
    return numbers


def test_doctor_prints_the_sizes_and_where_they_come_from(answer, capsys):
    found = saturating_rows()
    expected = asdict(device_sizes()) | {"rows": found.rows, "source": found.source}
    assert answer("doctor")["sizes"] == expected
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert f"micro-batches of {device_sizes().micro_batch_tokens:,} tokens" in printed
    assert found.source in printed


def test_a_dry_run_shows_and_plans_the_sizes_that_are_set(answer):
    task = ("train", "--env", "sort", "--group-size", "64", "--dry-run")
    usual, small = answer(*task), answer(*task, *SIZES)
    assert usual["sizes"] == asdict(device_sizes())
    assert small["sizes"] == GIVEN
    for peak in ("estimated_training_bytes", "estimated_generation_bytes"):
        assert small[peak] < usual[peak]


def test_supervised_training_takes_the_bytes_of_its_logits(answer, tmp_path):
    rows = [{"prompt": f"{n}+1=", "completion": str(n + 1)} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = ("sft", "--data", str(tmp_path / "rows.jsonl"), "--dry-run", "--batch-size", "32")
    usual, small = answer(*task), answer(*task, "--head-chunk-bytes", "1000")
    assert usual["sizes"] == {"head_chunk_bytes": device_sizes().head_chunk_bytes}
    assert small["sizes"] == {"head_chunk_bytes": 1000}
    assert small["estimated_training_bytes"] <= usual["estimated_training_bytes"]


def test_an_evaluation_decodes_as_many_rows_as_it_is_told(answer, decoded_rows):
    task = ("eval", "--env", "add", "--count", "4")
    usual = answer(*task)
    assert max(decoded_rows) == 4
    decoded_rows.clear()
    narrow = answer(*task, "--decoding-rows", "2", "--prefill-tokens", "32")
    assert max(decoded_rows) == 2
    assert narrow["base"]["reward"] == usual["base"]["reward"]
    assert device_sizes().decoding_rows > 2


def test_a_benchmark_works_with_the_sizes_that_are_set(answer, decoded_rows):
    small = ("--env", "add", "--groups-per-step", "2", "--group-size", "2", "--seconds", "0.001")
    answer("bench", *small, *SIZES)
    assert max(decoded_rows) == 2


def test_a_size_that_is_not_allowed_is_refused_with_what_is(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--env", "add", "--decoding-rows", "0"])
    said = capsys.readouterr().err
    assert "argument --decoding-rows: '0'; expected a whole number, at least 1" in said
