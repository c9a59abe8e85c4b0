"""Training of multi-token-prediction layers."""

from dataclasses import replace

from megaprune.models.mtp import mtp_parameter_rules
from megaprune.pruning.options import RunOptions
from megaprune.utils.errors import MegapruneError, UsageError
from megaprune.weights.tensor_source import TensorSource


def with_mtp(options: RunOptions, source: TensorSource) -> RunOptions:
    """Return the options with an architecture that has the source's MTP layers if they are trained.

    Raises:
        MegapruneError: an MTP layer lacks a tensor.
        UsageError: the source has no MTP layers.
    """
    if not options.distillation.mtp_factor or not options.training.train_iters:
        return options
    if not source.mtp_layers or not source.family.mtp_keys:
        raise UsageError("--mtp-loss-scaling-factor: the model has no multi-token-prediction layers; leave it out")
    rules = mtp_parameter_rules(source.family, options.model.arch, len(source.mtp_layers))
    for name in (name for rule in rules for name in rule.hf):
        if name not in source:
            raise MegapruneError(
                f"{source.folder}: {name} is missing, so that its MTP layer can't be trained: leave out "
                "--mtp-loss-scaling-factor"
            )
    arch = replace(options.model.arch, num_mtp=len(source.mtp_layers))
    return replace(options, model=replace(options.model, arch=arch))
