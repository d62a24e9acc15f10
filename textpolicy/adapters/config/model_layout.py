"""The modules of a model that can carry an adapter, and the block that each of them is in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import cast

import mlx.nn as nn

from textpolicy.adapters.quantization.stored_weights import ModuleKind, module_kind
from textpolicy.errors import AdapterError


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptableModule:
    """A module that can be adapted or quantized.

    `key` is its path inside its block, or its whole path if it is in no block. `by_name` is True
    for embeddings, output heads and routers: a config selects these only by their own name.
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
    """Adaptable modules by path, the paths of the blocks, and all other modules' types by path.

    `blocks` is None if the model has no list of layers.
    """

    model: str
    adaptable: Mapping[str, AdaptableModule]
    blocks: Sequence[str] | None
    others: Mapping[str, str]

    def nearest(self, words: str, *, keys: bool = False) -> list[str]:
        """Return up to three paths, or keys, that end in `words` or are spelled like `words`."""
        paths = sorted({one.key if keys else one.path for one in self.adaptable.values()})
        endings = [path for path in paths if path.endswith(f".{words}")]
        return endings[:3] or get_close_matches(words, paths, n=3, cutoff=0.0)

    @property
    def has_head(self) -> bool:
        """True if the model has an output head apart from the embedding table."""
        return any(one.kind == "linear" and one.block is None for one in self.adaptable.values())

    def depth(self) -> int:
        """Return the number of blocks."""
        if self.blocks is None:
            raise AdapterError(
                f"{self.model} has no .layers, so its blocks cannot be counted. Pass a language "
                "model as mlx-lm makes them, or name the modules in rules: "
                "AdapterConfig(rules=[...])"
            )
        return len(self.blocks)


def read_model_layout(model: nn.Module) -> ModelLayout:
    """Return the layout of a model."""
    modules = dict(model.named_modules())
    blocks = _block_paths(model)
    experts = [path for path, module in modules.items() if module_kind(module) == "experts"]
    adaptable: dict[str, AdaptableModule] = {}
    others: dict[str, str] = {}
    for path in sorted(modules, key=_by_block_number):
        kind = module_kind(modules[path])
        if kind is None:
            others[path] = type(modules[path]).__name__
            continue
        block = next((i for i, b in enumerate(blocks or ()) if path.startswith(f"{b}.")), None)
        outside = blocks is not None and block is None
        adaptable[path] = AdaptableModule(
            path=path,
            key=path if block is None else path.removeprefix(f"{(blocks or ())[block]}."),
            block=block,
            kind=kind,
            by_name=outside or kind == "embedding" or _is_router(path, experts),
        )
    model_name = type(model).__name__
    return ModelLayout(model=model_name, adaptable=adaptable, blocks=blocks, others=others)


def _block_paths(model: nn.Module) -> list[str] | None:
    try:
        blocks = cast(list[nn.Module], model.layers)
    except AttributeError:
        return None
    paths = {id(module): path for path, module in model.named_modules()}
    return [paths[id(block)] for block in blocks]


def _is_router(path: str, experts: list[str]) -> bool:
    """Return whether the module has the same parent as a stack of experts."""
    parent = path.rpartition(".")[0] + "."
    siblings = [expert.removeprefix(parent) for expert in experts if expert.startswith(parent)]
    return path not in experts and any(expert.count(".") <= 1 for expert in siblings)


def _by_block_number(path: str) -> list[tuple[bool, int, str]]:
    """Return a sort key that puts block 10 after block 9."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in path.split(".")]
