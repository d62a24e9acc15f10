"""Adapters of files under names: which may be loaded, and how they become served models."""

from collections.abc import Sequence
from pathlib import Path

from textpolicy.adapters.adapter import Adapter
from textpolicy.adapters.base_quantization import needs_quantization
from textpolicy.adapters.container import adapted_copy
from textpolicy.adapters.files.layouts import read_adapter
from textpolicy.errors import AdapterError, ConfigError
from textpolicy.runs import find_adapter
from textpolicy.serving.engine_queue import ServedEngine
from textpolicy.serving.refusal import RefusalError, unknown_model

_MAX_NAME = 100


class ServedAdapters:
    """Serves adapters over the base model of a `ServedEngine`, which is a model too.

    Each version has its own tree of modules; all trees share the arrays of the base. Clients may
    load adapters only from the folders in `allowed`.
    """

    def __init__(
        self, served: ServedEngine, base_name: str, *, allowed: Sequence[Path] = ()
    ) -> None:
        self._served = served
        self._base = base_name
        self._allowed = [folder.resolve() for folder in allowed]
        served.put(base_name, served.model, version=0)

    # The thread that owns mlx

    def put(self, name: str, path: Path) -> int:
        """Serve the adapter of a file or folder under a name from now on; return its version."""
        return self.put_adapter(name, read_adapter(path))

    def put_adapter(self, name: str, adapter: Adapter) -> int:
        """Serve an adapter under a name from now on; return its version."""
        self._check_name(name)
        if needs_quantization(self._served.model, adapter):
            raise AdapterError(
                f"{adapter.origin} was trained over a quantized base, and this server's base is "
                "not quantized. Start the server with this adapter, so that it quantizes its base"
            )
        model = adapted_copy(self._served.model, adapter)
        self._served.put(name, model, version=adapter.version, parent=self._base)
        return adapter.version

    # The server's thread

    def check_for_client(self, name: str, path_text: str, *, replace: bool) -> Path:
        """Return the path of an adapter that a client may load under this name, or refuse it."""
        try:
            self._check_name(name)
        except ConfigError as error:
            raise RefusalError(str(error), param="lora_name") from error
        if name in self._served.models and not replace:
            raise RefusalError(
                f"a model is named {name!r} already. Give load_inplace true to replace it, or "
                "choose another lora_name",
                param="lora_name",
                code="name_taken",
            )
        # Before anything is looked up, so that the answer says nothing of other folders.
        self._check_folder(path_text, Path(path_text))
        try:
            found = find_adapter(path_text)
        except (ConfigError, OSError) as error:
            raise RefusalError(
                str(error), status=404, kind="not_found_error", param="lora_path"
            ) from error
        return self._check_folder(path_text, found)

    def _check_folder(self, given: str, path: Path) -> Path:
        """Return the path without links; refuse it if it is in no allowed folder."""
        try:
            resolved = path.expanduser().resolve()
        except (OSError, ValueError, RuntimeError):
            resolved = None
        if resolved is None or not any(map(resolved.is_relative_to, self._allowed)):
            raise RefusalError(
                f"{given!r:.200} is in no folder that this server may load adapters from. "
                "Start the server with --allow-load DIR to allow a folder",
                status=403,
                kind="permission_error",
                param="lora_path",
                code="path_not_allowed",
            )
        return resolved

    def check_removal(self, name: str) -> None:
        """Refuse to remove a model that is not there, and the base."""
        if name not in self._served.models:
            raise unknown_model(name, list(self._served.models))
        if name == self._base:
            raise RefusalError(
                f"{name!r} is the base model, which cannot be unloaded", param="lora_name"
            )

    def _check_name(self, name: str) -> None:
        if not 0 < len(name) <= _MAX_NAME or not name.isprintable() or name != name.strip():
            raise ConfigError(
                f"the name of an adapter is {name!r:.120}; expected 1 to {_MAX_NAME} characters "
                "that can be printed, and no space around them"
            )
        if name == self._base:
            raise ConfigError(f"{name!r} is the name of the base model. Choose another name")
