"""`textpolicy plan`: what an adapter config would do to a model. No weight is read."""

from argparse import Namespace
from dataclasses import asdict

from textpolicy.adapters.plan import plan
from textpolicy.adapters.skeleton import skeleton
from textpolicy.cli.assembly import adapter_config, dtype_of
from textpolicy.cli.flags import configured
from textpolicy.cli.memory import architecture_of
from textpolicy.cli.report import Report
from textpolicy.config import TrainConfig


def run(options: Namespace) -> Report:
    config = configured(TrainConfig(), options)
    model = skeleton(architecture_of(config.model), dtype_of(config.model))
    planned = plan(model, adapter_config(config.adapter))
    data = {
        "modules": [asdict(row) for row in planned.modules],
        "base_bytes": planned.base_bytes,
        "adapter_bytes": planned.adapter_bytes,
        "trainable_parameters": planned.trainable_parameters,
    }
    return Report(data=data, text=str(planned))
