"""Loading a model, and making a policy of a model."""

from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx_lm.tokenizer_utils import TokenizerWrapper

from textpolicy import fast_cpu
from textpolicy.activity import doing
from textpolicy.adapters.container import AdapterContainer
from textpolicy.adapters.quantization.packed_product import use_fast_products
from textpolicy.errors import ConfigError, ModelError
from textpolicy.fast_cpu.bfloat16_copies import keep_copies
from textpolicy.fast_cpu.model_functions import use_fast_functions
from textpolicy.generation.model_files import find_model
from textpolicy.generation.policy import ModelPolicy
from textpolicy.machine import most_copied_bytes
from textpolicy.types import Sampling
from textpolicy.untrusted.template_check import check_template_ends
from textpolicy.user_code.faults import raise_user_errors_as

_BESIDE_SAMPLING = ("seed", "merge_adapters")


@doing("loading the model")
def load_model(
    path_or_name: str | Path,
    adapter_path: str | Path | None = None,
    tokenizer_config: Mapping[str, Any] | None = None,
    *,
    dtype: mx.Dtype | None = None,
) -> tuple[nn.Module, TokenizerWrapper]:
    """Return the model, evaluated and in eval mode, and its tokenizer.

    With `adapter_path`, the model has the adapters of that file or folder. `dtype` is the dtype of
    the unquantized weights. The default is float32 on a CPU, where bfloat16 is many times slower,
    and the checkpoint's dtype on a GPU. Code in a checkpoint is never run.
    """
    fast_cpu.enable()
    folder = find_model(path_or_name)
    config = {"trust_remote_code": False, **(tokenizer_config or {})}
    # A foreign config can make mlx-lm raise anything, also in the first forward pass.
    with raise_user_errors_as(ModelError, f"loading the model in {folder}"):
        model, tokenizer, *_ = mlx_lm.load(str(folder), tokenizer_config=config)
        if dtype is None and mx.default_device().type == mx.DeviceType.cpu:
            dtype = mx.float32
        if dtype is not None:
            model.set_dtype(dtype)
            mx.eval(model.parameters())
        use_fast_products(model)
        use_fast_functions(model)
        keep_copies(model, most_copied_bytes())
        mx.eval(cast(Any, model)(mx.array([[0]])))
    check_template_ends(tokenizer.chat_template)
    if adapter_path is not None:
        AdapterContainer.from_directory(adapter_path).load(model)
    return model, tokenizer


def create_policy(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    params: Mapping[str, Any] | None = None,
    *,
    follow: Path | None = None,
    allow_special_tokens: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> ModelPolicy:
    """Return a policy that samples from `model`, and so sees every update of the model at once.

    `params` are the fields of `Sampling` (max_tokens, temperature, top_p, top_k, min_p,
    repetition_penalty, stop), and `seed` and `merge_adapters` as `ModelPolicy` takes them. With
    `follow`, the policy reloads the adapter file at that path before a generation whenever the file
    is new. With `allow_special_tokens`, prompts may spell control tokens such as <|im_end|>;
    otherwise they are plain text. `chat_template_kwargs` are arguments of the chat template, such
    as {"enable_thinking": False}.
    """
    fast_cpu.enable()
    options = dict(params or {})
    seed = options.pop("seed", None)
    if not isinstance(seed, int | None):
        raise ConfigError(f"seed is {seed!r}; expected a whole number, or None for a random one")
    merge_adapters = options.pop("merge_adapters", False)
    if not isinstance(merge_adapters, bool):
        raise ConfigError(f"merge_adapters is {merge_adapters!r}; expected True or False")
    return ModelPolicy(
        model,
        tokenizer,
        _read_sampling(options),
        follow=follow,
        seed=seed,
        merge_adapters=merge_adapters,
        allow_special_tokens=allow_special_tokens,
        chat_template_kwargs=chat_template_kwargs,
    )


def _read_sampling(options: dict[str, Any]) -> Sampling:
    known = [field.name for field in fields(Sampling)]
    for name in options:
        if name not in known:
            others = [*known, *_BESIDE_SAMPLING]
            near = get_close_matches(name, others, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ConfigError(f"unknown generation option {name!r}{hint} Known: {others}")
    if (stop := options.get("stop")) is not None:
        options["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    return Sampling(**options)
