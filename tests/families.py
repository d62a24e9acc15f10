"""Tiny random models of many families of mlx-lm, by name.

The dimensions of recurrent heads are multiples of 32: mlx-lm's GPU kernels take no others.
"""

from importlib import import_module
from typing import Any

import mlx.nn as nn

from tests.tiny import randomized

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
WINDOW = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
}
GATED_DELTA = {
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 1,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
    "partial_rotary_factor": 0.25,
    "attention_bias": False,
}
LATENT = {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 32}
MAMBA2 = {
    "mamba_num_heads": 4,
    "mamba_head_dim": 32,
    "mamba_proj_bias": False,
    "ssm_state_size": 32,
    "conv_kernel": 4,
    "n_groups": 1,
    "mlp_bias": False,
    "layer_norm_epsilon": 1e-5,
    "use_bias": False,
    "use_conv_bias": True,
    "attention_bias": False,
}

OPTIONS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama with a window": WINDOW,
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": EXPERTS,
    "olmoe": EXPERTS,
    "gemma2": {},
    "gemma3_text": {"sliding_window": 4, "sliding_window_pattern": 2},
    "gemma4_text": {
        "global_head_dim": 32,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
    },
    "deepseek_v3": LATENT
    | {
        "n_routed_experts": None,
        "n_shared_experts": None,
        "q_lora_rank": 32,
        "num_key_value_heads": 2,
    },
    "mamba": {
        "intermediate_size": 128,
        "state_size": 8,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_rank": 4,
    },
    "mamba2": {
        "num_heads": 4,
        "head_dim": 32,
        "intermediate_size": 128,
        "state_size": 32,
        "layer_norm_epsilon": 1e-5,
        "conv_kernel": 4,
        "n_groups": 1,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_limit": (0.001, 100.0),
        "time_step_rank": 4,
    },
    "nemotron_h": MAMBA2 | {"hybrid_override_pattern": ["M", "*", "-"]},
    "granitemoehybrid": {
        "attention_bias": False,
        "embedding_multiplier": 1.0,
        "attention_multiplier": 0.2,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
        "layer_types": ["mamba", "attention"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 32,
        "mamba_proj_bias": False,
        "mamba_d_state": 32,
        "mamba_d_conv": 4,
        "mamba_n_groups": 1,
        "mamba_conv_bias": True,
    },
    "falcon_h1": {
        "mamba_d_ssm": 128,
        "mamba_n_heads": 4,
        "mamba_d_head": 32,
        "mamba_d_state": 32,
        "mamba_n_groups": 1,
    },
    "rwkv7": {
        "norm_eps": 1e-5,
        "a_low_rank_dim": 32,
        "v_low_rank_dim": 32,
        "gate_low_rank_dim": 32,
        "decay_low_rank_dim": 32,
    },
    "qwen3_next": GATED_DELTA | EXPERTS | {"shared_expert_intermediate_size": 64},
    "qwen3_5": GATED_DELTA,
    "qwen3_5_moe": GATED_DELTA | EXPERTS | {"shared_expert_intermediate_size": 64},
    "olmo_hybrid": GATED_DELTA
    | {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_allow_neg_eigval": True,
    },
    "kimi_linear": LATENT
    | {
        "linear_attn_config": {
            "kda_layers": [1],
            "full_attn_layers": [2],
            "num_heads": 2,
            "head_dim": 32,
            "short_conv_kernel_size": 4,
        },
        "model_max_length": 512,
        "num_experts": 4,
        "num_experts_per_token": 2,
        "moe_intermediate_size": 64,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 2,
    },
    "kimi_k3": LATENT
    | {
        "linear_attn_config": {
            "kda_layers": [1],
            "full_attn_layers": [2],
            "num_heads": 2,
            "head_dim": 32,
            "short_conv_kernel_size": 4,
        },
        "attn_res_block_size": 2,
        "num_key_value_heads": 2,
    },
    "deepseek_v41": {
        "q_lora_rank": 32,
        "head_dim": 64,
        "qk_rope_head_dim": 16,
        "o_groups": 2,
        "o_lora_rank": 32,
        "moe_intermediate_size": 64,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "hc_mult": 2,
        "hc_sinkhorn_iters": 3,
    },
    "bailing_moe_v3": LATENT
    | {
        "moe_intermediate_size": 64,
        "moe_shared_expert_intermediate_size": 64,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "layer_group_size": 2,
        "q_lora_rank": 32,
    },
}


def family_model(family: str, *, seed: int = 3, **changes: Any) -> nn.Module:
    """Return a random model of this family with two layers and 96 tokens."""
    name = family.split()[0]
    module: Any = import_module(f"mlx_lm.models.{name}")
    config = {"model_type": name} | SIZES | OPTIONS[family] | changes
    model: nn.Module = module.Model(module.ModelArgs.from_dict(config))
    model.eval()
    # Some weights start at 0, where the norm of mlx-lm's rwkv7 has no gradient.
    return randomized(model, seed)
