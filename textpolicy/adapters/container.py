"""The adapters of one model: install, load, publish, swap, switch off, take off, fuse."""

import weakref
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from textpolicy.adapters.active_adapter import (
    Fitted,
    assign,
    check_fit,
    expected_shapes,
    explicit_config,
    fit,
    fresh,
    is_finite,
    lookup_problems,
    misfits,
    refuse_misfits,
    targets_of,
    with_ranks_of,
)
from textpolicy.adapters.adapter import Adapter, check_float32
from textpolicy.adapters.base_identity import BaseIdentity
from textpolicy.adapters.base_quantization import quantize_by_rules, quantize_for_adapter
from textpolicy.adapters.combine import combine
from textpolicy.adapters.config.adapter_config import AdapterConfig
from textpolicy.adapters.config.rules import LoRARule
from textpolicy.adapters.files.adapter_file import write_adapter_file
from textpolicy.adapters.files.layouts import read_adapter, write_folder
from textpolicy.adapters.fuse import FuseReport, fuse_layer
from textpolicy.adapters.layers.adapter_layer import AdapterLayer, adapter_layers
from textpolicy.adapters.module_tree import freeze_names, replace_modules
from textpolicy.adapters.quantization.cpu_layers import use_fast_products
from textpolicy.errors import AdapterError

DEFAULT = "default"
Source = str | Path | Adapter


class AdapterContainer:
    """Made by `from_model` or `from_directory`, found again by `of`.

    It holds one adapter or several by name, of which the model carries one. `version` 0 is a fresh
    adapter. With `publish_path` set, a trainer publishes every new version there.
    """

    def __init__(self, name: str = DEFAULT) -> None:
        # Layers own their container. If it owned the model in return, a dropped model would stay
        # in memory, gigabytes of it, until the garbage collector looks for cycles.
        self._model: weakref.ref[nn.Module] | None = None
        self._original: BaseIdentity | None = None
        self._current: Fitted | None = None
        self._apart: dict[str, Adapter] = {}
        self._gate = mx.array(True)
        self.name = name
        self.publish_path: Path | None = None

    @classmethod
    def from_model(
        cls, model: nn.Module, config: AdapterConfig, *, name: str = DEFAULT, seed: int = 0
    ) -> "AdapterContainer":
        """Install fresh adapters and freeze everything else. The model computes what it did.

        Where rules have a `weight_qtype` the base is quantized first, and stays so when unloaded.
        """
        quantize_by_rules(model, config)
        container = cls(name)
        container._put_on(model, BaseIdentity.of(model), fresh(model, config, seed))
        mx.eval(container.parameters())
        return container

    @classmethod
    def from_directory(cls, path: str | Path, *, name: str = DEFAULT) -> "AdapterContainer":
        """The adapter in a folder or file of this library, mlx-lm, mlx-swift-lm or PEFT.

        It is on no model until `load`.
        """
        container = cls(name)
        container._apart[name] = read_adapter(path)
        return container

    @staticmethod
    def of(model: nn.Module) -> "AdapterContainer | None":
        """The container of an adapted model, or None."""
        owners = [layer.owner for layer in adapter_layers(model).values()]
        container = next((owner for owner in owners if isinstance(owner, AdapterContainer)), None)
        if container and (container._model is None or container._model() is not model):
            raise AdapterError(
                "these adapters belong to another module than this one: pass the model that they "
                "were made for, and make second models with shared_copy(model), not with "
                "copy.deepcopy"
            )
        return container

    @property
    def model(self) -> nn.Module:
        """The adapted model."""
        if self._model is None:
            raise AdapterError(
                "these adapters are on no model (they were unloaded or fused, or never loaded); "
                "put them on one with load(model)"
            )
        if (model := self._model()) is None:
            raise AdapterError("the model of these adapters no longer exists: keep a reference")
        return model

    @property
    def original(self) -> BaseIdentity:
        """What the model is without adapters."""
        _ = self.model
        assert self._original is not None
        return self._original

    @property
    def fingerprint(self) -> str:
        """The name of the base that these adapters belong to."""
        return self.original.fingerprint

    @property
    def names(self) -> tuple[str, ...]:
        """All adapters held, the active one first."""
        return tuple(dict.fromkeys([self.name, *self._apart]))

    @property
    def config(self) -> AdapterConfig:
        """How the active adapter was made, or what has been swapped in since."""
        return (self._current or self._apart[self.name]).config

    @property
    def version(self) -> int:
        """The number of the active adapter's last update."""
        return (self._current or self._apart[self.name]).version

    @version.setter
    def version(self, version: int) -> None:
        self._on_model().version = version

    def layers(self) -> dict[str, AdapterLayer]:
        """The active adapter's layers by path."""
        return dict(self._on_model().layers)

    def parameters(self) -> dict[str, mx.array]:
        """The active adapter's tensors, by their names in the model."""
        if self._current is None:
            return dict(self._apart[self.name].arrays)
        return self._on_model().tensors()

    def advance(self) -> int:
        """Count an update: to be called when the tensors have changed. Returns the new version."""
        check_float32(self.parameters())
        self._check_shapes()
        self.version += 1
        return self.version

    # Files

    def publish(self, path: str | Path | None = None) -> int:
        """Write the active adapter as one file, by default to `publish_path`; returns its version.

        The file is replaced in one step.
        """
        path = path or self.publish_path
        if path is None:
            raise AdapterError("no path to publish to: pass one, or set publish_path")
        check_float32(self.parameters())
        write_adapter_file(path, self.adapter())
        return self.version

    def save(
        self, folder: str | Path, *, layout: str = "mlx", over_float_base: bool = False
    ) -> Path:
        """Write the active adapter as a folder that mlx-lm and mlx-swift-lm load, or PEFT.

        Adapters of a base that the other library cannot load, such as a quantized one for PEFT,
        compute something else over a float base: `over_float_base` says that this is meant.
        Returns the folder.
        """
        check_float32(self.parameters())
        adapter = self.adapter()
        with self._bare() as model:
            return write_folder(folder, adapter, model, layout, over_float_base=over_float_base)

    def adapter(self, name: str | None = None) -> Adapter:
        """An adapter as it is now, apart from the model; the active one unless a name is given."""
        name = name or self.name
        if self._current is None or name != self.name:
            return self._find(name)
        fitted = self._on_model()
        return Adapter(
            origin=name,
            arrays=fitted.tensors(),
            config=fitted.present_config(),
            version=fitted.version,
            fingerprint=self.fingerprint,
            quantization=self.original.quantization,
        )

    def swap(self, source: Source | Mapping[str, mx.array], version: int | None = None) -> int:
        """Replace every tensor of the active adapter, or none if anything does not fit.

        Ranks and scales may change, and compiled functions see it; modules and kinds have to be
        the same. Returns the version: without `version` it is the file's own or, for tensors, one
        more than now.
        """
        fitted = self._on_model()
        if isinstance(source, Mapping):
            rules = with_ranks_of(source, fitted.rules)
            config = fitted.config if rules == fitted.rules else explicit_config(rules)
            self._assign(source, rules, "the tensors given")
            fitted.config, found = config, fitted.version + 1
        else:
            adapter = source if isinstance(source, Adapter) else read_adapter(source)
            problems = self._problems(adapter)
            rules = self._rules_of(adapter, problems)
            self._assign(adapter.arrays, rules, adapter.origin, problems)
            fitted.config, found = adapter.config, adapter.version
        fitted.version = found if version is None else version
        return fitted.version

    # Several by name

    def add(self, name: str, source: Source) -> None:
        """Hold another adapter of this base beside the active one, ready to be activated."""
        self._check_new(name)
        adapter = source if isinstance(source, Adapter) else read_adapter(source)
        with self._bare() as model:
            check_fit(model, adapter, self.original.differences(adapter))
        self._apart[name] = adapter

    def activate(self, name: str) -> None:
        """Put the adapter of this name in the place of the active one, which stays beside it."""
        if name == self.name:
            return
        adapter, now, model = self._find(name), self.adapter(), self.model
        bases = {path: layer.base for path, layer in self.layers().items()}
        with self._bare():
            fitted = fit(model, adapter)
        replace_modules(model, bases)
        del self._apart[name]
        self._apart[self.name], self.name = now, name
        self._put_on(model, self.original, fitted)

    def remove(self, name: str) -> None:
        """Drop an adapter that is not the active one."""
        if name == self.name:
            raise AdapterError(f"{name!r} is the active adapter: activate another one first")
        self._find(name)
        del self._apart[name]

    def combine(
        self,
        name: str,
        weights: Mapping[str, float],
        method: str = "cat",
        *,
        rank: int | None = None,
    ) -> None:
        """Hold a weighted sum of LoRA adapters as a new one, ready to be activated.

        "cat" is the exact sum, of a rank that is the sum of the ranks. "svd" is the nearest to it
        of `rank`, by default the largest of theirs. "linear" sums the factors instead of their
        products, as PEFT does: it keeps the rank and is no sum of the updates.
        """
        self._check_new(name)
        adapters = {one: self.adapter(one) for one in weights}
        self.add(name, combine(name, self.adapter(), adapters, weights, method, rank))

    # The model

    def load(self, model: nn.Module, *, dropout: float | None = None) -> "AdapterContainer":
        """Put the adapters on an unadapted model, all or none of them, and freeze the rest.

        A float base is quantized first where the adapters were made over a quantized one. A
        `dropout` takes the place of the one that the adapters have been trained with.
        """
        if self._current is not None:
            raise AdapterError("these adapters are on a model already: unload() them first")
        if dropout is not None:
            own = self._apart[self.name]
            self._apart[self.name] = replace(own, config=own.config.with_dropout(dropout))
        quantize_for_adapter(model, self._apart[self.name])
        original = BaseIdentity.of(model)
        for adapter in self._apart.values():
            check_fit(model, adapter, original.differences(adapter))
        fitted = fit(model, self._apart.pop(self.name))
        self._put_on(model, original, fitted)
        return self

    def unload(self) -> nn.Module:
        """Take the adapters off: the very modules and arrays of before, frozen as they were.

        They can be loaded again, on this model or another one of the same base.
        """
        model, frozen, layers = self.model, self.original.frozen, self.layers()
        self._put_apart()
        replace_modules(model, {path: layer.base for path, layer in layers.items()})
        freeze_names(model, frozen)
        return model

    @contextmanager
    def disabled(self) -> Generator[None]:
        """Inside the block the model is its base, exactly: the reference policy."""
        _ = self.layers()
        before = self._gate
        self._switch(mx.array(False))
        try:
            yield
        finally:
            self._switch(before)

    def fuse(
        self, *, dtype: mx.Dtype | None = None, qtype: str | None = None, min_survival: float = 0.9
    ) -> FuseReport:
        """Add the active adapter into the weights and take all off; reports how much survived.

        Weights keep the base's dtype unless `dtype` is given. A quantized base becomes float where
        it was adapted, unless `qtype` names a format to round to again: "same", or one that rules
        know. Few bits erase most of a small update: where less than `min_survival` of it would be
        left, an error says so and nothing is changed.
        """
        report = self.fuse_report(dtype=dtype, qtype=qtype)
        report.check(min_survival)
        model, frozen, layers = self.model, self.original.frozen, self.layers()
        self._put_apart()
        # One module at a time: each base weight is freed before the next is made.
        for path in list(layers):
            layer = layers.pop(path)
            replace_modules(model, {path: fuse_layer(path, layer, dtype, qtype)[0]})
        use_fast_products(model)
        freeze_names(model, frozen)
        return report

    def fuse_report(self, *, dtype: mx.Dtype | None = None, qtype: str | None = None) -> FuseReport:
        """What would survive `fuse`; the model stays as it is."""
        layers = self.layers()
        wrong = [name for name, array in self.parameters().items() if not is_finite(array)]
        refuse_misfits("adapters that cannot be fused", (f"{name}: not finite" for name in wrong))
        outcomes = [fuse_layer(path, layer, dtype, qtype)[1] for path, layer in layers.items()]
        return FuseReport(modules=tuple(outcomes))

    def merge_and_unload(
        self, *, dtype: mx.Dtype | None = None, qtype: str | None = None, min_survival: float = 0.9
    ) -> nn.Module:
        """`fuse`, for the plain model instead of the report."""
        model = self.model
        self.fuse(dtype=dtype, qtype=qtype, min_survival=min_survival)
        return model

    def share(self, copy: nn.Module) -> "AdapterContainer":
        """A container for a copy of the model, layers and all: its active adapter is this one's."""
        made = AdapterContainer(self.name)
        fitted = replace(self._on_model(), layers=adapter_layers(copy))
        made._gate = self._gate
        made._put_on(copy, self.original, fitted)
        return made

    def _on_model(self) -> Fitted:
        _ = self.model
        assert self._current is not None
        return self._current

    def _find(self, name: str) -> Adapter:
        if name not in self._apart:
            raise AdapterError(f"no adapter is named {name!r}; there are {list(self.names)}")
        return self._apart[name]

    def _check_new(self, name: str) -> None:
        _ = self.model
        if name in self.names:
            raise AdapterError(f"an adapter is named {name!r} already: remove it, or swap it")

    def _put_on(self, model: nn.Module, original: BaseIdentity, fitted: Fitted) -> None:
        """Make an adapter's layers those of a model without any, and this their container."""
        for layer in fitted.layers.values():
            layer.owner = self
            layer.switch(self._gate)
            layer.train(model.training)
        replace_modules(model, dict(fitted.layers))
        freeze_base(model)
        self._model, self._original = weakref.ref(model), original
        # The model owns the layers, and through them the base: see __init__.
        self._current = replace(fitted, layers=weakref.WeakValueDictionary(fitted.layers))

    def _put_apart(self) -> None:
        """Keep the tensors, and nothing of the model."""
        self._apart = {self.name: self.adapter()} | self._apart
        self._current = self._model = None

    @contextmanager
    def _bare(self) -> Generator[nn.Module]:
        """The model without its adapters, for as long as something is looked up in it."""
        model, layers = self.model, self.layers()
        replace_modules(model, {path: layer.base for path, layer in layers.items()})
        try:
            yield model
        finally:
            replace_modules(model, dict(layers))

    def _switch(self, gate: mx.array) -> None:
        self._gate = gate
        if self._current is not None:
            for layer in self._current.layers.values():
                layer.switch(gate)

    def _assign(
        self,
        arrays: Mapping[str, mx.array],
        rules: Mapping[str, LoRARule],
        origin: str,
        problems: Iterable[str] = (),
    ) -> None:
        fitted = self._on_model()
        changed = {
            path: replace(own, rank=new.rank, scale=new.scale, dropout=new.dropout)
            for path, own in fitted.rules.items()
            for new in [rules.get(path, own)]
        }
        refuse_misfits(origin, problems, misfits(self._shapes(changed), arrays))
        assign(fitted, arrays, changed)

    def _shapes(self, rules: Mapping[str, LoRARule]) -> dict[str, tuple[int, ...]]:
        return expected_shapes({path: layer.base for path, layer in self.layers().items()}, rules)

    def _check_shapes(self) -> None:
        """Refuse what a broadcast makes of a tensor and an optimizer's state of another rank."""
        shapes, tensors = self._shapes(self._on_model().rules), self.parameters()
        changed = [name for name, shape in shapes.items() if tensors[name].shape != shape]
        if changed:
            raise AdapterError(
                f"{changed[0]} and {len(changed) - 1} more have changed their shapes: it is "
                f"{tensors[changed[0]].shape}, expected {shapes[changed[0]]}. Was the optimizer "
                "made before a swap to another rank? Its state is of that rank: make a new one"
            )

    def _problems(self, adapter: Adapter) -> list[str]:
        """Why an adapter is not for this model, whatever its tensors are."""
        problems = self.original.differences(adapter)
        if adapter.lookup_only:
            with self._bare() as model:
                problems += lookup_problems(model, adapter)
        return problems

    def _rules_of(self, adapter: Adapter, problems: Iterable[str]) -> Mapping[str, LoRARule]:
        """What the adapter's config says about this model; an error with `problems` if nothing."""
        if adapter.config == self.config:
            return self._on_model().rules
        with self._bare() as model:
            targets = targets_of(model, adapter, problems)
        return {path: target.rule for path, target in targets.items()}


def freeze_base(model: nn.Module) -> None:
    """Leave only adapter tensors trainable; without adapters, nothing."""
    model.freeze()
    for layer in adapter_layers(model).values():
        layer.unfreeze(keys=list(layer.trainable), recurse=False)
