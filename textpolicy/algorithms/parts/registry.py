"""Find an algorithm: by the name of its file in the package, or in a Python file of the user."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial, wraps
from importlib import import_module
from inspect import isfunction, signature
from pathlib import Path
from typing import Any

from textpolicy.algorithms.parts.declaration import Declaration
from textpolicy.algorithms.parts.function_options import (
    FROM_TRAINER,
    did_you_mean,
    functions_for,
    option_names,
)
from textpolicy.config import ALGORITHMS
from textpolicy.errors import ConfigError, TrainingError
from textpolicy.types import AdvantageFn, LossFn
from textpolicy.user_code import load_python_file, raise_user_errors_as, split_file_and_name


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """Two functions with their options bound; `trainer` holds keywords of `Trainer` for them."""

    name: str
    compute_advantages: AdvantageFn
    policy_loss: LossFn
    declaration: Declaration
    trainer: Mapping[str, Any]


def names() -> list[str]:
    """Return the names of the algorithms in the package, which are those of its files."""
    return list(ALGORITHMS)


def get(name: str, **options: Any) -> Algorithm:
    """Return an algorithm with `options` bound to whichever of its two functions takes them.

    `name` is one of `names()`, or "FILE.py" for a file of yours that defines `compute_advantages`,
    `policy_loss` or both; GRPO's function takes the place of a missing one. "FILE.py:FUNCTION" uses
    a function of another name: as the loss if it takes two arguments, else for the advantages.
    """
    if file := split_file_and_name(name):
        contents, declaration = _contents_of_file(*file)
    elif name in ALGORITHMS:
        contents = vars(import_module(f"textpolicy.algorithms.{name}"))
        declaration = contents["DECLARATION"]
    else:
        raise ConfigError(
            f"no algorithm is called {name!r}; known: {', '.join(ALGORITHMS)}, or FILE.py"
            f"{did_you_mean(name, ALGORITHMS)}"
        )
    advantages, loss = contents["compute_advantages"], contents["policy_loss"]
    known = option_names(advantages) | option_names(loss)
    if unknown := sorted(options.keys() - known):
        raise ConfigError(
            f"{name} has no option {unknown[0]!r}; it has: {', '.join(sorted(known)) or 'none'}"
            f"{did_you_mean(unknown[0], known)}"
        )
    options = functions_for(options)
    try:
        signature(_bound(loss, options)).bind("logp", "batch")
    except TypeError as error:
        raise ConfigError(
            f"the loss of {name} cannot be called with (logp, batch): {error}. Give required "
            "options by --algorithm-options"
        ) from error
    # A KL term and an entropy bonus have a gradient without advantages.
    more_terms = options.get("beta") or options.get("entropy_bonus")
    skip = declaration.needs_advantages and not more_terms
    return Algorithm(
        name=name,
        compute_advantages=_bound(advantages, options),
        policy_loss=_bound(loss, options),
        declaration=declaration,
        trainer=dict(declaration.trainer, skip_without_advantages=skip),
    )


def _bound(function: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    given = {name: options[name] for name in options.keys() & option_names(function)}
    return partial(function, **given) if given else function


def _contents_of_file(path: Path, function: str) -> tuple[dict[str, Any], Declaration]:
    """Return what the file defines, with GRPO's function for a missing one."""
    module = load_python_file(path, what="algorithm", error=ConfigError)
    contents = dict(vars(module))
    own = [n for n, f in contents.items() if isfunction(f) and f.__module__ == module.__name__]
    if function and not callable(contents.get(function)):
        raise ConfigError(
            f"{path} has no function {function!r}; its functions: {', '.join(own) or 'none'}"
            f"{did_you_mean(function, own)}"
        )
    if function:
        parameters = signature(contents[function]).parameters.values()
        required = [p for p in parameters if p.default is p.empty and p.name not in FROM_TRAINER]
        role = "policy_loss" if len(required) == 2 else "compute_advantages"
        contents[role] = contents[function]
    if not {"compute_advantages", "policy_loss"} & contents.keys():
        raise ConfigError(
            f"{path} has neither compute_advantages(rewards) nor policy_loss(logp, batch); define "
            f"one of them, or name a function: {path}:FUNCTION. Its functions: "
            f"{', '.join(own) or 'none'}"
        )
    for role in ("compute_advantages", "policy_loss"):
        if isfunction(contents.get(role)):
            contents[role] = _naming_the_file(contents[role], role, path)
    declaration = contents.get("DECLARATION", Declaration())
    if not isinstance(declaration, Declaration):
        raise ConfigError(
            f"DECLARATION of {path} is a {type(declaration).__name__}; expected "
            "textpolicy.algorithms.Declaration(...)"
        )
    if "policy_loss" not in contents:
        declaration = replace(declaration, needs_advantages=True)
    return vars(import_module("textpolicy.algorithms.grpo")) | contents, declaration


def _naming_the_file(function: Callable[..., Any], role: str, path: Path) -> Callable[..., Any]:
    """Return the function with exceptions as TrainingErrors that name the file and the line."""

    @wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        with raise_user_errors_as(TrainingError, f"{role} of {path}", file=str(path)):
            return function(*args, **options)

    return call
