"""Supervised training: the loss, packing, batches, reports, validation and errors."""

import subprocess
import sys
import time
from itertools import chain, islice
from random import Random

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import gpt2, mamba

from tests.tiny import qwen3_model
from textpolicy.adapters.config.adapter_config import AdapterConfig
from textpolicy.adapters.container import AdapterContainer
from textpolicy.errors import ConfigError, DataError, TrainingError
from textpolicy.training.sft import (
    BatchStream,
    Demonstration,
    SFTParameters,
    TrainReport,
    ValidationReport,
    evaluate_sft,
    iterations_of,
    sft_loss,
    train_sft,
)
from textpolicy.training.sft.batches import Epochs, make_sft_batch
from textpolicy.training.sft.loss import make_batch_loss
from textpolicy.training.sft.packing import check_packable, pack_rows
from textpolicy.types import Progress

VOCABULARY = 7
STOP = 6


class Bigram(nn.Module):
    """Row i of `table` holds the logits after token i; no other token matters."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.table = mx.random.normal((VOCABULARY, VOCABULARY), key=mx.random.key(seed))

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.table[tokens]


def demonstration(prompt: list[int], answer: list[int]) -> Demonstration:
    return Demonstration(tokens=prompt + answer, mask=[False] * len(prompt) + [True] * len(answer))


RAGGED = [
    demonstration([1, 2], [3, STOP]),
    demonstration([4], [5, 1, 2, 2, STOP]),
    demonstration([0, 3, 3], [STOP]),
]


def texts(count: int, seed: int = 0) -> list[Demonstration]:
    """Return demonstrations of 3 to 12 of 64 tokens, with prompts of one or two tokens."""
    rng = Random(seed)
    rows = [[rng.randrange(64) for _ in range(rng.randint(3, 12))] for _ in range(count)]
    return [demonstration(row[: n % 2 + 1], row[n % 2 + 1 :]) for n, row in enumerate(rows)]


def loss_and_gradient(model, rows, custom=None):
    (loss, count), gradient = nn.value_and_grad(model, make_batch_loss(model, custom))(
        make_sft_batch(rows)
    )
    return float(loss), int(count), dict(tree_flatten(gradient))


def alone(demonstrations):
    return [[one] for one in demonstrations]


def reference(table: np.ndarray, batch: list[Demonstration]) -> tuple[float, np.ndarray]:
    """Return loss and gradient of a Bigram in float64, one token at a time."""
    pairs = [
        (before, token)
        for row in batch
        for before, token, counts in zip(row.tokens, row.tokens[1:], row.mask[1:], strict=False)
        if counts
    ]
    loss, gradient = 0.0, np.zeros_like(table)
    for before, token in pairs:
        probabilities = np.exp(table[before]) / np.exp(table[before]).sum()
        loss -= np.log(probabilities[token]) / len(pairs)
        gradient[before] += (probabilities - np.eye(VOCABULARY)[token]) / len(pairs)
    return loss, gradient


# The loss


@pytest.mark.parametrize("custom", [None, sft_loss])
def test_loss_and_gradient_of_a_ragged_batch_equal_a_float64_reference(custom):
    model = Bigram()
    loss, count, gradient = loss_and_gradient(model, alone(RAGGED), custom)
    expected_loss, expected_gradient = reference(np.array(model.table, dtype=np.float64), RAGGED)
    assert count == 8
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    np.testing.assert_allclose(np.array(gradient["table"]), expected_gradient, atol=1e-7)


def test_the_step_from_a_stop_token_to_padding_is_not_learned():
    model = Bigram()
    assert make_sft_batch(alone(RAGGED)).mask.sum(axis=1).tolist() == [2, 5, 1]
    _, _, gradient = loss_and_gradient(model, alone(RAGGED))
    # STOP is always the last token of a row, so only padding can follow it.
    assert mx.all(gradient["table"][STOP] == 0)
    assert mx.any(gradient["table"][2, STOP] != 0)


def test_a_loss_without_a_mask_gets_no_padding_targets():
    # The lengths count targets. In mlx-swift-lm, lengths count tokens, and one padding target of
    # every row except the longest is learned.
    everything = [
        Demonstration(tokens=d.tokens, mask=[False, *[True] * 9][: len(d.tokens)]) for d in RAGGED
    ]

    def loss(model, inputs, targets, lengths):
        length_mask = mx.arange(inputs.shape[1])[None, :] < lengths[:, None]
        ntoks = length_mask.sum()
        ce = nn.losses.cross_entropy(model(inputs), targets) * length_mask
        return ce.sum() / ntoks, ntoks

    model = Bigram()
    value, count, gradient = loss_and_gradient(model, alone(everything), loss)
    assert count == sum(len(row.tokens) - 1 for row in RAGGED)
    assert mx.all(gradient["table"][STOP] == 0)
    assert value == pytest.approx(reference(np.array(model.table, np.float64), everything)[0])


def test_prompt_tokens_are_read_and_not_predicted():
    _, _, gradient = loss_and_gradient(Bigram(), [[demonstration([1, 4, 2], [3])]])
    learned = mx.any(gradient["table"] != 0, axis=1)
    assert learned.tolist() == [row == 2 for row in range(VOCABULARY)]


def test_a_custom_loss_without_a_mask_is_not_given_prompts_to_learn():
    def loss(model, inputs, targets, lengths):
        return sft_loss(model, inputs, targets, lengths)

    with pytest.raises(ConfigError, match="do not tell prompts from answers"):
        loss_and_gradient(Bigram(), alone(RAGGED), loss)


def test_the_loss_from_learned_positions_equals_the_loss_from_all_logits():
    model, rows = qwen3_model(), alone(texts(5))
    lean, plain = loss_and_gradient(model, rows), loss_and_gradient(model, rows, sft_loss)
    assert lean[:2] == pytest.approx(plain[:2], rel=1e-6)
    for name, gradient in plain[2].items():
        assert mx.allclose(lean[2][name], gradient, atol=1e-6), name


# Packing


@pytest.mark.parametrize("custom", [None, sft_loss])
@pytest.mark.parametrize("tied", [True, False])
def test_packing_equals_no_packing_in_loss_and_gradient(custom, tied):
    model, batch = qwen3_model(tie_word_embeddings=tied), texts(6)
    packed = [batch[:3], batch[3:4], batch[4:]]
    loss, count, gradient = loss_and_gradient(model, alone(batch), custom)
    packed_loss, packed_count, packed_gradient = loss_and_gradient(model, packed, custom)
    assert (packed_loss, packed_count) == (pytest.approx(loss, rel=1e-5), count)
    for name, expected in gradient.items():
        assert mx.allclose(packed_gradient[name], expected, atol=2e-5), name


def test_every_demonstration_is_packed_once_and_rows_keep_to_their_length():
    batch = texts(40)
    rows = pack_rows(batch, 16, Random(0))
    assert sorted(map(id, chain(*rows))) == sorted(map(id, batch))
    assert max(sum(len(one.tokens) - 1 for one in row) for row in rows) <= 16
    # No two rows could have been one.
    fills = sorted(sum(len(one.tokens) - 1 for one in row) for row in rows)
    assert fills[0] + fills[1] > 16


def test_a_demonstration_too_long_to_pack_has_a_row_of_its_own():
    long = demonstration([1], list(range(1, 30)))
    assert [long] in pack_rows([*texts(3), long], 16, Random(0))


@pytest.mark.parametrize("name", ["learned positions", "recurrence"])
def test_models_that_cannot_separate_packed_demonstrations_are_refused(name):
    if name == "recurrence":
        sizes = {
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
        }
        rest = {"state_size": 8, "conv_kernel": 4, "use_bias": False, "use_conv_bias": True}
        args = {"model_type": "mamba", "time_step_rank": 4} | sizes | rest
        model = mamba.Model(mamba.ModelArgs(**args))
    else:
        sizes = {"n_ctx": 64, "n_embd": 32, "n_head": 2, "n_layer": 1, "n_positions": 64}
        args = {"model_type": "gpt2", "layer_norm_epsilon": 1e-5, "vocab_size": 64} | sizes
        model = gpt2.Model(gpt2.ModelArgs(**args))
    with pytest.raises(ConfigError, match="cannot be packed"):
        check_packable(model)


# Batches


def test_an_epoch_shows_every_demonstration_once_in_an_order_the_seed_decides():
    batch = texts(11)

    def epoch(seed, number=0):
        return list(chain(*chain(*Epochs(batch, 2, seed).epoch(number))))

    assert sorted(map(id, epoch(0))) == sorted(map(id, batch))
    assert epoch(0) == epoch(0)
    assert epoch(0) != epoch(1) and epoch(0) != epoch(0, number=1)


def test_batches_are_sorted_by_length_and_come_in_any_order():
    lengths = [[len(row[0].tokens) for row in rows] for rows in Epochs(texts(64), 4, 0).epoch(0)]
    assert len(lengths) == 16
    assert all(batch == sorted(batch) for batch in lengths)
    # Hardly any padding, and not the shortest first.
    assert sum(4 * max(batch) - sum(batch) for batch in lengths) < 0.05 * sum(map(sum, lengths))
    assert lengths != sorted(lengths)


@pytest.mark.parametrize("packed", [None, 16])
def test_updates_after_some_are_those_of_an_uninterrupted_run(packed):
    source = Epochs(texts(10), 3, 5, packed)
    assert list(islice(source.updates(4), 5)) == list(islice(source.updates(0), 9))[4:]


def test_iterations_of_counts_the_updates_of_epochs():
    batch = texts(10)
    assert iterations_of(3, batch, SFTParameters(batch_size=2, accumulation=2)) == 9
    packed = SFTParameters(batch_size=1, packing=True, max_length=16)
    assert iterations_of(2, batch, packed) == 2 * len(pack_rows(batch, 16, Random(0)))


# Training


def test_training_lowers_the_loss_and_reports_token_means_and_rates():
    model = Bigram()
    losses = [loss_and_gradient(model, alone(RAGGED))[0]]
    reports = []
    train_sft(
        model,
        RAGGED,
        [],
        optim.SGD(learning_rate=0.5),
        parameters=SFTParameters(iterations=5, steps_per_report=2),
        on_progress=lambda report: reports.append(report) or Progress.MORE,
    )
    # The last window is shorter, and its rates are its own.
    assert [report.iteration for report in reports] == [2, 4, 5]
    losses += [report.loss for report in reports]
    assert losses == sorted(losses, reverse=True)
    for report in reports:
        # Eight counted tokens an update: the two rates of a window belong together.
        assert report.tokens_per_second == pytest.approx(8 * report.iterations_per_second)
        assert report.learning_rate == 0.5


def test_the_rate_of_a_shorter_last_report_is_that_of_its_updates():
    class Slow(Bigram):
        def __call__(self, tokens):
            time.sleep(0.02)
            return super().__call__(tokens)

    reports = []
    train_sft(
        Slow(),
        RAGGED,
        [],
        optim.SGD(learning_rate=0.5),
        parameters=SFTParameters(iterations=4, steps_per_report=3),
        on_progress=lambda report: reports.append(report) or Progress.MORE,
    )
    rates = [report.iterations_per_second for report in reports]
    assert all(10 < rate < 50 for rate in rates), rates


def test_a_report_weighs_batches_by_their_tokens():
    model = Bigram()
    batches = [[RAGGED[1]], [RAGGED[2]]]
    losses = [loss_and_gradient(model, alone(batch))[0] for batch in batches]
    reports = []
    train_sft(
        model,
        BatchStream(batches),
        [],
        optim.SGD(learning_rate=0.0),
        parameters=SFTParameters(iterations=2),
        on_progress=lambda report: reports.append(report) or Progress.MORE,
    )
    assert reports[0].loss == pytest.approx((5 * losses[0] + 1 * losses[1]) / 6)


def trained(batch_size, accumulation, **more):
    model = qwen3_model()
    container = AdapterContainer.from_model(model, AdapterConfig(rank=2))
    reports = []
    train_sft(
        model,
        texts(20),
        [],
        optim.SGD(learning_rate=0.1),
        parameters=SFTParameters(
            iterations=3,
            batch_size=batch_size,
            accumulation=accumulation,
            steps_per_report=1,
            **more,
        ),
        on_progress=lambda report: reports.append(report.loss) or Progress.MORE,
    )
    return container.parameters(), reports


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"packing": True, "max_length": 24}])
def test_accumulating_batches_equals_the_big_batch(more):
    whole, losses = trained(6, 1, **more)
    parts, losses_of_parts = trained(1, 6, **more)
    assert losses_of_parts == pytest.approx(losses, rel=1e-5)
    for name, weight in whole.items():
        assert mx.allclose(parts[name], weight, atol=1e-6), name


def test_recomputed_activations_make_the_same_update():
    expected, _ = trained(4, 1)
    found, _ = trained(4, 1, checkpoint_gradients=True)
    for name, weight in expected.items():
        assert mx.allclose(found[name], weight, atol=1e-6), name


def test_only_trainable_weights_move_and_the_mode_is_restored(load_tiny):
    model, _ = load_tiny()
    adapters = AdapterContainer.from_model(model, AdapterConfig(rank=2), seed=0)
    adapted = {name for name, _ in tree_flatten(model.trainable_parameters())}
    before = dict(tree_flatten(model.parameters()))
    model.eval()
    parameters = SFTParameters(iterations=2)
    train_sft(model, RAGGED, RAGGED, optim.SGD(learning_rate=0.1), parameters=parameters)
    after = dict(tree_flatten(model.parameters()))
    moved = {name for name, value in after.items() if not mx.array_equal(value, before[name])}
    assert moved == adapted
    assert not model.training
    assert adapters.version == 2


def test_a_16_bit_base_is_trained_by_float32_adapters(load_tiny):
    model, _ = load_tiny()
    model.set_dtype(mx.bfloat16)
    container = AdapterContainer.from_model(model, AdapterConfig(rank=4))
    before = evaluate_sft(model, RAGGED)
    parameters = SFTParameters(iterations=6)
    train_sft(model, RAGGED, [], optim.Adam(learning_rate=1e-2), parameters=parameters)
    assert {array.dtype for array in container.parameters().values()} == {mx.float32}
    assert evaluate_sft(model, RAGGED) < before / 2


def test_validation_runs_first_periodically_and_last_and_is_a_mean_over_tokens():
    model, events = Bigram(), []
    before = evaluate_sft(model, RAGGED)
    result = train_sft(
        model,
        RAGGED,
        RAGGED,
        optim.SGD(learning_rate=0.5),
        parameters=SFTParameters(
            iterations=5, batch_size=2, steps_per_eval=2, steps_per_report=4, validation_batches=0
        ),
        on_progress=lambda event: events.append(event) or Progress.MORE,
    )
    order = [(type(event), event.iteration) for event in events]
    assert order == [
        (ValidationReport, 0),
        (ValidationReport, 2),
        (TrainReport, 4),
        (ValidationReport, 4),
        (TrainReport, 5),
        (ValidationReport, 5),
    ]
    expected, _ = reference(np.array(Bigram().table, np.float64), RAGGED)
    assert events[0].loss == pytest.approx(before) == pytest.approx(expected, rel=1e-5)
    assert result.validation_loss == events[-1].loss == evaluate_sft(model, RAGGED, batch_size=2)
    assert result.best_iteration == 5 and result.best_loss < before


def test_a_number_of_validation_batches_selects_the_same_rows_every_time():
    model, rows = qwen3_model(), texts(30)
    some = [evaluate_sft(model, rows, batch_size=2, batches=3) for _ in range(2)]
    assert some[0] == some[1] != evaluate_sft(model, rows)
    assert evaluate_sft(model, rows, batches=100) == pytest.approx(evaluate_sft(model, rows))


def test_evaluation_uses_no_dropout_and_keeps_the_training_mode():
    model = qwen3_model()
    container = AdapterContainer.from_model(model, AdapterConfig(rank=2, dropout=0.5))
    container.swap({name: array + 0.1 for name, array in container.parameters().items()})
    model.train()
    assert evaluate_sft(model, texts(4)) == evaluate_sft(model, texts(4))
    assert model.training


def test_training_ends_early_when_validation_no_longer_improves():
    # The validation data contradicts the training data.
    other = [demonstration([1, 2], [0, 0, 0])]
    result = train_sft(
        Bigram(),
        RAGGED,
        other,
        optim.SGD(learning_rate=1.0),
        parameters=SFTParameters(iterations=100, steps_per_eval=5, patience=3),
    )
    assert result.ended == "early"
    assert result.iteration == result.best_iteration + 3 * 5 < 100


def test_data_begins_after_the_completed_iterations():
    seen = []

    def loss(model, inputs, targets, lengths, *, mask):
        seen.append(inputs.tolist())
        return sft_loss(model, inputs, targets, lengths, mask=mask)

    def run(completed):
        seen.clear()
        parameters = SFTParameters(iterations=6, batch_size=1, completed_iterations=completed)
        result = train_sft(Bigram(), RAGGED, [], optim.SGD(0.1), parameters=parameters, loss=loss)
        return result.iteration, list(seen)

    done, every = run(0)
    assert run(4) == (done, every[4:]) and len(every) == 6
    assert run(6) == (6, [])


def test_texts_and_rows_are_read_with_the_tokenizer(load_tiny):
    model, tokenizer = load_tiny()
    AdapterContainer.from_model(model, AdapterConfig(rank=2))
    data = ["sort 312", {"text": "sort 312"}, {"prompt": "1+1=", "completion": "2"}]
    parameters = SFTParameters(iterations=1)
    train_sft(model, data, data[:1], optim.SGD(0.1), parameters=parameters, tokenizer=tokenizer)
    assert evaluate_sft(model, data[:1], tokenizer=tokenizer) == evaluate_sft(
        model, data[1:2], tokenizer=tokenizer
    )
    with pytest.raises(ConfigError, match="Pass the tokenizer"):
        train_sft(model, data, [], optim.SGD(0.1))


def test_texts_that_are_cut_are_warned_about(load_tiny):
    model, tokenizer = load_tiny()
    with pytest.warns(UserWarning, match="1 are longer than 4 tokens and are cut"):
        evaluate_sft(model, ["sort 31245", "1+"], tokenizer=tokenizer, max_length=4)


# What is refused


def test_a_model_with_nothing_to_train_is_refused():
    model = Bigram()
    model.freeze()
    with pytest.raises(TrainingError, match="no trainable weights"):
        train_sft(model, RAGGED, [], optim.SGD(learning_rate=0.1))


def test_nothing_to_train_on_is_refused():
    with pytest.raises(TrainingError, match="no demonstrations to train on"):
        train_sft(Bigram(), [], [], optim.SGD(learning_rate=0.1))


@pytest.mark.parametrize("place", ["loss", "gradient"])
def test_no_update_is_made_of_a_loss_or_gradient_that_is_not_finite(place):
    def loss(model, inputs, targets, lengths, *, mask):
        value, tokens = sft_loss(model, inputs, targets, lengths, mask=mask)
        # The gradient of a root at 0 is infinite.
        bad = mx.array(float("nan")) if place == "loss" else mx.sqrt(model.table[0, 0] * 0)
        return value + bad, tokens

    model = Bigram()
    before = mx.array(model.table)
    with pytest.raises(TrainingError, match=f"the {place} is (nan|inf) after 0 iterations"):
        train_sft(model, RAGGED, [], optim.SGD(learning_rate=0.1), loss=loss)
    assert mx.array_equal(model.table, before)


def test_a_validation_loss_that_is_not_finite_stops_the_run():
    model = Bigram()
    model.table[0] = float("nan")
    bad = [demonstration([0], [3])]
    with pytest.raises(TrainingError, match="the validation loss is nan after 0 iterations"):
        train_sft(model, RAGGED[:2], bad, optim.SGD(learning_rate=0.1))


def test_patience_without_validation_is_refused():
    with pytest.raises(ConfigError, match="patience is 3, and there is no validation data"):
        train_sft(Bigram(), RAGGED, [], optim.SGD(0.1), parameters=SFTParameters(patience=3))


def test_paths_may_be_strings(tmp_path):
    model = qwen3_model()
    AdapterContainer.from_model(model, AdapterConfig(rank=2))
    names = {name: str(tmp_path / f"{name}.safetensors") for name in ("adapter", "best")}
    paths = {f"{name}_path": path for name, path in names.items()}
    parameters = SFTParameters(iterations=1, **paths)
    train_sft(model, texts(4), texts(2), optim.SGD(0.1), parameters=parameters)
    found = {str(path) for path in tmp_path.rglob("*.safetensors")}
    assert found == set(paths.values())


def test_a_loss_without_a_gradient_is_refused():
    def loss(model, inputs, targets, lengths, *, mask):
        return mx.array(1.0), mask.sum()

    with pytest.raises(TrainingError, match="gradient of the first update is exactly zero"):
        train_sft(Bigram(), RAGGED, [], optim.SGD(learning_rate=0.1), loss=loss)


@pytest.mark.parametrize("mask", [[False, False], [True, True], []])
def test_a_demonstration_must_have_something_to_learn(mask):
    with pytest.raises(TrainingError, match="at least one token to learn"):
        Demonstration(tokens=[1] * len(mask), mask=mask)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"validation_batches": -1}, "validation_batches is -1"),
        ({"patience": 0}, "patience is 0"),
        (
            {"completed_iterations": 7, "iterations": 5},
            "completed_iterations is 7, and iterations is 5",
        ),
    ],
)
def test_invalid_parameters_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        SFTParameters(**options)


# The tests check argument types before a function runs, so this code runs in another process.
NO_ROWS = """
import mlx.nn as nn, mlx.optimizers as optim
from textpolicy.errors import DataError
from textpolicy.training.sft import BatchStream, evaluate_sft, train_sft

model, optimizer = nn.Linear(2, 2), optim.SGD(0.1)
for data in ("a text", (text for text in ["a"]), None, {"text": "a"}):
    for call in (
        lambda: train_sft(model, data, [], optimizer),
        lambda: train_sft(model, [], data, optimizer),
        lambda: evaluate_sft(model, data),
    ):
        try:
            call()
        except DataError as error:
            print(error)
for data in (BatchStream(["a text"]), BatchStream([["a text"]]), BatchStream([5]), ["a", 5]):
    try:
        train_sft(model, data, [], optimizer)
    except DataError as error:
        print(error)
"""


@pytest.mark.slow
def test_data_that_is_no_list_of_rows_is_refused():
    argv = [sys.executable, "-c", NO_ROWS]
    ended = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=120)
    assert (ended.returncode, ended.stderr) == (0, "")
    told = [line.partition("; expected a ")[0] for line in ended.stdout.splitlines()]
    wrong = ["'a text'", "<generator", "None", "{'text': 'a'}"]
    begun = [f"{name} is {what}" for what in wrong for name in ("train", "validate", "data")]
    begun += [f"a batch of the stream is {what}" for what in ("'a text'", "['a text']", "5")]
    begun += ["row 2 is 5"]
    assert all(line.startswith(start) for line, start in zip(told, begun, strict=True)), told


def test_demonstrations_among_texts_are_refused(load_tiny):
    data, optimizer = [*RAGGED, "a"], optim.SGD(learning_rate=0.1)
    with pytest.raises(DataError, match="3 of 4 rows are demonstrations"):
        train_sft(Bigram(), data, [], optimizer, tokenizer=load_tiny()[1])


def test_a_stream_whose_batch_is_empty_is_refused():
    with pytest.raises(DataError, match=r"a batch of the stream is \[\]; expected a list of"):
        train_sft(Bigram(), BatchStream([[]]), [], optim.SGD(learning_rate=0.1))


@pytest.mark.parametrize("validate", [[], RAGGED])
def test_a_loss_that_counts_no_tokens_is_refused(validate):
    def loss(model, inputs, targets, lengths, *, mask):
        return sft_loss(model, inputs, targets, lengths, mask=mask)[0], mx.array(0)

    with pytest.raises(
        TrainingError, match="the loss reports a mean over 0 tokens; at least 1 is expected"
    ):
        train_sft(Bigram(), RAGGED, validate, optim.SGD(learning_rate=0.1), loss=loss)


@pytest.mark.parametrize(
    ("answer", "got"),
    [
        (lambda loss, tokens: loss, r"an array of the shape \(\)"),
        (lambda loss, tokens: None, "None"),
        (lambda loss, tokens: (loss, tokens, tokens), r"\(an array .*, an array .*, an array .*\)"),
        (lambda loss, tokens: (mx.zeros(3) + loss, tokens), r"\(an array of the shape \(3,\), .*"),
        (lambda loss, tokens: (loss, "many"), r"\(an array of the shape \(\), 'many'\)"),
    ],
)
def test_a_loss_that_returns_no_mean_and_count_is_refused(answer, got):
    def loss(model, inputs, targets, lengths, *, mask):
        return answer(*sft_loss(model, inputs, targets, lengths, mask=mask))

    with pytest.raises(TrainingError, match=f"^the loss returned {got}; expected a pair"):
        train_sft(Bigram(), RAGGED, [], optim.SGD(learning_rate=0.1), loss=loss)


def test_a_loss_may_return_a_python_int_as_its_number_of_tokens():
    def loss(model, inputs, targets, lengths, *, mask):
        return sft_loss(model, inputs, targets, lengths, mask=mask)[0], 2 * len(inputs)

    parameters = SFTParameters(iterations=1)
    train_sft(Bigram(), RAGGED, [], optim.SGD(0.1), loss=loss, parameters=parameters)


def test_a_callback_may_return_none_and_nothing_else_but_progress():
    parameters, seen = SFTParameters(iterations=3, steps_per_report=1), []
    arguments = {"parameters": parameters, "on_progress": seen.append}
    assert train_sft(Bigram(), RAGGED, [], optim.SGD(0.1), **arguments).iteration == len(seen) == 3
    arguments["on_progress"] = lambda event: True
    with pytest.raises(ConfigError, match=r"the callback on_progress returned True; return "):
        train_sft(Bigram(), RAGGED, [], optim.SGD(0.1), **arguments)
