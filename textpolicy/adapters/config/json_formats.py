"""The JSON forms of a config: ours, mlx-lm's and mlx-swift-lm's, PEFT's, and plain options."""

from collections.abc import Collection, Mapping
from dataclasses import asdict, fields
from difflib import get_close_matches
from typing import Any

from textpolicy.adapters.config.peft_targets import PeftTargets
from textpolicy.adapters.config.rules import LoRARule
from textpolicy.adapters.config.selection import LastBlocks, RuleList, Selection
from textpolicy.errors import ConfigError

_RULE = [field.name for field in fields(LoRARule)] + ["alpha", "rslora"]
_WORDS = ["num_layers", "keys", "kind", "rank", "scale", "alpha", "dropout"]
LORA_OPTIONS = {
    "lora_layers": "num_layers",
    "lora_rank": "rank",
    "lora_scale": "scale",
    "lora_dropout": "dropout",
    "lora_keys": "keys",
}
"""Plain options, and the words that they stand for."""
# What mlx-lm's trainer writes beside the adapter: how it was trained, not what it is.
_MLX_TRAINING = (
    "adapter_path",
    "batch_size",
    "clear_cache_threshold",
    "config",
    "data",
    "grad_accumulation_steps",
    "grad_checkpoint",
    "iters",
    "learning_rate",
    "lr_schedule",
    "mask_prompt",
    "max_seq_length",
    "model",
    "optimizer",
    "optimizer_config",
    "project_name",
    "report_to",
    "resume_adapter_file",
    "save_every",
    "seed",
    "steps_per_eval",
    "steps_per_report",
    "test",
    "test_batches",
    "train",
    "trust_remote_code",
    "val_batches",
    "wandb",
)
# Fields of PEFT that change nothing about which weights are added where.
_PEFT_NOTES = (
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "fan_in_fan_out",
    "inference_mode",
    "loftq_config",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
)
_PEFT_INITIALISERS = {True: "uniform", "gaussian": "gaussian"}
# They draw fresh weights from data, and leave the base as it is.
_PEFT_HARMLESS = ("eva", "orthogonal", "mica")


def read_selection(data: Mapping[str, Any]) -> Selection:
    """The selection in whichever form `data` has."""
    for names, reader in _READERS:
        if any(name in data for name in names):
            return reader(data)
    forms = [names[0] for names, _ in _READERS]
    raise ConfigError(
        f"no form of an adapter config is known by {sorted(data)}; expected one of {forms}"
    )


def write_selection(selection: Selection) -> dict[str, Any]:
    """The form that `read` reads back."""
    match selection:
        case RuleList():
            return {"rules": [_write_rule(rule) for rule in selection.rules]}
        case LastBlocks():
            return _write_mlx(selection)
        case PeftTargets():
            return _write_peft(selection)
        case _:
            raise ConfigError(f"{type(selection).__name__} has no JSON form")


def _read_rule_list(data: Mapping[str, Any]) -> RuleList:
    """Our own form: {"rules": [{...}, ...]}, first match first."""
    refuse_unknown_options("adapter config", data, ["rules"])
    for rule in data["rules"]:
        refuse_unknown_options("rule", rule, _RULE)
    return RuleList(rules=[LoRARule(**rule) for rule in data["rules"]])


def _read_mlx(data: Mapping[str, Any]) -> LastBlocks:
    """The form of mlx-lm and mlx-swift-lm. How the adapter was trained is passed over."""
    known = ["fine_tune_type", "num_layers", "lora_parameters"]
    refuse_unknown_options("adapter config", data, [*known, *_MLX_TRAINING])
    kind = data.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise ConfigError(f"fine_tune_type is {kind!r}; expected 'lora' or 'dora'")
    parameters = dict(data.get("lora_parameters", {}))
    refuse_unknown_options(
        "lora_parameters", parameters, ["rank", "scale", "dropout", "keys", "alpha"]
    )
    if missing := [name for name in ("rank", "scale") if name not in parameters]:
        raise ConfigError(
            f"lora_parameters has no {missing}; libraries differ in their defaults, so say it"
        )
    # mlx-lm wrote alpha for a while, and never read it.
    parameters.pop("alpha", None)
    keys = parameters.pop("keys", None)
    where = {"num_layers": data["num_layers"]} if "num_layers" in data else {}
    return LastBlocks(**where, keys=keys, rule=LoRARule(kind=kind, **parameters))


def read_peft_config(data: Mapping[str, Any], *, trained: bool = False) -> PeftTargets:
    """PEFT's form. Fields of its other methods are refused unless they are off."""
    known = [field.name for field in fields(PeftTargets)]
    if (method := data.get("peft_type", "LORA")) != "LORA":
        raise ConfigError(f"peft_type is {method!r}; expected 'LORA'")
    if data.get("bias", "none") != "none":
        raise ConfigError(
            f"bias is {data['bias']!r}: training the base's own biases is not supported; expected "
            "'none', or lora_bias for an offset of the adapter's own"
        )
    rest = {name: data[name] for name in data if name not in [*known, *_PEFT_NOTES]}
    if on := {name: value for name, value in rest.items() if value not in (None, False, [], {})}:
        raise ConfigError(
            f"PEFT options {on} are not supported: the adapter would compute something else "
            "without them. Merge it with PEFT (merge_and_unload) and load the result as a model"
        )
    given: dict[str, Any] = {name: data[name] for name in known if data.get(name) is not None}
    # PEFT writes one number, or one name, without its list.
    for name, kind in (("layers_to_transform", int), ("layers_pattern", str)):
        if isinstance(given.get(name), kind):
            given[name] = [given[name]]
    if "target_modules" not in given:
        raise ConfigError(
            "target_modules is missing; expected names of layers, such as ['q_proj', 'v_proj'], a "
            "regular expression, or 'all-linear'"
        )
    drawn = given.get("init_lora_weights", True)
    given["init_lora_weights"] = _peft_initialiser(drawn, trained)
    return PeftTargets(**given)


def _read_options(data: Mapping[str, Any]) -> LastBlocks:
    """The keyword arguments of AdapterConfig, or their lora_ options."""
    words = {LORA_OPTIONS.get(name, name): value for name, value in data.items()}
    refuse_unknown_options("adapter config", words, _WORDS)
    where = {name: words.pop(name) for name in ("num_layers", "keys") if name in words}
    return LastBlocks(**where, rule=LoRARule(**words))


def refuse_unknown_options(what: str, given: Mapping[str, Any], known: Collection[str]) -> None:
    """Refuse options that nobody reads, naming the nearest that somebody does."""
    if unknown := sorted(set(given) - set(known)):
        near = [near for name in unknown for near in get_close_matches(name, known, n=1)]
        hint = f"; did you mean {near}?" if near else ""
        raise ConfigError(f"unknown {what} options {unknown}; known: {list(known)}{hint}")


def _peft_initialiser(drawn: Any, trained: bool) -> str:
    if trained and (drawn is False or drawn in _PEFT_HARMLESS):
        return "uniform"
    if drawn not in _PEFT_INITIALISERS:
        raise ConfigError(
            f"init_lora_weights is {drawn!r}; expected one of {list(_PEFT_INITIALISERS)}. Others "
            "draw from data, or change the base weights: save such an adapter with PEFT's "
            "path_initial_model_for_weight_conversion first"
        )
    return _PEFT_INITIALISERS[drawn]


def _write_rule(rule: LoRARule) -> dict[str, Any]:
    """Without functions that draw fresh weights: JSON cannot hold them, and files need them not."""
    return {name: value for name, value in asdict(rule).items() if not callable(value)}


def _write_mlx(selection: LastBlocks) -> dict[str, Any]:
    rule = selection.rule
    keys = {} if selection.keys is None else {"keys": list(selection.keys)}
    numbers = {"rank": rule.rank, "scale": rule.scale, "dropout": rule.dropout}
    return {
        "fine_tune_type": rule.kind,
        "num_layers": selection.num_layers,
        "lora_parameters": numbers | keys,
    }


def _write_peft(selection: PeftTargets) -> dict[str, Any]:
    initialisers = {name: value for value, name in _PEFT_INITIALISERS.items()}
    drawn = initialisers[selection.init_lora_weights]
    return {"peft_type": "LORA"} | asdict(selection) | {"init_lora_weights": drawn}


_READERS = (
    (["rules"], _read_rule_list),
    (["lora_parameters", "fine_tune_type"], _read_mlx),
    (["target_modules", "peft_type"], read_peft_config),
    (["rank", "lora_rank", *LORA_OPTIONS, *_WORDS], _read_options),
)
