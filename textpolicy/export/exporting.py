"""`export_adapter`: write what was trained in another format, and show that it is what was trained.

Until the last step everything is in a temporary folder beside the output. An export that fails, or
is killed, leaves nothing at the output, or the earlier export.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from textpolicy.activity import doing
from textpolicy.adapters.files.layouts import read_adapter
from textpolicy.adapters.fuse import FuseReport
from textpolicy.backend import versions
from textpolicy.errors import ConfigError, ExportError
from textpolicy.export.asking import read_asking
from textpolicy.export.card import write_card
from textpolicy.export.formats import FORMATS, Format
from textpolicy.export.job import ExportOptions, Job, WeightFormat
from textpolicy.export.merged import in_precision_of
from textpolicy.export.proof import MEASURABLE_EFFECT, Proof, Reference, measure
from textpolicy.export.source import Source, find_source
from textpolicy.export.target import check_space, prepare_target, write_export_file
from textpolicy.file_writing import replace_folder
from textpolicy.user_code.faults import raise_user_errors_as

_PROMPTS = 6
_OTHER_NAMES = {
    "huggingface": "hf",
    "transformers": "hf",
    "safetensors": "hf",
    "llama.cpp": "gguf",
    "lora": "peft",
    "mlx_lm": "mlx-lm",
}
"""The formats that other names may mean."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """An export that is complete: its folder, its proof, and the commands that use it.

    `more_proofs` are those by other programs that are installed here.
    `survival` says what is left of the update after rounding, or is None for an adapter.
    """

    folder: Path
    format: str
    proof: Proof
    more_proofs: tuple[Proof, ...]
    survival: FuseReport | None
    commands: tuple[str, ...]
    notes: tuple[str, ...]


def export_adapter(
    source: str | Path,
    to: str,
    output: str | Path,
    *,
    model: str | None = None,
    dtype: WeightFormat | None = None,
    dequantize: bool = False,
    over_float_base: bool = False,
    min_survival: float = 0.9,
    tolerance: float | None = None,
    force: bool = False,
) -> Exported:
    """Write the adapter of a run, or an adapter on disk, as a folder of the format `to`.

    What was written is opened again and compared with base and adapter as they were trained, on
    prompts of the run. If a log-probability differs by more than `tolerance`, or if less than
    `min_survival` of the update or of its effect is left, an error is raised and nothing is left
    at `output`.

    A run gives its best adapter, or else its latest. `model` names the base of an adapter that is
    in no run. `dtype` is the number format of merged weights; the default is that of the
    checkpoint. `dequantize` writes a quantized base as floats. `over_float_base` allows an adapter
    of a quantized base to be written for its float base, where it computes something else. `force`
    replaces an earlier export.
    """
    options = ExportOptions(
        weight_format=dtype,
        dequantize=dequantize,
        over_float_base=over_float_base,
        min_survival=min_survival,
        tolerance=tolerance,
    )
    chosen = find_format(to)
    _check_options(chosen, options)
    target = prepare_target(Path(output), force=force)
    return export(find_source(source, model=model), chosen, target, options)


def find_format(name: str) -> Format:
    """Return the format of this name."""
    if name not in FORMATS:
        lower = name.lower()
        near = [_OTHER_NAMES[lower]] if lower in _OTHER_NAMES else get_close_matches(lower, FORMATS)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise ConfigError(
            f"there is no format {name!r}. {hint}The formats are {', '.join(FORMATS)}"
        )
    return FORMATS[name]


def export(source: Source, to: Format, target: Path, options: ExportOptions) -> Exported:
    """Write, open again, compare, and rename the complete folder to `target`."""
    job = _load(source, to, options)
    check_space(target, to.size(job))
    reference = measure(job.model, job.tokenizer, job.asking)
    if job.needs_float_base(to.base):
        reference = _change_to_float_base(job, reference)
    job.prompts = reference.prompts
    tolerance = to.tolerance(job) if options.tolerance is None else options.tolerance
    commands = tuple(to.use(job, target))
    card_commands = tuple(to.use(job, Path(target.name)))
    with replace_folder(target) as folder:
        to.write(job, folder)
        if to.base == "merged":
            with doing("measuring the merged model"):
                reference = reference.with_merged(in_precision_of(job, job.model))
        job.release_model()
        proof, *more = _prove(job, to, folder, reference, tolerance)
        exported = Exported(
            folder=target,
            format=to.name,
            proof=proof,
            more_proofs=tuple(more),
            survival=job.survival,
            commands=commands,
            notes=(*job.notes, *_notes_about_no_effect(source, proof)),
        )
        write_card(
            folder,
            name=target.name,
            format=to.name,
            source=source,
            proofs=(proof, *more),
            commands=card_commands,
            survival=job.survival,
            notes=job.notes,
        )
        write_export_file(folder, _facts(exported, source))
    return exported


def _check_options(to: Format, options: ExportOptions) -> None:
    """Raise `ConfigError` for options that say nothing about this format."""
    allowed = to.weight_formats
    if options.weight_format and options.weight_format not in allowed:
        raise ConfigError(
            f"the number format is {options.weight_format!r}; "
            + (
                f"expected one of {', '.join(allowed)} for the format {to.name}"
                if allowed
                else f"the format {to.name} writes the adapter as it is. Leave out --dtype"
            )
        )
    merged = to.base == "merged"
    if options.dequantize and not merged:
        raise ConfigError(
            f"--dequantize is for merged weights, and {to.name} writes the adapter alone. Leave it "
            "out, or pass --over-float-base"
        )
    if options.over_float_base and merged:
        raise ConfigError(
            f"--over-float-base is for adapters, and {to.name} writes merged weights. Leave it "
            "out, or pass --dequantize"
        )
    for name in ("min_survival", "tolerance"):
        value = getattr(options, name)
        if value is not None and not 0 <= value < float("inf"):
            raise ConfigError(f"{name} is {value!r}; expected a number that is not below 0")


def _load(source: Source, to: Format, options: ExportOptions) -> Job:
    """Return the job with the trained model. Raise `ExportError` if the format cannot hold it."""
    model, tokenizer = source.load()
    asking = read_asking(source.directory, tokenizer, _PROMPTS)
    job = Job(
        source=source,
        options=options,
        model=model,
        tokenizer=tokenizer,
        architecture=source.architecture(),
        asking=asking,
        notes=list(asking.notes),
    )
    if job.needs_float_base(to.base) and not options.over_float_base:
        raise ExportError(
            f"the adapter was trained over a quantized base, and {to.name} applies it to other "
            "weights, where it computes something else. Export the merged model: --to mlx, or "
            "--to hf; or accept the difference, which is then measured: --over-float-base"
        )
    to.refuse(job)
    return job


def _change_to_float_base(job: Job, reference: Reference) -> Reference:
    """Put the adapter over a float base in the job, and return what is expected over that base."""
    job.model = job.source.load_over_float_base(job.source.adapter)
    job.over_float_base = True
    if job.checkpoint_is_quantized:
        job.notes.append(
            "The checkpoint of the base is quantized. The proof is over the weights that it holds, "
            "made float; over the float model that it was made of, the adapter was not measured."
        )
    return reference.over(job.model)


def _prove(
    job: Job, to: Format, folder: Path, reference: Reference, tolerance: float
) -> list[Proof]:
    """Return a proof by each program that opens the export. Raise an error if one does not hold."""
    proofs: list[Proof] = []
    readers = iter(to.reopen(job, folder))
    while True:
        # What was written may be wrong in any way, and then the program that opens it may raise
        # anything.
        with raise_user_errors_as(ExportError, f"opening the {to.name} export again"):
            opened = next(readers, None)
            proof = opened and reference.compare(opened, tolerance)
        if proof is None:
            return proofs
        proof.check(job.options.min_survival)
        proofs.append(proof)


def _notes_about_no_effect(source: Source, proof: Proof) -> Iterator[str]:
    """Yield what to do about an adapter that changes nothing, such as that of an untrained run."""
    if proof.adapter_effect > MEASURABLE_EFFECT:
        return
    run = source.directory
    yield f"The adapter {source.adapter.name} changes nothing that can be measured." + (
        f" The run has a later one: name {run.latest.name} in its folder {run.latest.parent.name}"
        if run and source.adapter == run.best and run.latest.exists()
        else ""
    )


def _facts(exported: Exported, source: Source) -> dict[str, Any]:
    """Return what export.json says. No path of this machine is in it."""
    return {
        "format": exported.format,
        "source": {
            "run": source.directory.path.name if source.directory else None,
            "adapter": source.adapter.name,
            "adapter_version": read_adapter(source.adapter).version,
            "model": source.model_name,
        },
        "survival": asdict(exported.survival) if exported.survival else None,
        "proof": asdict(exported.proof),
        "more_proofs": [asdict(proof) for proof in exported.more_proofs],
        "notes": list(exported.notes),
        "versions": versions(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
