"""Loading models, sampling from models, adapting models, and reloading adapters."""

from textpolicy.generation.lora import (
    apply_lora,
    compute_lora_memory_savings,
    create_lora_setup,
    create_qlora_setup,
    extract_params,
    freeze_base,
    merge_weights,
)
from textpolicy.generation.mlx_generation import create_policy, load_model
from textpolicy.generation.reload import (
    create_auto_reload_setup,
    create_reloadable_policy,
    reload_model,
    save_adapters,
)

__all__ = [
    "apply_lora",
    "compute_lora_memory_savings",
    "create_auto_reload_setup",
    "create_lora_setup",
    "create_policy",
    "create_qlora_setup",
    "create_reloadable_policy",
    "extract_params",
    "freeze_base",
    "load_model",
    "merge_weights",
    "reload_model",
    "save_adapters",
]
