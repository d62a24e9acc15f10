"""Examples given from Python, as demonstrations in the order of the updates."""

import warnings
from collections.abc import Mapping, Sequence, Sized
from hashlib import blake2b
from typing import Any, cast

from mlx_lm.tokenizer_utils import TokenizerWrapper

from textpolicy.errors import ConfigError, DataError, TrainingError
from textpolicy.training.sft.batches import BatchStream, Epochs
from textpolicy.training.sft.data import demonstration_digest
from textpolicy.training.sft.demonstrations import Demonstration, Encoding
from textpolicy.training.sft.parameters import SFTParameters

Example = Demonstration | str | Mapping[str, Any]
"""Tokens, a text, or a row in one of the forms that `Encoding` reads."""


def epochs_of(
    train: Sequence[Example], parameters: SFTParameters, tokenizer: TokenizerWrapper | None
) -> Epochs:
    """Return the training examples as batches, in another order in each epoch."""
    return Epochs(
        encode_examples(train, parameters, tokenizer),
        parameters.batch_size * parameters.accumulation,
        parameters.seed,
        parameters.max_length if parameters.packing else None,
    )


def check_examples(name: str, data: object) -> None:
    """Raise DataError for data that is one row, or that can be read only once."""
    # Datasets of other libraries are not sequences, but have a length.
    if isinstance(data, str | bytes | Mapping) or not isinstance(data, Sized):
        raise DataError(
            f"{name} is {data!r:.60}; expected a list of demonstrations, texts or rows. Put a "
            "single row into a list, turn a generator into a list, and pass an empty list for no "
            "data. Read files with load_data"
        )


def encode_examples(
    data: Sequence[Example], parameters: SFTParameters, tokenizer: TokenizerWrapper | None
) -> list[Demonstration]:
    """Return examples as demonstrations, and warn if texts are cut or left out."""
    ready = [one for one in data if isinstance(one, Demonstration)]
    if len(ready) == len(data):
        return ready
    if ready:
        raise DataError(
            f"{len(ready)} of {len(data)} rows are demonstrations, and the others are texts or "
            "rows; expected one kind. Encode the other rows with Encoding"
        )
    placed = [(f"row {n}", _row(n, one)) for n, one in enumerate(data, start=1)]
    if tokenizer is None:
        raise ConfigError(
            "the data holds texts or rows. Pass the tokenizer of the model: tokenizer=..."
        )
    encoding = Encoding(tokenizer=tokenizer, max_length=parameters.max_length)
    found = encoding.encode(placed)
    if found.truncated or found.dropped:
        warnings.warn(
            f"of {len(data)} texts, {found.truncated} are longer than {parameters.max_length} "
            f"tokens and are cut, and {found.dropped} more are left out because their answer lies "
            "beyond that. Split them, or raise max_length",
            stacklevel=3,
        )
    return found.demonstrations


def _row(number: int, one: object) -> Mapping[str, Any]:
    if isinstance(one, str):
        return {"text": one}
    if not isinstance(one, Mapping):
        raise DataError(
            f"row {number} is {one!r:.60}; expected a Demonstration, a text, or a mapping of "
            "columns"
        )
    return cast(Mapping[str, Any], one)


def data_order(source: Epochs | BatchStream, parameters: SFTParameters) -> dict[str, Any]:
    """Return all that decides which rows each update gets; a resumed run must have the same."""
    names = ["batch_size", "accumulation", "packing", "seed"]
    order: dict[str, Any] = {name: getattr(parameters, name) for name in names}
    if isinstance(source, BatchStream):
        return order | {"data": "a stream"}
    content = blake2b(
        b"".join(map(demonstration_digest, source.demonstrations)), digest_size=16
    ).hexdigest()
    return order | {"data": content, "row": source.packed}


def check_data_order(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise TrainingError if two results of `data_order` differ, and say in what."""
    changed = [name for name in now if then.get(name) != now[name]]
    differing = [f"{n}: {then.get(n)!r} before, {now[n]!r} now" for n in changed if n != "data"]
    if "data" in changed:
        # The data is compared by a hash, which would tell people nothing.
        differing.append(
            "data: the demonstrations differ, or their order does. Compare the file, the "
            "tokenizer, and how rows are read and split off for validation"
        )
    if changed:
        raise TrainingError(
            "the checkpoint is of a run with other data or settings:\n  "
            + "\n  ".join(differing)
            + "\nResume with the data and settings of that run, or start a new run"
        )
