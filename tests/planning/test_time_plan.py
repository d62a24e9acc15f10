"""The estimated time of a run grows as its work does."""

from dataclasses import replace

import mlx.core as mx
import pytest

from tests.planning.test_memory_plan import SHAPE
from textpolicy.device_sizes import DeviceSizes
from textpolicy.experiment.announced_time import AnnouncedTime
from textpolicy.planning.time_plan import (
    ModelWork,
    StepWork,
    measure_speeds,
    plan_time,
    rows_to_measure,
    work_of,
)
from textpolicy.planning.unloaded_model import build_unloaded_model

MODEL = ModelWork(blocks=30, block_weights=10**8, head_weights=3 * 10**7, shares_prompts=True)
STEP = StepWork(groups=8, group_size=8, prompt=50, completion=10, held_out=256, adapter_weights=0)

SIZES = DeviceSizes()


def planned(model=MODEL, step=STEP, steps=100, evaluations=3, **changes):
    work = replace(step, **changes)
    speeds = dict.fromkeys(rows_to_measure(work, SIZES), 2e-11)
    return plan_time(model, work, speeds, SIZES, steps=steps, evaluations=evaluations)


def test_a_step_takes_longer_with_more_rows_longer_answers_and_checkpoints():
    usual = planned().step
    assert 1.8 * usual < planned(groups=16).step < 2.2 * usual
    assert planned(completion=20).step > 1.5 * usual
    assert planned(checkpoint_gradients=True).step > 1.15 * usual
    assert planned(updates=2).step > 1.4 * usual
    assert planned(adapter_weights=10**7).step > usual
    assert planned(model=replace(MODEL, shares_prompts=False)).step > 2 * usual


def test_a_run_is_its_steps_and_its_measurements():
    plan = planned(steps=7, evaluations=2)
    assert plan.seconds == 7 * plan.step + 2 * plan.evaluation
    assert planned(held_out=512).evaluation == pytest.approx(2 * plan.evaluation, rel=0.01)
    assert "7 steps" in str(plan) and str(plan).endswith("by an estimate")
    assert str(replace(plan, beside="the judge")).endswith("estimate without the time of the judge")


def test_a_time_that_is_announced_far_too_short_is_corrected_once_by_the_first_steps():
    plan, told = replace(planned(steps=80), step=0.1), []
    announced = AnnouncedTime(plan, told.append)
    for left, seconds in enumerate((9.0, 1.0, 0.9, 0.9, 0.9, 0.9), start=-79):
        announced.step_ended(seconds, -left)
    assert told == [
        "slower than announced: a step takes 0.9 s and not 0.1 s, so about 68 s to go for the 76 "
        "steps that are left"
    ]
    assert plan.correction(0.01, 2000).startswith("faster than announced")
    assert plan.correction(0.19, 1000) == plan.correction(0.9, 10) == ""


@pytest.mark.parametrize(
    ("seconds", "words"), [(5, "about 5 s:"), (600, "about 10 minutes:"), (9000, "2.5 hours")]
)
def test_the_estimate_is_told_in_the_unit_of_its_size(seconds, words):
    plan = replace(planned(steps=1, evaluations=0), step=seconds)
    assert words in str(plan)


def test_the_work_of_a_token_is_that_of_every_matrix_but_the_embedding_table():
    tied = SHAPE | {"num_hidden_layers": 2, "tie_word_embeddings": True}
    work = work_of(build_unloaded_model(tied), tied)
    # Queries, keys, values and outputs; gate, up and down.
    attention = 2 * 128 * 128 + 2 * 128 * 64
    assert work.block_weights == 2 * (attention + 3 * 128 * 384)
    assert work.head_weights == 128 * SHAPE["vocab_size"]
    assert work.blocks == 2 and work.shares_prompts


def test_a_chosen_expert_counts_and_the_others_do_not():
    shape = {**SHAPE, "model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2}
    shape |= {"moe_intermediate_size": 64, "decoder_sparse_step": 1, "mlp_only_layers": []}
    shape |= {"norm_topk_prob": True, "num_hidden_layers": 1}
    one, all_ = (
        work_of(build_unloaded_model(shape), shape | {"num_experts_per_tok": number}).block_weights
        for number in (1, 8)
    )
    assert all_ - one == 7 * 3 * 64 * 128


def test_speeds_are_measured_without_loading_the_model():
    model = build_unloaded_model(SHAPE | {"num_hidden_layers": 2})
    before = mx.get_active_memory()
    speeds = measure_speeds(model, (1, 512))
    # Many rows share the time of reading a matrix.
    assert 0 < speeds[512] < speeds[1] < 1e-6
    assert mx.get_active_memory() - before < 2**20
