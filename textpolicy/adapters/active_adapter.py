"""ActiveAdapter: the adapter whose layers are in a model."""

import weakref
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from textpolicy.adapters.adapter import Adapter, check_float32, group_by_module, is_finite, rank_of
from textpolicy.adapters.base_identity import BaseIdentity
from textpolicy.adapters.compatibility import (
    check_fit,
    expected_shapes,
    find_adapter_targets,
    raise_if_problems,
    tensor_problems,
)
from textpolicy.adapters.config.adapter_config import (
    AdapterConfig,
    TargetModule,
    config_for_modules,
    find_target_modules,
)
from textpolicy.adapters.config.rules import LoRARule
from textpolicy.adapters.fuse import FuseReport, fuse_layer
from textpolicy.adapters.layers.adapter_layer import AdapterLayer, adapter_layers, freeze_base
from textpolicy.adapters.layers.dora import DoRAEmbedding, DoRALinear
from textpolicy.adapters.layers.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear
from textpolicy.adapters.module_tree import freeze_names, frozen_names, replace_modules
from textpolicy.adapters.quantization.packed_product import use_fast_products
from textpolicy.errors import AdapterError

# To add a kind of layer, write its class and name the class here.
_LAYER_CLASSES: dict[tuple[str, str], type[AdapterLayer]] = {
    (layer_class.kind, layer_class.module_kind): layer_class
    for layer_class in (LoRALinear, LoRAEmbedding, LoRASwitchLinear, DoRALinear, DoRAEmbedding)
}


class ActiveAdapter:
    """A model's adapter layers, with the config and the version of the adapter in them.

    `rules` holds the rule of every module that the config selects, also of modules that are only
    quantized. The model owns the layers, and the layers own the container that owns this object.
    This object refers to model and layers weakly, because otherwise a dropped model would stay in
    memory until the garbage collector runs.
    """

    def __init__(self, model: nn.Module, enabled: mx.array) -> None:
        """Describe an unadapted model. `put_new` or `put` then puts layers into the model."""
        self.base = BaseIdentity.of(model)
        self.layers: weakref.WeakValueDictionary[str, AdapterLayer] = weakref.WeakValueDictionary()
        self.rules: Mapping[str, LoRARule] = {}
        self.config = AdapterConfig()
        self.version = 0
        self._model = weakref.ref(model)
        self._enabled = enabled
        self._frozen = frozen_names(model)

    @property
    def model(self) -> nn.Module:
        """The adapted model. Raise AdapterError if the model no longer exists."""
        if (model := self._model()) is None:
            raise AdapterError(
                "The model of these adapters no longer exists. Keep a reference to the model for "
                "as long as you use its adapters"
            )
        return model

    def is_in(self, model: nn.Module) -> bool:
        """Return whether the layers belong to this very model."""
        return self._model() is model

    def tensors(self) -> dict[str, mx.array]:
        """Return the adapter tensors by their names in the model."""
        return {
            f"{path}.{name}": layer[name]
            for path, layer in self.layers.items()
            for name in layer.trainable
        }

    def to_adapter(self, name: str) -> Adapter:
        """Return the adapter as it is now, apart from the model."""
        rules = {path: _present_rule(r, self.layers.get(path)) for path, r in self.rules.items()}
        return Adapter(
            origin=name,
            arrays=self.tensors(),
            config=self.config if rules == self.rules else config_for_modules(rules),
            version=self.version,
            fingerprint=self.base.fingerprint,
            quantization=self.base.quantization,
        )

    @contextmanager
    def without_layers(self) -> Generator[nn.Module]:
        """Put the original modules in place of the adapter layers, for the block."""
        model, layers = self.model, dict(self.layers)
        replace_modules(model, {path: layer.base for path, layer in layers.items()})
        try:
            yield model
        finally:
            replace_modules(model, layers)

    # Putting layers into the model

    def put_new(self, config: AdapterConfig, seed: int) -> None:
        """Put new adapter layers, initialised at random from `seed`, into the unadapted model."""
        targets = find_target_modules(self.model, config)
        self._put_layers(_new_layers(targets, seed), targets)
        self.config = config

    def put(self, adapter: Adapter) -> None:
        """Replace all layers by those of another adapter. After an error the model is unchanged."""
        targets = self.check(adapter)
        self._put_layers(_new_layers(targets, seed=0), targets)
        self._assign(adapter.arrays, self.rules)
        self.config, self.version = adapter.config, adapter.version

    def check(self, adapter: Adapter) -> dict[str, TargetModule]:
        """Return the modules that an adapter is for; raise if it does not fit the model."""
        with self.without_layers() as model:
            return check_fit(model, adapter, self.base)

    def copy_to(self, model: nn.Module) -> "ActiveAdapter":
        """Return the active adapter of a copy of the model that has copies of the layers."""
        made = copy(self)
        made.layers = weakref.WeakValueDictionary(adapter_layers(model))
        made._model = weakref.ref(model)
        return made

    def remove(self) -> nn.Module:
        """Restore the original modules, arrays and frozen state, and return the model."""
        model = self.model
        replace_modules(model, {path: layer.base for path, layer in self.layers.items()})
        freeze_names(model, self._frozen)
        return model

    def set_enabled(self, enabled: mx.array) -> None:
        """Set the gate of every layer, also of layers that are put into the model later."""
        self._enabled = enabled
        for layer in self.layers.values():
            layer.set_enabled(enabled)

    # Other tensors in the same layers

    def swap(self, source: Adapter | Mapping[str, mx.array]) -> None:
        """Replace every tensor, or raise and replace none. Ranks and scales may change.

        For a mapping of tensors the version becomes one higher.
        """
        adapter = source if isinstance(source, Adapter) else self._as_adapter(source)
        problems, given = self.base.differences(adapter), self.rules
        if adapter.embedding_lookup_only or adapter.config != self.config:
            with self.without_layers() as model:
                targets, problems = find_adapter_targets(model, adapter, self.base)
            given = {path: target.rule for path, target in targets.items()}
        problems = [*problems, *_problems_of_other_layers(given, self.rules)]
        rules = {
            path: replace(own, rank=new.rank, scale=new.scale, dropout=new.dropout)
            for path, own in self.rules.items()
            for new in [given.get(path, own)]
        }
        raise_if_problems(
            adapter.origin, problems, tensor_problems(self._shapes(rules), adapter.arrays)
        )
        self._assign(adapter.arrays, rules)
        self.rules, self.config, self.version = rules, adapter.config, adapter.version

    def check_update(self) -> None:
        """Raise if an update cast a tensor to fewer bits or changed its shape."""
        tensors = self.tensors()
        check_float32(tensors)
        shapes = self._shapes(self.rules)
        changed = [name for name, shape in shapes.items() if tensors[name].shape != shape]
        if changed:
            raise AdapterError(
                f"{changed[0]} and {len(changed) - 1} more changed their shapes: the first has "
                f"{tensors[changed[0]].shape}, expected {shapes[changed[0]]}. An optimizer that "
                "was made before a swap to another rank has state of the old rank; make a new "
                "optimizer after the swap"
            )

    # Fusing

    def fuse_report(self, *, dtype: mx.Dtype | None, qtype: str | None) -> FuseReport:
        """Return what would survive `fuse`. The model stays unchanged."""
        wrong = [name for name, array in self.tensors().items() if not is_finite(array)]
        raise_if_problems("The adapter to fuse", (f"{name}: not finite" for name in wrong))
        fused = [fuse_layer(path, layer, dtype, qtype)[1] for path, layer in self.layers.items()]
        return FuseReport(modules=tuple(fused))

    def fuse(self, *, dtype: mx.Dtype | None, qtype: str | None) -> None:
        """Replace each layer by a plain module whose weight includes the adapter."""
        model, layers = self.model, dict(self.layers)
        # One module at a time: each base weight is freed before the next weight is made.
        for path in list(layers):
            fused, _ = fuse_layer(path, layers.pop(path), dtype, qtype)
            replace_modules(model, {path: fused})
        use_fast_products(model)
        freeze_names(model, self._frozen)

    def _put_layers(
        self, layers: Mapping[str, AdapterLayer], targets: Mapping[str, TargetModule]
    ) -> None:
        model = self.model
        for layer in layers.values():
            layer.set_enabled(self._enabled)
            layer.train(model.training)
        replace_modules(model, {path: layer.base for path, layer in self.layers.items()})
        replace_modules(model, dict(layers))
        freeze_base(model)
        self.layers = weakref.WeakValueDictionary(layers)
        self.rules = {path: target.rule for path, target in targets.items()}

    def _as_adapter(self, arrays: Mapping[str, mx.array]) -> Adapter:
        """Return tensors as an adapter of this base, with the ranks that the tensors have."""
        given = group_by_module(arrays)
        ranks = {path: rank for path in self.rules if (rank := rank_of(given.get(path, {})))}
        rules = {p: replace(r, rank=ranks.get(p, r.rank)) for p, r in self.rules.items()}
        config = self.config if rules == self.rules else config_for_modules(rules)
        version = self.version + 1
        return Adapter(origin="the tensors given", arrays=arrays, config=config, version=version)

    def _shapes(self, rules: Mapping[str, LoRARule]) -> dict[str, tuple[int, ...]]:
        return expected_shapes({path: layer.base for path, layer in self.layers.items()}, rules)

    def _assign(self, arrays: Mapping[str, mx.array], rules: Mapping[str, LoRARule]) -> None:
        # Rounding depends on the order in which memory holds a matrix: one order for all sources.
        tensors = {name: mx.contiguous(array.astype(mx.float32)) for name, array in arrays.items()}
        mx.eval(tensors)
        for path, layer in self.layers.items():
            for name in layer.trainable:
                layer[name] = tensors[f"{path}.{name}"]
            layer.set_scale(rules[path].scale)
            layer.dropout = nn.Dropout(rules[path].dropout)
            layer.dropout.train(layer.training)


def _problems_of_other_layers(
    given: Mapping[str, LoRARule], own: Mapping[str, LoRARule]
) -> list[str]:
    """Return why `swap` cannot take rules for other layers or another kind, or nothing."""
    theirs, ours = ({path: rule.kind for path, rule in some.items()} for some in (given, own))
    if theirs == ours:
        return []
    paths = theirs.keys() - ours.keys() or ours.keys() - theirs.keys()
    what = f"other layers, such as {min(paths)}" if paths else "the same layers in another kind"
    return [
        f"it adapts {what}, and swap() keeps layers and kinds. Call unload() and then "
        "AdapterContainer.from_directory(path).load(model), or add(name, path) and activate(name)"
    ]


def _present_rule(rule: LoRARule, layer: AdapterLayer | None) -> LoRARule:
    """Return the rule with the rank and the scale that the layer has now."""
    if layer is None:
        return rule
    scale = rule.scale if np.float32(rule.scale) == layer.scale else layer.scale
    return replace(rule, rank=layer.rank, scale=scale)


def _new_layers(targets: Mapping[str, TargetModule], seed: int) -> dict[str, AdapterLayer]:
    """Return a new layer around each target module. The model with the modules is unchanged."""
    adapted = {path: target for path, target in targets.items() if target.rule.kind != "none"}
    keys = mx.random.split(mx.random.key(seed), len(adapted)) if adapted else ()
    return {
        path: _LAYER_CLASSES[target.rule.kind, target.kind](target.module, target.rule, key)
        for (path, target), key in zip(adapted.items(), keys, strict=True)
    }
