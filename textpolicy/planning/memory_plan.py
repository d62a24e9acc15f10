"""The memory that a run needs, estimated from a model's config.json alone.

A plan is a list of arrays: the name of each, its bytes, and the phases of a step in which it is in
memory. A peak is the largest sum over the arrays of one phase. Measured peaks on a CPU are within
15 % of the estimates (tests/planning/test_memory_plan.py). On other devices, `textpolicy train
--dry-run --measure` corrects the estimates.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import BatchKVCache, KVCache, make_prompt_cache

from textpolicy import fast_cpu
from textpolicy.adapters.config.adapter_config import AdapterConfig
from textpolicy.adapters.module_tree import named_arrays
from textpolicy.adapters.quantization.number_formats import WHOLE_ROW, format_by_name
from textpolicy.adapters.quantization.packed_product import is_unpacked
from textpolicy.device_sizes import DeviceSizes, device_sizes
from textpolicy.errors import ConfigError, ModelError
from textpolicy.fast_cpu.array_slices import SLICE_SIZE
from textpolicy.fast_cpu.bfloat16_copies import FEWEST_NUMBERS
from textpolicy.fast_cpu.mlx_operations import reason_of_none
from textpolicy.fast_cpu.packed_weights import unpacks
from textpolicy.machine import most_copied_bytes
from textpolicy.planning.adapter_plan import AdapterPlan, PlannedModule, plan_adapters
from textpolicy.planning.largest_micro_batch import MicroBatch, largest_micro_batch
from textpolicy.planning.unloaded_model import build_unloaded_model
from textpolicy.serving.engine_queue import SERVED_PREFIX_BYTES
from textpolicy.training.output_head import COMPILED_CHUNK

# Sampling merges adapters if it is asked to, reads prompts, copies their caches to all rows, grows
# caches, and draws tokens. Training goes backward through blocks or through the output head, and
# updates the adapters.
_SAMPLING = ("merging", "prefill", "fan out", "cache growth", "drawing")
_TRAINING = ("blocks", "head", "update")
_DECODING, _BACKWARD = _SAMPLING[3:], _TRAINING[:2]

# Measured on a CPU: how many arrays of a size mlx has in memory at once.
_LOGITS, _TRAINED_LOGITS = 4.5, 6.7  # of all logits; with a trained head
_CHUNKS, _TRAINED_CHUNKS = 8.5, 11.5  # of a chunk, with the memory for the next one
_TRAINED_LOGITS_COMPILED, _TRAINED_CHUNKS_COMPILED = 5, 9.1  # where operations are compiled
_INNER, _HIDDEN, _QUERIES = 4.5, 2, 4  # of these widths, in the backward pass of a block
_GATE_SLICES, _SCORE_SLICES = 7, 8  # of the feed-forward and the attention layer there
_PREFILL_SLICES = 5.5  # of attention scores in a forward pass
# While tokens are decoded, mlx unpacks quantized matrices ahead: those of one block in these modes,
# and where compiled operations unpack them; else a share of all, because mlx computes a number of
# operations ahead. With compiled operations a block has fewer of them, so the share is larger.
_UNPACKED_IN_TURN = ("nf4", "mxfp8")
_UNPACKED_SHARE, _UNPACKED_SHARE_COMPILED = 1 / 4, 3 / 8
# In the backward pass, those of one product, or of a feed-forward layer.
_UNPACKED_COMPILED = 3

_FLOAT = mx.float32.size
_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkvo")
_PROJECTIONS = (*_ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
# Modules that read the same array, which the backward pass keeps once.
_SAME_INPUT = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


class PlannedArray(NamedTuple):
    """The bytes of an array, or of several with one purpose, and the phases that need it."""

    bytes: int
    phases: Sequence[str]


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The arrays of a run by name, all of them estimates."""

    arrays: Mapping[str, PlannedArray]

    @property
    def estimated_training_bytes(self) -> int:
        """The peak of a training step."""
        return self._peak(_TRAINING)

    @property
    def estimated_generation_bytes(self) -> int:
        """The peak of sampling the batch."""
        return self._peak(_SAMPLING)

    @property
    def peaks(self) -> dict[str, int]:
        """The peaks of sampling and of training."""
        return {"sampling": self._peak(_SAMPLING), "training": self._peak(_TRAINING)}

    def _peak(self, phases: Sequence[str]) -> int:
        return max(sum(a.bytes for a in self.arrays.values() if p in a.phases) for p in phases)


def plan_memory(
    model: nn.Module | Mapping[str, Any],
    config: AdapterConfig | None = None,
    *,
    batch: int,
    prompt_tokens: int,
    completion_tokens: int,
    group_size: int = 1,
    segments: int = 1,
    agents: int | None = None,
    micro_batch_size: int | None = None,
    checkpoint_gradients: bool = False,
    dtype: mx.Dtype | None = None,
    stored: mx.Dtype | None = None,
    reference: Mapping[str, Any] | None = None,
    sizes: DeviceSizes | None = None,
    merge_adapters: bool = False,
) -> MemoryPlan:
    """Return the memory to sample `batch` completions and to train on them with Adam.

    `model` is a model without adapters, or the content of its config.json; no weight is loaded.
    `group_size` completions share a prompt. With `agents`, so many rollouts are played at once, and
    each asks with prompts of its own; a rollout has `segments`, each with a prompt and a completion
    of these lengths. `stored` is the dtype of the checkpoint: decoding on a CPU keeps copies of
    bfloat16 weights. `reference` is the config.json of another model whose weights are in memory,
    such as a teacher. `sizes` are by default those of this device. With `merge_adapters`, the
    sampler has a copy of the adapted weights. Raise ModelError for a model whose blocks are not
    built like those of Llama, Mistral, Qwen2 and Qwen3.
    """
    if batch < 1 or group_size < 1 or batch % group_size:
        raise ConfigError(f"batch is {batch}; expected a multiple of group_size, {group_size}")
    if segments < 1:
        raise ConfigError(f"segments is {segments}; expected at least 1")
    # A module is a mapping too.
    sizes = sizes or device_sizes()
    network = model if isinstance(model, nn.Module) else build_unloaded_model(model, dtype)
    planned = plan_adapters(network, config or AdapterConfig())
    caches = make_prompt_cache(network)
    block = _Block(network, planned, [getattr(layer, "max_size", None) for layer in caches])
    teacher = build_unloaded_model(reference).parameters() if reference else {}
    teacher_bytes = sum(array.nbytes for array in named_arrays(teacher).values())
    # Training reads a prompt once for all its rows if the caches hold nothing but keys and values.
    shares = all(type(layer) is KVCache for layer in caches)
    part = largest_micro_batch(
        batch // group_size,
        group_size,
        segments,
        (prompt_tokens, completion_tokens),
        size=micro_batch_size,
        tokens=sizes.micro_batch_tokens,
        share_prompts=shares,
    )
    accumulated = 2 if part.is_part else 1
    # The last token of a prompt is read together with the completion.
    lengths = (prompt_tokens - 1, completion_tokens)
    together = group_size if agents is None else 1
    most = sizes.decoding_rows if agents is None else min(agents, sizes.decoding_rows)
    prompts = min(batch // together, max(1, most // together))
    # Of agents, texts that are not sampled any more are kept, for later requests.
    kept = 0 if agents is None else max(0, batch * segments - agents)
    always, adapters = (*_SAMPLING, *_TRAINING), planned.adapter_bytes
    return MemoryPlan(
        {
            "weights": PlannedArray(planned.base_bytes, always),
            "bfloat16 copies": PlannedArray(_copies(planned, stored), always),
            "reference": PlannedArray(teacher_bytes, always),
            **(_merged_arrays(planned, always) if merge_adapters else {}),
            "adapters": PlannedArray(adapters, always),
            # A run's sampler has adapters of its own, which follow those of the trainer.
            "sampler's adapters": PlannedArray(adapters, always),
            "optimizer": PlannedArray(2 * adapters, always),
            "gradients": PlannedArray(accumulated * adapters, _TRAINING),
            "new adapters": PlannedArray(adapters, ["update"]),
            "clipped gradients": PlannedArray(accumulated * adapters, ["update"]),
            **_backward_arrays(
                block, part, lengths, sizes, shares=shares, checkpoints=checkpoint_gradients
            ),
            **_sampling_arrays(block, prompts, together, lengths, sizes),
            "agents' conversations": PlannedArray(
                min(kept * block.cache_bytes(sum(lengths)), SERVED_PREFIX_BYTES), _SAMPLING
            ),
        }
    )


class _Block:
    """The widths of a transformer block, and what its adapters keep for the backward pass."""

    def __init__(
        self, model: nn.Module, planned: AdapterPlan, windows: Sequence[int | None]
    ) -> None:
        modules, rows = dict(model.named_modules()), {row.path: row for row in planned.modules}
        try:
            args, blocks = cast(Any, model).args, cast(list[nn.Module], cast(Any, model).layers)
            first = next(path for path, module in modules.items() if module is blocks[0])
            shapes = [rows[f"{first}.{name}"].shape for name in _PROJECTIONS]
            norm: mx.array = modules[f"{first}.input_layernorm"]["weight"]
            self.norms_heads = f"{first}.self_attn.q_norm" in modules
            self.heads, self.vocabulary = int(args.num_attention_heads), int(args.vocab_size)
            if more := blocks[0].children().keys() - _PARTS:
                raise KeyError(f"extra {', '.join(sorted(more))}")
            if len({frozenset(dict(block.named_modules())) for block in blocks}) > 1:
                raise KeyError("blocks of several kinds")
        except (AttributeError, KeyError) as error:
            raise ModelError(
                f"the memory of {type(model).__module__} cannot be estimated ({error}): "
                f"plan_memory knows dense blocks of {', '.join(sorted(_PARTS))} with "
                f"{', '.join(_PROJECTIONS)}. Measure a step: textpolicy train --dry-run --measure"
            ) from error
        (self.queries, self.hidden), (self.keys, _), _, _, (self.inner, _), _, _ = shapes
        self.planned, self.count, self.itemsize = planned, len(blocks), norm.dtype.size
        self.windows = windows
        # A compiled operation does the work of several, whose results are not arrays then.
        on_cpu = mx.default_device().type == mx.cpu
        self.is_compiled = on_cpu and self.itemsize == _FLOAT and not reason_of_none()
        adapted = [row for row in planned.modules if row.kind != "none"]
        numbered = [(n, row) for row in adapted if (n := _block_number(row)) is not None]
        # The gradient passes through all blocks from the first adapted one on.
        embeds = any(row.module.endswith("Embedding") for row in adapted)
        lowest = 0 if embeds else min((n for n, _ in numbered), default=self.count)
        self.trained = self.count - lowest
        last = [row for n, row in numbered if n == max(n for n, _ in numbered)]
        inputs = {_SAME_INPUT.get(_name(row), _name(row)): row.shape[1] for row in last}
        self.adapter_inputs = sum(inputs.values())
        self.adapter_floats = sum(_adapter_floats(row, self.itemsize) for row in last)

    def activations(self, tokens: int, joined: int) -> int:
        """Return the bytes that the backward pass keeps of one block.

        Of each token: the residual before each half; queries before and after the norm, scaled, and
        the attention's output; keys before the norm; both factors of the gate; the inputs of
        adapters. Then the keys and values that completions attend to: `joined` of each.
        """
        # A compiled operation keeps no scaled queries; the next adapter reads its output.
        queries = (2 if self.is_compiled else 4) - (not self.norms_heads)
        keys = self.keys * self.norms_heads
        width = 2 * self.hidden + queries * self.queries + keys + 2 * self.inner
        kept = tokens * (width + self.adapter_inputs) + 2 * joined * self.keys
        return kept * self.itemsize + tokens * self.adapter_floats * _FLOAT

    def cache_bytes(self, tokens: int) -> int:
        """Return the bytes of the keys and values of all blocks."""
        held = sum(tokens if window is None else min(tokens, window) for window in self.windows)
        return 2 * held * self.keys * self.itemsize

    def temporaries(self, tokens: int, scores: int) -> int:
        """Return the bytes of the larger half of one block during its backward pass."""
        inner = tokens * (_INNER * self.inner + _HIDDEN * self.hidden)
        attention = _QUERIES * tokens * self.queries
        if not self.is_compiled:
            inner += _GATE_SLICES * min(tokens * self.inner, SLICE_SIZE)
            attention += _SCORE_SLICES * min(scores * self.heads, SLICE_SIZE)
        return round(max(inner, attention)) * self.itemsize


def _backward_arrays(
    block: _Block,
    part: MicroBatch,
    lengths: tuple[int, int],
    sizes: DeviceSizes,
    *,
    shares: bool,
    checkpoints: bool,
) -> dict[str, PlannedArray]:
    (prompt, completion), rows, prompts = lengths, part.rows, part.prompts
    own, joined = rows * completion, rows * (prompt + completion)
    own_scores = own * (prompt + completion)
    tokens, scores = own + prompts * prompt, own_scores + prompts * prompt**2
    whole = last = block.activations(tokens, joined)
    temporaries = block.temporaries(tokens, scores)
    if shares and block.trained > 1:
        # The last block's outputs at prompt positions are not used, and not computed.
        last = block.activations(own, joined)
        temporaries = max(block.temporaries(own, own_scores), temporaries - last)
    if checkpoints:
        # A checkpointed block keeps its input and its prompts' keys and values. During the backward
        # pass of a block, mlx computes the block before it again.
        width = tokens * block.hidden + 2 * (rows + prompts) * prompt * block.keys
        kept = block.trained * width * block.itemsize
        temporaries = whole + max(whole if block.trained > 2 else last, temporaries)
    else:
        kept = (block.trained - 1) * whole + last
        # The last block comes first: its output, the norm of the output and the gradient exist.
        temporaries += 3 * own * block.hidden * block.itemsize
    return {
        "activations": PlannedArray(kept, _BACKWARD),
        "block temporaries": PlannedArray(temporaries, ["blocks"]),
        "logits": PlannedArray(_logits_bytes(block, own, sizes.head_chunk_bytes), ["head"]),
        "unpacked for gradients": PlannedArray(
            (_UNPACKED_COMPILED if block.is_compiled else 1) * _unpacked_bytes(block).largest,
            ["blocks"],
        ),
        "unpacked head": PlannedArray(_unpacked_head(block), ["head"]),
    }


def _sampling_arrays(
    block: _Block, prompts: int, group_size: int, lengths: tuple[int, int], sizes: DeviceSizes
) -> dict[str, PlannedArray]:
    (prompt, completion), rows, step = lengths, prompts * group_size, BatchKVCache.step
    chunk = min(max(prompt, 1), max(2, sizes.prefill_tokens // prompts))
    rest = prompt % chunk
    scores = prompts * max(chunk * (prompt - rest), rest * prompt) * block.heads
    prefill = block.activations(prompts * chunk, 0)
    if not block.is_compiled:
        prefill += round(_PREFILL_SLICES * min(scores, SLICE_SIZE)) * block.itemsize
    # The cache of a prompt without a token to read begins empty, and grows like that of a long row.
    grows = completion > step or not prompt
    room = step * ceil(completion / step) if grows else completion
    position = 2 * block.keys * block.itemsize
    layer, prompt_layer = (
        rows * (prompt + room) * position,
        prompts * step * ceil(prompt / step) * position,
    )
    # Caches without a window get room for completions before they are copied for each row. With
    # compiled operations, mlx has begun this for one to all blocks when the first copy is made.
    padded_layers = block.windows.count(None) / 2 if block.is_compiled else 0
    padded = round(padded_layers * prompts * (prompt + min(room, step)) * position)
    logits = round(_LOGITS * rows * block.vocabulary * _FLOAT)
    unpacked, head = _unpacked_ahead(block, rows)
    unpacked_for_prompts, _ = _unpacked_ahead(block, prompts * chunk)
    return {
        "prompt cache": PlannedArray(block.count * prompt_layer, ["prefill", "fan out"]),
        "prompt cache with room": PlannedArray(padded, ["fan out"]),
        # Of the last block, only keys and values are computed.
        "prefilled block": PlannedArray(max(0, prefill - prompt_layer), ["prefill"]),
        "cache": PlannedArray(rows * block.cache_bytes(prompt + room), ["fan out", *_DECODING]),
        "grown layer of the cache": PlannedArray(layer if grows else 0, ["cache growth"]),
        "logits of next tokens": PlannedArray(logits, ["drawing"]),
        "unpacked matrices": PlannedArray(unpacked + head, _DECODING),
        "unpacked for prompts": PlannedArray(unpacked_for_prompts, ["prefill"]),
    }


def _merged_arrays(planned: AdapterPlan, always: Sequence[str]) -> dict[str, PlannedArray]:
    """Return the weights that include the adapters, which are made one after the other."""
    sizes = [prod(row.shape) * _FLOAT for row in planned.modules if row.kind != "none"]
    return {
        "merged weights": PlannedArray(sum(sizes), always),
        "update of a merged weight": PlannedArray(max(sizes, default=0), ["merging"]),
    }


def _copies(planned: AdapterPlan, stored: mx.Dtype | None) -> int:
    """Return the bytes of the copies from which few rows are multiplied on a CPU."""
    if stored is None or stored != mx.bfloat16 or mx.default_device().type != mx.cpu:
        return 0
    rows = [row for row in planned.modules if row.quantization is None]
    if not rows or rows[0].bytes < prod(rows[0].shape) * _FLOAT or not fast_cpu.enable().few_rows:
        return 0
    tied = all(_name(row) != "lm_head" for row in planned.modules)
    numbers = sum(prod(row.shape) for row in rows if tied or not row.module.endswith("Embedding"))
    copies = numbers * mx.bfloat16.size
    return copies if numbers >= FEWEST_NUMBERS and copies <= most_copied_bytes() else 0


def _block_number(row: PlannedModule) -> int | None:
    return next((int(part) for part in row.path.split(".") if part.isdigit()), None)


def _name(row: PlannedModule) -> str:
    return row.path.rpartition(".")[2]


def _adapter_floats(row: PlannedModule, itemsize: int) -> int:
    """Return the float32 numbers of each token: A's product, a copied input, DoRA's outputs."""
    outputs, inputs = row.shape
    copied = inputs if itemsize < _FLOAT else 0
    return (row.rank or 0) + copied + (2 * outputs if row.kind == "dora" else 0)


def _logits_bytes(block: _Block, positions: int, chunk_bytes: int) -> int:
    """Return the bytes of logits and their copies, at most those of a chunk of positions."""
    trained = _has_trained_head(block)
    logits = positions * block.vocabulary * _FLOAT
    if not trained and block.is_compiled:
        # The chunks of the compiled function share the memory of one, and are about equally long.
        return ceil(logits / ceil(logits / (COMPILED_CHUNK * chunk_bytes)))
    whole, chunk = (_TRAINED_LOGITS, _TRAINED_CHUNKS) if trained else (_LOGITS, _CHUNKS)
    if block.is_compiled:
        whole, chunk = _TRAINED_LOGITS_COMPILED, _TRAINED_CHUNKS_COMPILED
    return round(min(whole * logits, chunk * chunk_bytes))


def _has_trained_head(block: _Block) -> bool:
    kinds = {_name(row): row.kind for row in block.planned.modules}
    return kinds["lm_head" if "lm_head" in kinds else "embed_tokens"] != "none"


def _unpacked_head(block: _Block) -> int:
    """Return the bytes of a quantized head as float32 in training.

    A frozen head is unpacked once for all chunks. Under an adapter, each chunk unpacks it, and mlx
    holds the copies of two chunks.
    """
    return (2 if _has_trained_head(block) else 1) * _unpacked_bytes(block).head


class _Unpacked(NamedTuple):
    """The bytes of quantized matrices as float32, of all blocks, of the largest and of the head.

    mlx starts to unpack many of those in `at_once` before the first of them is used.
    """

    at_once: int = 0
    in_turn: int = 0
    largest: int = 0
    head: int = 0


def _unpacked_bytes(block: _Block, rows: int | None = None) -> _Unpacked:
    """Return the bytes of the matrices that are unpacked for a product of so many rows.

    GPUs multiply with mlx's formats directly, and CPUs may multiply few rows so. Without `rows`,
    there are many.
    """
    on_cpu, at_once, in_turn, head = mx.default_device().type == mx.cpu, [0], [0], 0
    tied = all(_name(row) != "lm_head" for row in block.planned.modules)
    is_float32 = block.itemsize == _FLOAT
    for row in block.planned.modules:
        if row.quantization is None:
            continue
        packing = _packing(row)
        mode, *_ = packing
        if mode != "nf4" and not on_cpu:
            continue
        if rows is not None and is_float32 and not is_unpacked(*packing, rows):
            continue
        size = prod(row.shape) * _FLOAT
        if _block_number(row) is not None:
            is_in_turn = mode in _UNPACKED_IN_TURN or (is_float32 and unpacks(*packing))
            (in_turn if is_in_turn else at_once).append(size)
        elif tied or _name(row) == "lm_head":
            head = size
    largest = max(at_once + in_turn)
    return _Unpacked(at_once=sum(at_once), in_turn=sum(in_turn), largest=largest, head=head)


def _unpacked_ahead(block: _Block, rows: int) -> tuple[int, int]:
    """Return the bytes of matrices of blocks, and of the head, that sampling unpacks ahead."""
    unpacked = _unpacked_bytes(block, rows)
    share = _UNPACKED_SHARE if reason_of_none() else _UNPACKED_SHARE_COMPILED
    # Without compiled operations, mlx unpacks the head of the next step too.
    heads = 2 if reason_of_none() else 1
    return int(unpacked.at_once * share) + unpacked.in_turn // block.count, heads * unpacked.head


def _packing(row: PlannedModule) -> tuple[str, int, int, int]:
    """Return mode, bits, group size and inputs of a quantized module."""
    name, tile = (row.quantization or "").split(" / ")
    stored = format_by_name(name, "channel" if tile == "channel" else int(tile))
    inputs = row.shape[-1]
    group_size = inputs if stored.group_size == WHOLE_ROW else stored.group_size or inputs
    return stored.mode, stored.bits, group_size, inputs
