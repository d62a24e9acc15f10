"""vLLM's endpoints that load and unload adapters while the server runs."""

import asyncio

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from textpolicy.serving.adapters import ServedAdapters
from textpolicy.serving.body_fields import BOOL, BodyFields
from textpolicy.serving.endpoints import read_body, receive_body
from textpolicy.serving.engine_queue import ServedEngine


class AdapterEndpoints:
    """Answers /v1/load_lora_adapter and /v1/unload_lora_adapter."""

    def __init__(self, served: ServedEngine, adapters: ServedAdapters) -> None:
        self._served = served
        self._adapters = adapters

    async def load(self, request: Request) -> Response:
        """Serve an adapter of an allowed folder under a name."""
        fields = BodyFields(read_body(await receive_body(request)))
        name, path_text = fields.required_text("lora_name"), fields.required_text("lora_path")
        replace = fields.take("load_inplace", BOOL, False)
        fields.refuse_unless({"is_3d_lora_weight": (False,)}, "the file says what it holds")
        fields.ignore("base_model_name")
        fields.finish()
        path = self._adapters.check_for_client(name, path_text, replace=replace)
        loaded = self._served.call(lambda: self._adapters.put(name, path))
        version = await asyncio.wrap_future(loaded)
        return PlainTextResponse(
            f"Success: LoRA adapter '{name}' added successfully, version {version}."
        )

    async def unload(self, request: Request) -> Response:
        """Serve a name no more; answers that have begun are finished."""
        fields = BodyFields(read_body(await receive_body(request)))
        name = fields.required_text("lora_name")
        fields.ignore("lora_int_id")
        fields.finish()
        self._adapters.check_removal(name)
        await asyncio.wrap_future(self._served.call(lambda: self._served.remove(name)))
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")
