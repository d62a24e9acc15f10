"""JSON formats of a config: this library's, mlx-lm's and mlx-swift-lm's, PEFT's, plain options."""

from collections.abc import Collection, Mapping
from dataclasses import asdict, fields
from difflib import get_close_matches
from typing import Any

from textpolicy.adapters.config.peft_targets import PeftTargets
from textpolicy.adapters.config.rules import LoRARule
from textpolicy.adapters.config.selection import LastBlocks, RuleList
from textpolicy.errors import ConfigError

Selection = LastBlocks | RuleList | PeftTargets
"""A way to say which modules get which rule."""
_RULE_OPTIONS = [field.name for field in fields(LoRARule)] + ["alpha", "rslora"]
_CONFIG_OPTIONS = ["num_layers", "keys", "kind", "rank", "scale", "alpha", "dropout"]
LORA_OPTIONS = {
    "lora_layers": "num_layers",
    "lora_rank": "rank",
    "lora_scale": "scale",
    "lora_dropout": "dropout",
    "lora_keys": "keys",
}
"""Options of `create_lora_setup` and `apply_lora`, and the AdapterConfig option of each."""
# mlx-lm always writes rank and scale. A file without them is from mlx-swift-lm.
_SWIFT_DEFAULTS: dict[str, Any] = {"rank": 8, "scale": 10.0}
# Training options that mlx-lm writes into the same file. They do not describe the adapter.
_MLX_TRAINING_OPTIONS = (
    "adapter_path", "batch_size", "clear_cache_threshold", "config", "data",
    "grad_accumulation_steps", "grad_checkpoint", "iters", "learning_rate", "lr_schedule",
    "mask_prompt", "max_seq_length", "model", "optimizer", "optimizer_config", "project_name",
    "report_to", "resume_adapter_file", "save_every", "seed", "steps_per_eval",
    "steps_per_report", "test", "test_batches", "train", "trust_remote_code", "val_batches",
    "wandb",
)  # fmt: skip
# Fields of PEFT that do not change which weights are added to which module.
_PEFT_IGNORED = (
    "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "fan_in_fan_out", "inference_mode", "loftq_config", "lora_ga_config",
    "megatron_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size",
    "revision", "runtime_config", "task_type",
)  # fmt: skip
_PEFT_INITIALIZERS = {True: "uniform", "gaussian": "gaussian"}
# These initializers draw weights from data and leave the base weights unchanged.
_PEFT_FROM_DATA = ("eva", "orthogonal", "mica")


def read_selection(data: Mapping[str, Any]) -> Selection:
    """Return the selection that `data` describes in one of the known formats."""
    for names, reader in _READERS:
        if any(name in data for name in names):
            return reader(data)
    expected = [names[0] for names, _ in _READERS]
    raise ConfigError(
        f"No adapter config has the options {sorted(data)}; expected at least one of {expected}"
    )


def write_selection(selection: Selection) -> dict[str, Any]:
    """Return JSON that `read_selection` reads back."""
    match selection:
        case RuleList():
            rules = (asdict(rule).items() for rule in selection.rules)
            # JSON cannot hold an initializer function, and trained weights do not need it.
            return {"rules": [{k: v for k, v in items if not callable(v)} for items in rules]}
        case LastBlocks():
            rule = selection.rule
            keys = {} if selection.keys is None else {"keys": list(selection.keys)}
            numbers = {"rank": rule.rank, "scale": rule.scale, "dropout": rule.dropout}
            return {
                "fine_tune_type": rule.kind,
                "num_layers": selection.num_layers,
                "lora_parameters": numbers | keys,
            }
        case PeftTargets():
            names = {name: value for value, name in _PEFT_INITIALIZERS.items()}
            initializer = names[selection.init_lora_weights]
            return {"peft_type": "LORA"} | asdict(selection) | {"init_lora_weights": initializer}


def read_peft_config(data: Mapping[str, Any], *, trained: bool = False) -> PeftTargets:
    """Return the selection of PEFT's format. Raise if options of its other methods are on."""
    known = [field.name for field in fields(PeftTargets)]
    if (method := data.get("peft_type", "LORA")) != "LORA":
        raise ConfigError(f"peft_type is {method!r}; expected 'LORA'")
    if data.get("bias", "none") != "none":
        raise ConfigError(
            f"bias is {data['bias']!r}: training the base's own biases is not supported. Expected "
            "'none'; lora_bias trains a bias of the adapter instead"
        )
    rest = {name: data[name] for name in data if name not in [*known, *_PEFT_IGNORED]}
    if on := {name: value for name, value in rest.items() if value not in (None, False, [], {})}:
        raise ConfigError(
            f"PEFT options {on} are not supported, and without them the adapter would compute "
            "something else. Merge the adapter with PEFT (merge_and_unload) and load the result "
            "as a model"
        )
    given: dict[str, Any] = {name: data[name] for name in known if data.get(name) is not None}
    # PEFT may write a single number or name without a list around it.
    for name, single in (("layers_to_transform", int), ("layers_pattern", str)):
        if isinstance(given.get(name), single):
            given[name] = [given[name]]
    if "target_modules" not in given:
        raise ConfigError(
            "target_modules is missing; expected names of layers, such as ['q_proj', 'v_proj'], a "
            "regular expression, or 'all-linear'"
        )
    initializer = given.get("init_lora_weights", True)
    given["init_lora_weights"] = _read_peft_initializer(initializer, trained)
    return PeftTargets(**given)


def refuse_unknown_options(what: str, given: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise ConfigError for options that are not in `known`, with the nearest known option."""
    if unknown := sorted(set(given) - set(known)):
        near = [near for name in unknown for near in get_close_matches(name, known, n=1)]
        hint = f"; did you mean {near}?" if near else ""
        raise ConfigError(f"unknown {what} options {unknown}; known: {list(known)}{hint}")


def _read_rule_list(data: Mapping[str, Any]) -> RuleList:
    """Read this library's own format: {"rules": [{...}, ...]}."""
    refuse_unknown_options("adapter config", data, ["rules"])
    for rule in data["rules"]:
        refuse_unknown_options("rule", rule, _RULE_OPTIONS)
    return RuleList(rules=[LoRARule(**rule) for rule in data["rules"]])


def _read_mlx(data: Mapping[str, Any]) -> LastBlocks:
    """Read the format of mlx-lm and mlx-swift-lm. Training options in it are ignored."""
    known = ["fine_tune_type", "num_layers", "lora_parameters"]
    refuse_unknown_options("adapter config", data, [*known, *_MLX_TRAINING_OPTIONS])
    kind = data.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise ConfigError(f"fine_tune_type is {kind!r}; expected 'lora' or 'dora'")
    parameters = _SWIFT_DEFAULTS | data.get("lora_parameters", {})
    known = ["rank", "scale", "dropout", "keys", "alpha"]
    refuse_unknown_options("lora_parameters", parameters, known)
    # Early releases of mlx-lm wrote alpha and never read it.
    parameters.pop("alpha", None)
    keys = parameters.pop("keys", None)
    where = {"num_layers": data["num_layers"]} if "num_layers" in data else {}
    return LastBlocks(**where, keys=keys, rule=LoRARule(kind=kind, **parameters))


def _read_options(data: Mapping[str, Any]) -> LastBlocks:
    """Read the keyword arguments of AdapterConfig, or the lora_ options that stand for them."""
    options = {LORA_OPTIONS.get(name, name): value for name, value in data.items()}
    refuse_unknown_options("adapter config", options, _CONFIG_OPTIONS)
    where = {name: options.pop(name) for name in ("num_layers", "keys") if name in options}
    return LastBlocks(**where, rule=LoRARule(**options))


def _read_peft_initializer(initializer: Any, trained: bool) -> str:
    if trained and (initializer is False or initializer in _PEFT_FROM_DATA):
        return "uniform"
    if initializer not in _PEFT_INITIALIZERS:
        raise ConfigError(
            f"init_lora_weights is {initializer!r}; expected one of {list(_PEFT_INITIALIZERS)}. "
            "Other initializers draw from data or change the base weights. Save such an adapter "
            "with PEFT's path_initial_model_for_weight_conversion first"
        )
    return _PEFT_INITIALIZERS[initializer]


_READERS = (
    (["rules"], _read_rule_list),
    (["lora_parameters", "fine_tune_type"], _read_mlx),
    (["target_modules", "peft_type"], read_peft_config),
    (["rank", "lora_rank", *LORA_OPTIONS, *_CONFIG_OPTIONS], _read_options),
)
