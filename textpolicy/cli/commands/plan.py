"""`textpolicy plan`: the layers that an adapter config would train. No weight is read."""

from argparse import Namespace
from dataclasses import asdict

from textpolicy.cli.answer import Answer
from textpolicy.cli.flags import configured
from textpolicy.config import TrainConfig
from textpolicy.experiment.assembly import adapter_config, dtype_of
from textpolicy.experiment.model_defaults import with_model_defaults
from textpolicy.experiment.run_size import read_architecture
from textpolicy.planning.adapter_plan import plan_adapters
from textpolicy.planning.unloaded_model import build_unloaded_model


def run(options: Namespace) -> Answer:
    config = with_model_defaults(configured(TrainConfig(), options))
    model = build_unloaded_model(read_architecture(config.model), dtype_of(config.model))
    planned = plan_adapters(model, adapter_config(config.adapter))
    data = {
        "modules": [asdict(row) for row in planned.modules],
        "base_bytes": planned.base_bytes,
        "adapter_bytes": planned.adapter_bytes,
        "trainable_parameters": planned.trainable_parameters,
    }
    return Answer(data=data, text=str(planned))
