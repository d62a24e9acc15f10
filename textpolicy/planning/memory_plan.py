"""Will it fit: the memory of a step, from a model's config.json alone.

Each phase is an explained sum of sizes of arrays. What is not known of a system, such as how far
mlx starts on one operation before it is done with another, makes the sum an estimate: measured
peaks are within 15 % of it (tests/planning/test_memory_plan.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, prod
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from textpolicy.adapters.config.adapter_config import AdapterConfig
from textpolicy.errors import ConfigError, ModelError
from textpolicy.fast_cpu.array_slices import SLICE_SIZE
from textpolicy.generation.engine import MAX_DECODING_ROWS, PREFILL_CHUNK_TOKENS
from textpolicy.planning.adapter_plan import AdapterPlan, PlannedModule, plan_adapters
from textpolicy.planning.unloaded_model import build_unloaded_model
from textpolicy.training.batch import MICRO_BATCH_TOKENS

_FLOAT = mx.float32.size
# Logits, the same over the temperature, below their largest, and their exponentials; then pieces.
_HEAD_ARRAYS = 4.5
# The trainer scores positions in chunks of at most so many bytes of logits. Measured is what a
# chunk comes to with what mlx allocates ahead for the next.
_CHUNK_BYTES = 16 * 2**20
_CHUNK_ARRAYS = 8.5
# The same two where the head itself is trained, and computed a second time.
_TRAINED_HEAD_ARRAYS = 7
_TRAINED_CHUNK_ARRAYS = 11.5
# Of the pieces in which gates and attention scores are computed, with those that mlx allocates
# ahead: going backwards through a block, and forwards.
_GATE_PIECES = 7
_SCORE_PIECES = 8
_FORWARD_PIECES = 5.5
# mlx-lm's caches grow by so many positions; rows begin with room for their completions, or as much.
_CACHE_STEP = 256
_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_PROJECTIONS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """Estimated bytes. The first five are there all the time, the others at their peak.

    reference: weights of another model, such as a teacher
    activations: what blocks keep for the backward pass
    block: of one block on all tokens at once, gone through backwards or prefilled
    head: logits, and what scores them
    unpacked: the largest packed matrix, made float for a product
    cache: keys and values of every row while decoding
    cache_copy: one layer's cache a second time, as it grows
    decode_head: logits, and what draws from them
    decode_unpacked: packed matrices made float ahead of their use
    prompt_cache, prompt_block: the same two while prompts are prefilled
    """

    weights: int
    reference: int
    adapters: int
    optimizer: int
    gradients: int
    activations: int
    block: int
    head: int
    unpacked: int
    cache: int
    cache_copy: int
    decode_unpacked: int
    decode_head: int
    prompt_cache: int
    prompt_block: int

    @property
    def estimated_training_bytes(self) -> int:
        """The peak of a training step."""
        models = self.weights + self.reference
        standing = models + self.adapters + self.optimizer + self.gradients
        backward = self.activations + max(self.block, self.head) + self.unpacked
        # New weights, and the clipped gradient.
        update = self.adapters + self.gradients
        return standing + max(backward, update)

    @property
    def estimated_generation_bytes(self) -> int:
        """The peak of sampling the batch."""
        prefill = self.prompt_cache + self.prompt_block
        fan_out = self.prompt_cache + self.cache
        decode = self.cache + max(self.cache_copy, self.decode_head) + self.decode_unpacked
        models = self.weights + self.reference
        return models + self.adapters + max(prefill, fan_out, decode)


@dataclass(frozen=True, slots=True)
class _Block:
    """The widths of a transformer block, and what its adapters read and write."""

    hidden: int
    queries: int
    keys: int
    inner: int
    heads: int
    vocabulary: int
    blocks: int
    itemsize: int

    def activations(self, tokens: int, joined: int, beside: "_Beside") -> int:
        """What the backward pass needs of one block.

        Of each token: the residual before each half; queries before and after their norm, scaled,
        and what they attended to; keys before their norm; the gate and the other half. Then the
        keys and values that completions attend to.
        """
        width = 2 * self.hidden + 4 * self.queries + self.keys + 2 * self.inner + beside.inputs
        kept = tokens * width + 2 * joined * self.keys
        return kept * self.itemsize + tokens * beside.width * _FLOAT

    def gradients(self, tokens: int, scores: int) -> int:
        """Of the larger half of one block, while what it computed is still there.

        How many arrays of each width there are at once is measured.
        """
        inner = 4.5 * tokens * self.inner + 2 * tokens * self.hidden
        inner += _GATE_PIECES * min(tokens * self.inner, SLICE_SIZE)
        attention = 4 * tokens * self.queries + _SCORE_PIECES * min(scores * self.heads, SLICE_SIZE)
        return round(max(inner, attention)) * self.itemsize

    def prefill(self, tokens: int, scores: int, beside: "_Beside") -> int:
        """Of one block that reads prompts, adapters included."""
        pieces = round(_FORWARD_PIECES * min(scores * self.heads, SLICE_SIZE))
        return self.activations(tokens, 0, beside) + pieces * self.itemsize


@dataclass(frozen=True, slots=True)
class _Beside:
    """What adapters make the backward pass keep of each token, in each of `blocks` blocks.

    `inputs` numbers in the model's dtype are what their modules read, `width` are in float32.
    """

    inputs: int
    width: int
    blocks: int


def plan_memory(
    model: nn.Module | Mapping[str, Any],
    config: AdapterConfig | None = None,
    *,
    batch: int,
    prompt_tokens: int,
    completion_tokens: int,
    group_size: int = 1,
    micro_batch_size: int | None = None,
    checkpoint_gradients: bool = False,
    dtype: mx.Dtype | None = None,
    reference: Mapping[str, Any] | None = None,
) -> MemoryPlan:
    """The memory to sample `batch` completions and to train on them with Adam.

    `model` is an unadapted model or the content of its config.json, of which nothing is loaded;
    groups of `group_size` rows share a prompt. `reference` is the config.json of another model,
    such as a teacher, whose weights are counted. Known are dense models whose blocks are built like
    Llama's: Llama, Mistral, Qwen2, Qwen3 and their kin.
    """
    if batch < 1 or group_size < 1 or batch % group_size:
        raise ConfigError(f"batch is {batch}; expected a multiple of group_size, {group_size}")
    # A module is a mapping too.
    network = model if isinstance(model, nn.Module) else build_unloaded_model(model, dtype)
    planned = plan_adapters(network, config or AdapterConfig())
    block, packed = _widths(network, planned), _unpacked(planned)
    beside = _beside(planned, block)
    # A prompt that is not shared is read by every row of its group.
    sharing = group_size if _shares_prompts(network) else 1
    usual = _rows(group_size, sharing, prompt_tokens, completion_tokens)
    rows = min(micro_batch_size or usual, batch)
    prompts, read = ceil(rows / sharing), prompt_tokens - 1
    own = rows * completion_tokens
    own_scores = own * (completion_tokens + read)
    tokens, scores = own + prompts * read, own_scores + prompts * read**2
    joined = rows * (read + completion_tokens)
    whole = block.activations(tokens, joined, beside)
    last, gradients = whole, block.gradients(tokens, scores)
    if sharing > 1 and beside.blocks > 1:
        # What the last block says of a shared prompt's tokens, nobody reads: it is not computed.
        last = block.activations(own, joined, beside)
        gradients = max(block.gradients(own, own_scores), gradients - last)
    learned = (beside.blocks - 1) * whole + last
    # The last block is gone through first, when its output, the norm of that, and the gradient are
    # still there.
    ends = 3 * own * block.hidden * block.itemsize
    # A checkpointed block keeps its input and its prompts' keys and values; mlx computes the one
    # before again beside the one that is gone through backwards.
    pair = whole + max(whole if beside.blocks > 2 else last, gradients)
    kept = tokens * block.hidden + 2 * (rows + prompts) * read * block.keys
    logits = rows * completion_tokens * block.vocabulary * _FLOAT
    sampled = min(batch // group_size, max(1, MAX_DECODING_ROWS // group_size))
    at_once = min(max(read, 1), max(2, PREFILL_CHUNK_TOKENS // sampled))
    whole_pieces = read - read % at_once
    prefilled = sampled * max(at_once * whole_pieces, (read % at_once) * read)
    # Caches of prompts without a token to read begin empty, and grow like those of long rows.
    growing = completion_tokens > _CACHE_STEP or not read
    room = _CACHE_STEP * ceil(completion_tokens / _CACHE_STEP) if growing else completion_tokens
    first = _CACHE_STEP * ceil(read / _CACHE_STEP)
    layer = 2 * sampled * group_size * (read + room) * block.keys * block.itemsize
    prompt_layer = 2 * sampled * first * block.keys * block.itemsize
    prompt_block = block.prefill(sampled * at_once, prefilled, beside)
    accumulated = 2 if rows < batch else 1
    return MemoryPlan(
        weights=planned.base_bytes,
        reference=_bytes(build_unloaded_model(reference)) if reference else 0,
        adapters=planned.adapter_bytes,
        optimizer=2 * planned.adapter_bytes,
        gradients=accumulated * planned.adapter_bytes,
        activations=beside.blocks * kept * block.itemsize if checkpoint_gradients else learned,
        block=pair if checkpoint_gradients else gradients + ends,
        head=_head(logits, planned),
        unpacked=max(packed.values(), default=0),
        cache=block.blocks * layer,
        cache_copy=layer if growing else 0,
        decode_unpacked=_ahead(planned, packed, block),
        decode_head=round(_HEAD_ARRAYS * sampled * group_size * block.vocabulary * _FLOAT),
        prompt_cache=block.blocks * prompt_layer,
        # The last block gives its keys and values, and is not computed beyond them.
        prompt_block=max(0, prompt_block - prompt_layer),
    )


def _bytes(model: nn.Module) -> int:
    arrays = dict(tree_flatten(model.parameters())).values()
    return sum(array.nbytes for array in arrays)


def _rows(group_size: int, sharing: int, prompt_tokens: int, completion_tokens: int) -> int:
    """How many rows a trainer has in memory at once unless it is told."""
    row = completion_tokens if sharing > 1 else completion_tokens + prompt_tokens
    if group_size * row > MICRO_BATCH_TOKENS:
        return min(group_size, max(2, MICRO_BATCH_TOKENS // row))
    group = group_size * completion_tokens + group_size // sharing * prompt_tokens
    return group_size * max(1, MICRO_BATCH_TOKENS // group)


def _shares_prompts(model: nn.Module) -> bool:
    """Whether the model keeps nothing but keys and values, of all positions."""
    # mlx-lm takes seconds to import, and who only adapts a model has no use for this.
    from mlx_lm.models.cache import KVCache, make_prompt_cache

    return all(type(layer) is KVCache for layer in make_prompt_cache(model))


def _widths(model: nn.Module, planned: AdapterPlan) -> _Block:
    modules = dict(model.named_modules())
    rows = {row.path: row for row in planned.modules}
    try:
        args: Any = model.args
        blocks = cast(list[nn.Module], model.layers)
        first = next(path for path, module in modules.items() if module is blocks[0])
        shapes = [rows[f"{first}.{name}"].shape for name in _PROJECTIONS]
        heads: int = args.num_attention_heads
        norm: mx.array = modules[f"{first}.input_layernorm"]["weight"]
    except (AttributeError, KeyError) as error:
        raise _unknown(model, f"no {error}") from error
    if more := blocks[0].children().keys() - _PARTS:
        raise _unknown(model, f"also {', '.join(sorted(more))}")
    (queries, hidden), (keys, _), _, _, (inner, _), _, _ = shapes
    return _Block(
        hidden=hidden,
        queries=queries,
        keys=keys,
        inner=inner,
        heads=heads,
        vocabulary=args.vocab_size,
        blocks=len(blocks),
        itemsize=norm.dtype.size,
    )


def _unknown(model: nn.Module, difference: str) -> ModelError:
    return ModelError(
        f"plan_memory knows dense blocks of {', '.join(sorted(_PARTS))} with "
        f"{', '.join(_PROJECTIONS)}; {type(model).__module__} has others ({difference}). "
        "Measure a small batch with mx.get_peak_memory instead"
    )


def _beside(planned: AdapterPlan, block: _Block) -> _Beside:
    """From the first adapted block on, the backward pass needs what blocks computed."""
    adapted = [row for row in planned.modules if row.kind != "none"]
    inside = {row.path: _block_number(row) for row in adapted}
    numbers = [number for number in inside.values() if number is not None]
    if any(row.module.endswith("Embedding") for row in adapted):
        numbers.append(0)
    first = min(numbers, default=block.blocks)
    deepest = max(numbers, default=first)
    rows = [row for row in adapted if inside[row.path] == deepest]
    read = {_input_of(row): row.shape[1] for row in rows}
    return _Beside(
        inputs=sum(read.values()),
        width=sum(_kept_by(row, block) for row in rows),
        blocks=block.blocks - first,
    )


def _kept_by(row: PlannedModule, block: _Block) -> int:
    """The product with A; inputs in float32 if they are not; for DoRA the output and its update."""
    outputs, inputs = row.shape
    copied = inputs if block.itemsize < _FLOAT else 0
    return (row.rank or 0) + copied + (2 * outputs if row.kind == "dora" else 0)


def _input_of(row: PlannedModule) -> str:
    """Modules that read the same array, which is kept once."""
    name = row.path.rpartition(".")[2]
    together = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    return together.get(name, name)


def _block_number(row: PlannedModule) -> int | None:
    return next((int(part) for part in row.path.split(".") if part.isdigit()), None)


def _head(logits: int, planned: AdapterPlan) -> int:
    names = {row.path.rpartition(".")[2]: row.kind for row in planned.modules}
    kind = names["lm_head" if "lm_head" in names else "embed_tokens"]
    if kind == "none":
        return round(min(_HEAD_ARRAYS * logits, _CHUNK_ARRAYS * _CHUNK_BYTES))
    return round(min(_TRAINED_HEAD_ARRAYS * logits, _TRAINED_CHUNK_ARRAYS * _CHUNK_BYTES))


def _unpacked(planned: AdapterPlan) -> dict[str, int]:
    """The bytes in float32 of each packed matrix that is made float for a product, by path.

    GPUs multiply mlx's own formats as they are.
    """
    on_cpu = mx.default_device().type == mx.cpu
    return {
        row.path: prod(row.shape) * _FLOAT
        for row in planned.modules
        if row.quantization and (on_cpu or row.quantization.startswith("nf4"))
    }


def _ahead(planned: AdapterPlan, packed: Mapping[str, int], block: _Block) -> int:
    """While tokens are decoded, little else is alive, and mlx makes weights float ahead of time.

    NF4 takes several operations, so mlx gets no further than a block; its own formats take one,
    and about a quarter of a model is float at once.
    """
    several = {row.path for row in planned.modules if (row.quantization or "").startswith("nf4")}
    one = sum(size for path, size in packed.items() if path not in several)
    return one // 4 + sum(packed[path] for path in several) // block.blocks
