"""The front matter of a model card, which the hub reads."""

import re
from typing import Any

from huggingface_hub import ModelCardData

from textpolicy.export.base_model import licence_of
from textpolicy.export.card.facts import CardFacts

_NAME = re.compile(r"[a-z0-9_-]{1,40}")


def front_matter(card: CardFacts) -> str:
    """Return the YAML of the front matter. Every value is of a form that was checked."""
    run, facts = card.run, card.facts
    tags = ["textpolicy", *facts.tags]
    if run:
        algorithm = str(run.setting("algorithm.name") or "").lower()
        tags.append("sft" if run.supervised else "reinforcement-learning")
        # An algorithm of a file is not a name that others search for.
        tags += [algorithm] if _NAME.fullmatch(algorithm) else []
    licence: dict[str, Any] = {
        **licence_of(card.source.checkpoint, card.source.architecture()),
    }
    data = ModelCardData(
        **licence,
        base_model=card.base,
        base_model_relation=_relation(card),
        library_name=facts.loaded_by,
        pipeline_tag="text-generation",
        datasets=[run.dataset] if run and run.dataset else None,
        tags=list(dict.fromkeys(tags)),
    )
    return data.to_yaml().rstrip("\n")


def _relation(card: CardFacts) -> str | None:
    # "merge" is the hub's word for a mix of several models.
    return None if card.base is None else "adapter" if card.facts.is_adapter else "finetune"
