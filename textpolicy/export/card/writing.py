"""`write_card` writes the model card of an export.

Everything in it is read from the files of the run, of the adapter and of the base. What they do not
say is left out. Prompts and completions are never shown, and of local paths only the last name.
"""

from collections.abc import Sequence
from pathlib import Path

from textpolicy.adapters.files.inspection import inspect_adapter
from textpolicy.adapters.fuse import FuseReport
from textpolicy.export.base_model import hub_id
from textpolicy.export.card.facts import CardFacts
from textpolicy.export.card.front_matter import front_matter
from textpolicy.export.card.proof import proof_parts
from textpolicy.export.card.result import result_parts
from textpolicy.export.card.training import setup_rows, summary_of
from textpolicy.export.card.usage import usage_parts
from textpolicy.export.markdown import code, markdown_table
from textpolicy.export.proof import Proof
from textpolicy.export.run_facts import read_run_facts
from textpolicy.export.source import Source
from textpolicy.file_writing import atomic_replace

CARD = "README.md"


def write_card(
    folder: Path,
    *,
    name: str,
    format: str,
    source: Source,
    proofs: Sequence[Proof],
    commands: Sequence[str],
    survival: FuseReport | None = None,
    notes: Sequence[str] = (),
) -> Path:
    """Write the card of the export in `folder`, and the picture of the curve. Return the card.

    `name` is what the folder will be called, and `commands` are the lines that use it by this name.
    """
    adapter = inspect_adapter(source.adapter)
    card = CardFacts(
        name=name,
        format=format,
        source=source,
        adapter=adapter,
        run=read_run_facts(source.directory, adapter.version) if source.directory else None,
        base=hub_id(source.model, source.checkpoint),
    )
    parts = [
        f"---\n{front_matter(card)}\n---",
        f"# {code(card.name)}",
        summary_of(card),
        markdown_table(list(setup_rows(card))),
        *result_parts(card, folder),
        *proof_parts(proofs, survival, notes),
        *usage_parts(card, commands),
    ]
    target = folder / CARD
    with atomic_replace(target) as temporary:
        temporary.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return target
