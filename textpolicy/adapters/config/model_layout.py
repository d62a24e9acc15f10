"""Which modules of a model can carry an adapter, and in which block each of them is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import cast

import mlx.nn as nn

from textpolicy.adapters.quantization.stored_weights import ModuleKind, module_kind
from textpolicy.errors import AdapterError


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptableModule:
    """A module that can carry an adapter, or fewer bits.

    `key` is its path inside its block, or its whole path outside of the blocks. `by_name` is true
    of embeddings, output heads and routers, which are only meant where they are named.
    """

    path: str
    key: str
    block: int | None
    kind: ModuleKind
    by_name: bool

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition(".")[2]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelLayout:
    """What a selection sees of a model: its sites, the paths of its blocks, and all else by type.

    `blocks` is None if the model has no list of layers to count.
    """

    model: str
    sites: Mapping[str, AdaptableModule]
    blocks: Sequence[str] | None
    others: Mapping[str, str]

    def nearest(self, words: str, *, short: bool = False) -> list[str]:
        """Paths that end in `words`, or else paths that are spelled like it."""
        paths = [site.key if short else site.path for site in self.sites.values()]
        paths = sorted(set(paths))
        endings = [path for path in paths if path.endswith(f".{words}")]
        return endings[:3] or get_close_matches(words, paths, n=3, cutoff=0.0)

    @property
    def has_head(self) -> bool:
        """Whether there is an output head that is not the embedding table itself."""
        return any(site.kind == "linear" and site.block is None for site in self.sites.values())

    def depth(self) -> int:
        """How many blocks there are."""
        if self.blocks is None:
            raise AdapterError(
                f"{self.model} has no .layers to count blocks by; expected a language model as "
                "mlx-lm makes them, or rules that name its modules: AdapterConfig(rules=[...])"
            )
        return len(self.blocks)


def read_model_layout(model: nn.Module) -> ModelLayout:
    """What can be adapted in a model, and where it is."""
    modules = dict(model.named_modules())
    blocks = _blocks(model)
    kinds = {path: kind for path, module in modules.items() if (kind := module_kind(module))}
    experts = [path for path, kind in kinds.items() if kind == "experts"]
    sites: dict[str, AdaptableModule] = {}
    for path in sorted(kinds, key=_natural):
        block = _block_of(path, blocks or ())
        key = path if block is None else path.removeprefix(f"{(blocks or ())[block]}.")
        outside = blocks is not None and block is None
        sites[path] = AdaptableModule(
            path=path,
            key=key,
            block=block,
            kind=cast(ModuleKind, kinds[path]),
            by_name=outside or kinds[path] == "embedding" or _is_router(path, experts),
        )
    others = {path: type(module).__name__ for path, module in modules.items() if path not in kinds}
    return ModelLayout(model=type(model).__name__, sites=sites, blocks=blocks, others=others)


def block_count(model: nn.Module) -> int:
    """How many blocks `num_layers` may choose from."""
    return read_model_layout(model).depth()


def _blocks(model: nn.Module) -> list[str] | None:
    """Paths of the model's blocks, first to last."""
    try:
        blocks = cast(list[nn.Module], model.layers)
    except AttributeError:
        return None
    paths = {id(module): path for path, module in model.named_modules()}
    return [paths[id(block)] for block in blocks]


def _block_of(path: str, blocks: list[str] | tuple[()]) -> int | None:
    found = (i for i, block in enumerate(blocks) if path.startswith(f"{block}."))
    return next(found, None)


def _is_router(path: str, experts: list[str]) -> bool:
    """Whether a module stands beside the stack of experts that it chooses from."""
    parent = path.rpartition(".")[0] + "."
    beside = [expert.removeprefix(parent) for expert in experts if expert.startswith(parent)]
    return path not in experts and any(expert.count(".") <= 1 for expert in beside)


def _natural(path: str) -> list[tuple[bool, int, str]]:
    """Block 10 comes after block 9."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in path.split(".")]
