"""AdapterContainer: the adapters of one model, and everything one can do with them."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from textpolicy.adapters.active_adapter import ActiveAdapter
from textpolicy.adapters.adapter import Adapter, check_float32
from textpolicy.adapters.base_quantization import quantize_by_rules, quantize_for_adapter
from textpolicy.adapters.config.adapter_config import AdapterConfig
from textpolicy.adapters.files.adapter_file import write_adapter_file
from textpolicy.adapters.files.gguf_layout import with_row_order_for
from textpolicy.adapters.files.layouts import read_adapter, write_folder
from textpolicy.adapters.fuse import FuseReport
from textpolicy.adapters.layers.adapter_layer import AdapterLayer, adapter_layers
from textpolicy.adapters.module_tree import share_module_tree
from textpolicy.errors import AdapterError

_DEFAULT_NAME = "default"
AdapterSource = str | Path | Adapter
"""A file, a folder, or an adapter in memory."""


class AdapterContainer:
    """One adapter or several by name, one of which is active: its layers are in the model.

    `from_model` or `from_directory` makes a container, and `AdapterContainer.of(model)` returns the
    container of an adapted model.
    A new adapter has version 0. If `publish_path` is set, a trainer publishes every new version
    there.
    """

    def __init__(self, name: str = _DEFAULT_NAME) -> None:
        self.name = name
        self.publish_path: Path | None = None
        self._active: ActiveAdapter | None = None
        # The other adapters. While nothing is in a model, the adapter called `name` is here too.
        self._inactive: dict[str, Adapter] = {}
        self._enabled = mx.array(True)

    @classmethod
    def from_model(
        cls, model: nn.Module, config: AdapterConfig, *, name: str = _DEFAULT_NAME, seed: int = 0
    ) -> "AdapterContainer":
        """Put new adapters into a model and freeze all else. The model's outputs do not change.

        Modules whose rule has a `weight_qtype` are quantized first, and `unload` does not undo it.
        """
        quantize_by_rules(model, config)
        container = cls(name)
        active = ActiveAdapter(model, container._enabled)
        active.put_new(config, seed)
        container._own(active)
        mx.eval(container.parameters())
        return container

    @classmethod
    def from_directory(cls, path: str | Path, *, name: str = _DEFAULT_NAME) -> "AdapterContainer":
        """Read a file of this library, a GGUF file, or a folder of mlx-lm, mlx-swift-lm or PEFT.

        `load` then puts the adapter into a model.
        """
        return cls.from_adapter(read_adapter(path), name=name)

    @classmethod
    def from_adapter(cls, adapter: Adapter, *, name: str = _DEFAULT_NAME) -> "AdapterContainer":
        """Hold an adapter that is in memory. `load` then puts the adapter into a model."""
        container = cls(name)
        container._inactive[name] = adapter
        return container

    @staticmethod
    def of(model: nn.Module) -> "AdapterContainer | None":
        """Return the container of an adapted model, or None."""
        owners = [layer.owner for layer in adapter_layers(model).values()]
        container = next((owner for owner in owners if isinstance(owner, AdapterContainer)), None)
        if container and not (container._active and container._active.is_in(model)):
            raise AdapterError(
                "The adapters in this model belong to another model. Pass the model that the "
                "adapters were made for, and copy models with shared_copy(model), not with "
                "copy.deepcopy"
            )
        return container

    # What it holds

    @property
    def model(self) -> nn.Module:
        """The adapted model."""
        return self._require_active().model

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the base model."""
        return self._require_active().base.fingerprint

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all adapters, the active adapter first."""
        return tuple(dict.fromkeys([self.name, *self._inactive]))

    @property
    def config(self) -> AdapterConfig:
        """The config of the active adapter, which a swap can change."""
        return (self._active or self._inactive[self.name]).config

    @property
    def version(self) -> int:
        """The version of the active adapter: the number of its last update."""
        return (self._active or self._inactive[self.name]).version

    @version.setter
    def version(self, version: int) -> None:
        self._require_active().version = version

    def layers(self) -> dict[str, AdapterLayer]:
        """Return the active adapter's layers by path."""
        return dict(self._require_active().layers)

    def parameters(self) -> dict[str, mx.array]:
        """Return the active adapter's tensors by their names in the model."""
        if self._active is None:
            return dict(self._inactive[self.name].arrays)
        return self._require_active().tensors()

    def adapter(self, name: str | None = None) -> Adapter:
        """Return an adapter as it is now, apart from the model. The default is the active one."""
        name = name or self.name
        if self._active and name == self.name:
            return self._require_active().to_adapter(name)
        if name not in self._inactive:
            raise AdapterError(f"no adapter is named {name!r}; there are {list(self.names)}")
        return self._inactive[name]

    # Training

    def movement(self) -> dict[str, float]:
        """Return metrics: the norm of all updates to the base, and the share of B that is not 0."""
        layers = self.layers().values()
        squares = mx.stack([layer.product_square() for layer in layers])
        moved = [(layer.lora_b != 0).astype(mx.float32).mean() for layer in layers]
        return {
            "adapters/delta_norm": float(mx.sqrt(mx.maximum(squares.sum(), 0))),
            "adapters/moved": float(mx.stack(moved).mean()),
        }

    def advance(self) -> int:
        """Count an update and return the new version. Call this after the tensors have changed."""
        active = self._require_active()
        active.check_update()
        active.version += 1
        return active.version

    @contextmanager
    def disabled(self) -> Generator[None]:
        """Turn the adapters off in the block: the model is its base, the reference policy."""
        _ = self._require_active()
        before = self._enabled
        self._set_enabled(mx.array(False))
        try:
            yield
        finally:
            self._set_enabled(before)

    # Files

    def publish(self, path: str | Path | None = None) -> int:
        """Write the active adapter as one file, replaced in one step, and return the version.

        The default path is `publish_path`.
        """
        path = path or self.publish_path
        if path is None:
            raise AdapterError("There is no path to publish to. Pass a path, or set publish_path")
        write_adapter_file(path, self._checked_adapter())
        return self.version

    def save(
        self, folder: str | Path, *, layout: str = "mlx", over_float_base: bool = False
    ) -> Path:
        """Write the active adapter as a folder that mlx-lm and mlx-swift-lm load, or PEFT.

        Returns the folder. Some quantized bases cannot be loaded by the other library. Over a
        float base the adapter computes something else, so saving raises an error unless
        `over_float_base` is True.
        """
        adapter = self._checked_adapter()
        with self._require_active().without_layers() as model:
            return write_folder(folder, adapter, model, layout, over_float_base=over_float_base)

    def swap(
        self, source: AdapterSource | Mapping[str, mx.array], version: int | None = None
    ) -> int:
        """Replace every tensor of the active adapter, or raise an error and replace none.

        Ranks and scales may change, and compiled functions see the change. Modules and kinds must
        be the same. Returns the version: by default the file's version, or for tensors the
        present version plus one.
        """
        active = self._require_active()
        if isinstance(source, str | Path):
            source = read_adapter(source)
        if isinstance(source, Adapter):
            source = with_row_order_for(active.model, source)
        active.swap(source)
        if version is not None:
            active.version = version
        return active.version

    # Several adapters by name

    def add(self, name: str, source: AdapterSource) -> None:
        """Hold another adapter of the same base, ready to be activated."""
        active = self._require_active()
        if name in self.names:
            raise AdapterError(
                f"an adapter is named {name!r} already. Choose another name, remove the adapter, "
                "or swap its tensors"
            )
        adapter = source if isinstance(source, Adapter) else read_adapter(source)
        adapter = with_row_order_for(active.model, adapter)
        active.check(adapter)
        self._inactive[name] = adapter

    def activate(self, name: str) -> None:
        """Put the adapter of this name into the model. The present adapter becomes inactive."""
        if name == self.name:
            return
        chosen, present = self.adapter(name), self.adapter()
        active = self._require_active()
        active.put(chosen)
        self._own(active)
        del self._inactive[name]
        self._inactive[self.name], self.name = present, name

    def remove(self, name: str) -> None:
        """Drop an adapter that is not active."""
        if name == self.name:
            raise AdapterError(f"{name!r} is the active adapter. Activate another adapter first")
        _ = self.adapter(name)
        del self._inactive[name]

    # Into the model and out of it

    def load(self, model: nn.Module, *, dropout: float | None = None) -> "AdapterContainer":
        """Put the adapter into an unadapted model and freeze all else, or raise an error.

        A float base is quantized first if the adapters were made over a quantized base. `dropout`
        replaces the dropout that the adapter was trained with.
        """
        if self._active:
            raise AdapterError("These adapters are in a model already: call unload() first")
        own = with_row_order_for(model, self._inactive[self.name])
        if dropout is not None:
            own = replace(own, config=own.config.with_dropout(dropout))
        self._inactive[self.name] = own
        quantize_for_adapter(model, self._inactive[self.name])
        active = ActiveAdapter(model, self._enabled)
        for name in self.names[1:]:
            active.check(self._inactive[name])
        active.put(self._inactive[self.name])
        del self._inactive[self.name]
        self._own(active)
        return self

    def unload(self) -> nn.Module:
        """Take the adapters out: the model has its original modules and arrays again.

        The adapters can be loaded again, into this model or another model of the same base.
        """
        return self._release().remove()

    def fuse(
        self, *, dtype: mx.Dtype | None = None, qtype: str | None = None, min_survival: float = 0.9
    ) -> FuseReport:
        """Add the active adapter to the weights, unload it, and report how much survived rounding.

        The weights keep the base's dtype unless `dtype` is given. Adapted modules of a quantized
        base become float, unless `qtype` names a format to quantize to: "same", or a
        `weight_qtype` of rules. Few bits erase most of a small update. If less than `min_survival`
        would survive, an error is raised and nothing changes.
        """
        report = self.fuse_report(dtype=dtype, qtype=qtype)
        report.check(min_survival)
        self._release().fuse(dtype=dtype, qtype=qtype)
        return report

    def fuse_report(self, *, dtype: mx.Dtype | None = None, qtype: str | None = None) -> FuseReport:
        """Return the report that `fuse` would return. The model stays unchanged."""
        return self._require_active().fuse_report(dtype=dtype, qtype=qtype)

    def merge_and_unload(
        self, *, dtype: mx.Dtype | None = None, qtype: str | None = None, min_survival: float = 0.9
    ) -> nn.Module:
        """Do what `fuse` does, and return the plain model instead of the report."""
        model = self.model
        self.fuse(dtype=dtype, qtype=qtype, min_survival=min_survival)
        return model

    def copy_to(self, model: nn.Module) -> "AdapterContainer":
        """Return a container, with the active adapter only, for a copy of model and layers."""
        made = AdapterContainer(self.name)
        made._enabled = self._enabled
        made._own(self._require_active().copy_to(model))
        return made

    def _require_active(self) -> ActiveAdapter:
        if self._active is None:
            raise AdapterError(
                "These adapters are in no model: they were unloaded or fused, or never loaded. Put "
                "them into a model with load(model)"
            )
        _ = self._active.model
        return self._active

    def _own(self, active: ActiveAdapter) -> None:
        for layer in active.layers.values():
            layer.owner = self
        self._active = active

    def _release(self) -> ActiveAdapter:
        """Keep the active adapter's tensors, and drop the reference to the model."""
        active = self._require_active()
        self._inactive = {self.name: self.adapter()} | self._inactive
        self._active = None
        return active

    def _checked_adapter(self) -> Adapter:
        check_float32(self.parameters())
        return self.adapter()

    def _set_enabled(self, enabled: mx.array) -> None:
        self._enabled = enabled
        if self._active:
            self._active.set_enabled(enabled)


def shared_copy(model: nn.Module) -> nn.Module:
    """Return another model that shares every array, with its own copy of the active adapter.

    Training one model, or swapping its adapter, never changes the other. The copy has no
    `publish_path`, and none of the inactive adapters.
    """
    copy = share_module_tree(model)
    if container := AdapterContainer.of(model):
        container.copy_to(copy)
    return copy


def adapted_copy(model: nn.Module, source: AdapterSource | None) -> nn.Module:
    """Return another model over the same base arrays, with the adapter of `source`, or without any.

    Several such copies serve several adapters of one base. None of them changes another.
    """
    copy = shared_copy(model)
    if container := AdapterContainer.of(copy):
        container.unload()
    if source is not None:
        adapter = source if isinstance(source, Adapter) else read_adapter(source)
        AdapterContainer.from_adapter(adapter).load(copy)
    return copy
