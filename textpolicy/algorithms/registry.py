"""Algorithms by name: an advantage function, a loss function, and how the paper uses them."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import partial
from types import MappingProxyType
from typing import Any, get_args

from textpolicy.algorithms import (
    cispo,
    dapo,
    distillation,
    dpo,
    dr_grpo,
    gdpo,
    grpo,
    gspo,
    lite_ppo,
    luspo,
    maxrl,
    reinforce,
    reinforce_pp,
    rloo,
    sapo,
    vespo,
)
from textpolicy.errors import ConfigError
from textpolicy.types import AdvantageFn, LossFn


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """What a trainer needs of an algorithm.

    `trainer` holds the keywords of `Trainer` for this algorithm: those by which its paper departs
    from one update on freshly sampled rollouts, and `skip_without_advantages` if the loss has no
    gradient where all advantages are 0. `dynamic_sampling` tells whether groups without signal
    are replaced.
    """

    name: str
    paper: str
    compute_advantages: AdvantageFn
    policy_loss: LossFn
    trainer: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    dynamic_sampling: bool = False


_KNOWN: dict[str, Algorithm] = {}


def register(
    name: str,
    compute_advantages: AdvantageFn,
    policy_loss: LossFn,
    *,
    paper: str = "",
    trainer: Mapping[str, Any] | None = None,
    dynamic_sampling: bool = False,
    skip_without_advantages: bool = False,
) -> Algorithm:
    """Make an algorithm known by a name of its own, in this process."""
    if name in _KNOWN:
        raise ConfigError(f"the algorithm {name!r} is already registered; choose another name")
    _KNOWN[name] = Algorithm(
        name=name,
        paper=paper,
        compute_advantages=compute_advantages,
        policy_loss=policy_loss,
        trainer=MappingProxyType(
            dict(trainer or {})
            | ({"skip_without_advantages": True} if skip_without_advantages else {})
        ),
        dynamic_sampling=dynamic_sampling,
    )
    return _KNOWN[name]


def names() -> list[str]:
    """Every name that `get` knows, in the order of registration."""
    return list(_KNOWN)


def get(name: str, **options: Any) -> Algorithm:
    """The algorithm of this name, with `options` bound to whichever of its functions takes them."""
    if name not in _KNOWN:
        near = get_close_matches(name, _KNOWN, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"no algorithm is called {name!r}; known: {', '.join(_KNOWN)}.{hint}")
    algorithm = _KNOWN[name]
    of_advantages = _keywords(algorithm.compute_advantages)
    of_loss = _keywords(algorithm.policy_loss)
    if unknown := sorted(set(options) - of_advantages - of_loss):
        near = get_close_matches(unknown[0], of_advantages | of_loss, n=1)
        hint = f". Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"{name} has no option {unknown[0]!r}; it has: "
            f"{', '.join(sorted(of_advantages | of_loss))}{hint}"
        )
    trainer = dict(algorithm.trainer)
    if name != "dpo" and (options.get("beta") or options.get("entropy_bonus")):
        # A KL term and an entropy bonus have a gradient without advantages. DPO's beta is no KL.
        trainer.pop("skip_without_advantages", None)
    return replace(
        algorithm,
        trainer=MappingProxyType(trainer),
        compute_advantages=_bound(algorithm.compute_advantages, options, of_advantages),
        policy_loss=_bound(algorithm.policy_loss, options, of_loss),
    )


def _bound(
    function: Callable[..., Any], options: Mapping[str, Any], own: set[str]
) -> Callable[..., Any]:
    given = {name: value for name, value in options.items() if name in own}
    return partial(function, **given) if given else function


def _keywords(function: Callable[..., Any]) -> set[str]:
    """The keywords of a function; those of `**rest: Unpack[SomeTypedDict]` are named there."""
    found: set[str] = set()
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY:
            found.add(parameter.name)
        elif parameter.kind is parameter.VAR_KEYWORD:
            found |= {
                name for kind in get_args(parameter.annotation) for name in kind.__annotations__
            }
    return found - {"lengths", "parts"}


register(
    "grpo",
    grpo.compute_advantages,
    grpo.policy_loss,
    paper="2402.03300",
    skip_without_advantages=True,
)

register(
    "dr_grpo",
    dr_grpo.compute_advantages,
    dr_grpo.policy_loss,
    paper="2503.20783",
    skip_without_advantages=True,
)

register(
    "dapo",
    dapo.compute_advantages,
    dapo.policy_loss,
    paper="2503.14476",
    dynamic_sampling=True,
    skip_without_advantages=True,
)

register(
    "gspo",
    gspo.compute_advantages,
    gspo.policy_loss,
    paper="2507.18071",
    trainer={"mini_batches": 4},
    skip_without_advantages=True,
)

register(
    "luspo",
    luspo.compute_advantages,
    luspo.policy_loss,
    paper="2602.05261",
    skip_without_advantages=True,
)

register(
    "cispo",
    cispo.compute_advantages,
    cispo.policy_loss,
    paper="2506.13585",
    skip_without_advantages=True,
)

register(
    "sapo",
    sapo.compute_advantages,
    sapo.policy_loss,
    paper="2511.20347",
    skip_without_advantages=True,
)

register(
    "vespo",
    vespo.compute_advantages,
    vespo.policy_loss,
    paper="2602.10693",
    skip_without_advantages=True,
)

register(
    "lite_ppo",
    lite_ppo.compute_advantages,
    lite_ppo.policy_loss,
    paper="2508.08221",
    skip_without_advantages=True,
)

register(
    "reinforce",
    reinforce.compute_advantages,
    reinforce.policy_loss,
    paper="Williams 1992",
    skip_without_advantages=True,
)

register(
    "reinforce_pp",
    reinforce_pp.compute_advantages,
    reinforce_pp.policy_loss,
    paper="2501.03262",
    skip_without_advantages=True,
)

register(
    "reinforce_pp_baseline",
    reinforce_pp.compute_baseline_advantages,
    reinforce_pp.policy_loss,
    paper="2501.03262",
    skip_without_advantages=True,
)

register(
    "rloo",
    rloo.compute_advantages,
    rloo.policy_loss,
    paper="2402.14740",
    trainer={"reference": "base", "reward_kl": 0.05},
    skip_without_advantages=True,
)

register(
    "maxrl",
    maxrl.compute_advantages,
    maxrl.policy_loss,
    paper="2602.02710",
    skip_without_advantages=True,
)

register(
    "gdpo",
    gdpo.compute_advantages,
    gdpo.policy_loss,
    paper="2601.05242",
    skip_without_advantages=True,
)

register(
    "distillation",
    distillation.compute_advantages,
    distillation.policy_loss,
    paper="2306.13649",
)
register(
    "dpo",
    dpo.compute_advantages,
    dpo.policy_loss,
    paper="2305.18290",
    trainer={"reference": "base"},
    skip_without_advantages=True,
)
