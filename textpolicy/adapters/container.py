"""The adapters of one model: install, publish, swap, switch off, take off, fuse."""

import weakref
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from textpolicy.adapters.config import AdapterConfig
from textpolicy.adapters.files import AdapterFile, read_adapter, write_adapter
from textpolicy.adapters.fingerprint import Original
from textpolicy.adapters.fit import misfits
from textpolicy.adapters.fuse import FusedModule, FuseReport, fuse_layer
from textpolicy.adapters.kinds import new_layer
from textpolicy.adapters.layers import AdapterLayer, adapter_layers
from textpolicy.adapters.quantization import quantization_of, quantize, quantize_by_rules
from textpolicy.adapters.targets import select_targets
from textpolicy.adapters.tree import freeze_names, replace_modules
from textpolicy.errors import AdapterError


class AdapterContainer:
    """Made by `from_model`, found again by `of`. `version` 0 is a fresh adapter.

    With `publish_path` set, a trainer publishes every new version there.
    """

    def __init__(
        self,
        model: nn.Module,
        config: AdapterConfig,
        original: Original,
        version: int = 0,
    ) -> None:
        # Layers own their container. If it owned the model in return, a dropped model would stay
        # in memory, gigabytes of it, until the garbage collector looks for cycles.
        self._model = weakref.ref(model)
        self.config = config
        self.original = original
        self.version = version
        self.publish_path: Path | None = None
        for layer in adapter_layers(model).values():
            layer.container = self

    @classmethod
    def from_model(
        cls, model: nn.Module, config: AdapterConfig, *, seed: int = 0
    ) -> "AdapterContainer":
        """Install fresh adapters and freeze everything else. The model computes what it did.

        Where rules have a `weight_qtype` the base is quantized first, and stays so when unloaded.
        """
        quantize_by_rules(model, config)
        targets = select_targets(model, config)
        original = Original.of(model)
        keys = mx.random.split(mx.random.key(seed), len(targets))
        layers: dict[str, nn.Module] = {
            path: new_layer(target, key)
            for (path, target), key in zip(targets.items(), keys, strict=True)
        }
        replace_modules(model, layers)
        freeze_base(model)
        container = cls(model, config, original)
        mx.eval(container.parameters())
        return container

    @staticmethod
    def of(model: nn.Module) -> "AdapterContainer | None":
        """The container of an adapted model, or None."""
        containers = [layer.container for layer in adapter_layers(model).values()]
        container = next((found for found in containers if found), None)
        if container and container._model() is not model:
            raise AdapterError(
                "these adapters belong to another module than this one: pass the model that they "
                "were made for, and make second models with twin(model), not with copy.deepcopy"
            )
        return container

    @property
    def model(self) -> nn.Module:
        """The adapted model."""
        model = self._model()
        if model is None:
            raise AdapterError("the model of these adapters no longer exists: keep a reference")
        return model

    @property
    def fingerprint(self) -> str:
        """The name of the base that these adapters belong to."""
        return self.original.fingerprint

    def layers(self) -> dict[str, AdapterLayer]:
        """The adapter layers by path."""
        found = adapter_layers(self.model)
        layers = {path: layer for path, layer in found.items() if layer.container is self}
        if not layers:
            raise AdapterError(
                "these adapters are no longer on their model (they were unloaded or fused); "
                "make new ones with AdapterContainer.from_model or attach_adapter"
            )
        return layers

    def parameters(self) -> dict[str, mx.array]:
        """The adapter tensors, by their names in the model."""
        return _tensors(self.layers())

    def advance(self) -> int:
        """Count an update: to be called when the tensors have changed. Returns the new version."""
        _check_dtype(self.parameters())
        self.version += 1
        return self.version

    def publish(self, path: str | Path | None = None) -> int:
        """Write the adapters to `path`, by default `publish_path`; returns their version."""
        path = path or self.publish_path
        if path is None:
            raise AdapterError("no path to publish to: pass one, or set publish_path")
        tensors = self.parameters()
        _check_dtype(tensors)
        write_adapter(
            path,
            tensors,
            config=self.config,
            version=self.version,
            fingerprint=self.fingerprint,
            quantization=self.original.quantization,
        )
        return self.version

    def swap(
        self,
        source: str | Path | AdapterFile | Mapping[str, mx.array],
        version: int | None = None,
    ) -> int:
        """Replace every adapter tensor, or none if anything does not fit; returns the version.

        Without `version` it is the file's own or, for tensors, one more than now.
        """
        if isinstance(source, Mapping):
            self._assign(source, "the tensors given", [])
            found = self.version + 1
        else:
            file = source if isinstance(source, AdapterFile) else read_adapter(source)
            self._assign(file.arrays, str(file.path), self._differences(file))
            found = file.version
        self.version = found if version is None else version
        return self.version

    @contextmanager
    def disabled(self) -> Generator[None]:
        """Inside the block the model is its base, exactly: the reference policy."""
        layers = list(self.layers().values())
        off = mx.array(False)
        before = [layer.switch(off) for layer in layers]
        try:
            yield
        finally:
            for layer, gate in zip(layers, before, strict=True):
                layer.switch(gate)

    def unload(self) -> nn.Module:
        """Take the adapters off: the very modules and arrays of before, frozen as they were."""
        model = self.model
        replace_modules(model, {path: layer.base for path, layer in self.layers().items()})
        freeze_names(model, self.original.frozen)
        return model

    def fuse(self, *, dtype: mx.Dtype | None = None) -> FuseReport:
        """Add the adapters into the weights and take them off; reports how much survived.

        Weights keep the base's dtype unless `dtype` is given. A quantized base becomes float where
        it was adapted: rounding it to few bits again would erase most of the update.
        """
        model, layers = self.model, self.layers()
        _check_fit(layers, _tensors(layers), "adapters that cannot be fused", [])
        outcomes: list[FusedModule] = []
        # One module at a time: each base weight is freed before the next is made.
        for path in list(layers):
            layer = layers.pop(path)
            fused, outcome = fuse_layer(path, layer, dtype)
            replace_modules(model, {path: fused})
            outcomes.append(outcome)
        freeze_names(model, self.original.frozen)
        return FuseReport(modules=tuple(outcomes))

    def _assign(self, given: Mapping[str, mx.array], name: str, problems: list[str]) -> None:
        layers = self.layers()
        _check_fit(layers, given, name, problems)
        tensors = {name: array.astype(mx.float32) for name, array in given.items()}
        mx.eval(tensors)
        for path, layer in layers.items():
            for name in layer.trainable:
                layer[name] = tensors[f"{path}.{name}"]

    def _differences(self, file: AdapterFile) -> list[str]:
        pairs = {
            "rank": (
                _said(rule.rank for rule in file.config.rules),
                _said(rule.rank for rule in self.config.rules),
            ),
            "scale": (
                _said(rule.scale for rule in file.config.rules),
                _said(rule.scale for rule in self.config.rules),
            ),
            "base quantization": (file.quantization, self.original.quantization),
            "base fingerprint": (file.fingerprint[:12], self.fingerprint[:12]),
        }
        return [
            f"{name}: {given} in the file, {own} in the model"
            for name, (given, own) in pairs.items()
            if given != own
        ]


def attach_adapter(model: nn.Module, path: str | Path) -> AdapterContainer:
    """Give an unadapted model the adapters in a file, and the config that they were made with.

    A float base is quantized first where the adapters were trained over a quantized one.
    """
    file = read_adapter(path)
    if file.quantization and quantization_of(model) is None:
        quantize(model, **file.quantization)
    container = AdapterContainer.from_model(model, file.config)
    try:
        container.swap(file)
    except AdapterError:
        container.unload()
        raise
    return container


def freeze_base(model: nn.Module) -> None:
    """Leave only adapter tensors trainable; without adapters, nothing."""
    model.freeze()
    for layer in adapter_layers(model).values():
        layer.unfreeze(keys=list(layer.trainable), recurse=False)


def _said(numbers: Iterable[float]) -> str:
    return ", ".join(str(number) for number in sorted(set(numbers)))


def _tensors(layers: Mapping[str, AdapterLayer]) -> dict[str, mx.array]:
    return {
        f"{path}.{name}": layer[name] for path, layer in layers.items() for name in layer.trainable
    }


def _check_fit(
    layers: Mapping[str, AdapterLayer],
    given: Mapping[str, mx.array],
    name: str,
    problems: list[str],
) -> None:
    if problems := problems + misfits(_tensors(layers), given):
        lines = "\n  ".join([f"{name}: not what the adapters of this model can hold", *problems])
        raise AdapterError(f"{lines}\nWere they made with other options, or for another model?")


def _check_dtype(tensors: Mapping[str, mx.array]) -> None:
    for name, array in tensors.items():
        if array.dtype != mx.float32:
            raise AdapterError(
                f"{name} is {array.dtype}; expected float32, since small updates vanish in fewer "
                "bits. Was the model cast (set_dtype) after adapting it? Cast it before"
            )
