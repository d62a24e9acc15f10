"""`textpolicy export`: write what was trained for another program, and prove it."""

from argparse import Namespace
from dataclasses import asdict, replace

from textpolicy.cli.answer import Answer, table
from textpolicy.cli.flags import configured
from textpolicy.config import TrainConfig
from textpolicy.experiment.threads import apply_thread_option
from textpolicy.export.exporting import Exported, export_adapter
from textpolicy.export.source import find_source


def run(options: Namespace) -> Answer:
    # The base that the run or the option names, because the embedded model uses one thread.
    name = options.model or find_source(options.source).model
    apply_thread_option(replace(configured(TrainConfig(), options).model, name=name))
    exported = export_adapter(
        options.source,
        options.to,
        options.output,
        model=options.model,
        dtype=options.dtype,
        dequantize=options.dequantize,
        over_float_base=options.over_float_base,
        min_survival=options.min_survival,
        tolerance=options.tolerance,
        force=options.force,
    )
    data = asdict(exported) | {"folder": str(exported.folder)}
    if fused := exported.survival:
        data["survival"] = asdict(fused) | {"survival": fused.survival, "noise": fused.noise}
    return Answer(data=data, text=_report_text(exported))


def _report_text(exported: Exported) -> str:
    rows = [("folder", str(exported.folder))]
    if fused := exported.survival:
        rows += [
            ("merged", f"{len(fused.modules)} modules, as {fused.worst.dtype}"),
            ("survived", f"{fused.survival:.1%} of the update, with noise of {fused.noise:.1%}"),
        ]
    rows += [("proof", str(proof)) for proof in (exported.proof, *exported.more_proofs)]
    rows += [("note", note) for note in exported.notes]
    rows += [("use", command) for command in exported.commands]
    return table(rows)
