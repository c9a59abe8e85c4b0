"""Settings of the training: recovery and distillation."""

from dataclasses import dataclass
from typing import Literal

from megaprune.config.fields import flag

LARGEST_SEED = 2**32 - 1  # numpy's generators take no larger one


@dataclass
class RecoveryConfig:
    """Training of the remaining layers."""

    _argument_group_name = "recovery"
    train_iters: int | None = flag(
        "total iterations of search and recovery; 0 removes layers without training", least=0
    )
    rounds: int = flag(
        "prune and heal in N rounds: each removes a share of the layers, selected on the model that the round before "
        "has healed, and trains for a share of --train-iters",
        1,
        least=1,
    )
    lr: float = flag("peak learning rate", 1e-4, least=0)
    min_lr: float = flag("learning rate at the end of training", 0.0, least=0)
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root"] = flag(
        "decay of the learning rate after the warm-up", "cosine"
    )
    lr_warmup_iters: int = flag("iterations in which the learning rate increases linearly to --lr", 0, least=0)
    average_weights: float = flag(
        "share of recovery, at its end, over which the weights are averaged; the average is exported; 0 exports the "
        "last weights",
        0.0,
        least=0,
        most=1,
    )
    stitch: Literal["none", "fold"] | None = flag(
        "fold: before recovery, a linear map that stands in for the removed layers, fitted on calibration windows, is "
        "multiplied into the down_proj of the layer before each cut (ReplaceMe) (default: fold if the model is "
        "trained and nothing excludes it; none with --search-preset paper)"
    )
    recovery_layers: Literal["all", "endpoints"] | None = flag(
        "layers that recovery trains: all, or endpoints: the two layers next to a contiguous cut (default: all; with "
        "--method clp, endpoints)"
    )
    micro_batch_size: int = flag("windows in one forward pass of a data-parallel replica", 1, least=1)
    global_batch_size: int | None = flag(
        "windows in one iteration (default: one micro-batch per data-parallel replica)", least=1
    )
    clip_grad: float = flag("maximum gradient norm; 0 disables clipping", 1.0, least=0)
    weight_decay: float = flag("weight decay of AdamW", 0.01, least=0)
    seed: int = flag("seed of the data order, the noise and all random choices", 1234, least=0, most=LARGEST_SEED)
    bf16: bool = flag("train in bf16 with fp32 optimizer state, instead of in fp32", False)


@dataclass
class DistillationConfig:
    """Distillation from the original model."""

    _argument_group_name = "distillation"
    distill_loss: Literal["adaptive", "kl", "ce"] = flag(
        "adaptive: KL divergence on the teacher's top k tokens, weighted by its entropy; kl: the same without weights; "
        "ce: cross-entropy, no teacher",
        "adaptive",
    )
    distill_tail: Literal["renormalized", "rest", "full"] = flag(
        "treatment of the tokens outside the teacher's top k: renormalized ignores them, rest counts them as one "
        "outcome, full compares with the student's full softmax",
        "rest",
    )
    distill_top_k: int = flag("number of teacher logits per token (k)", 10, least=1)
    kd_loss_alpha: float | None = flag(
        "A in the loss A x distillation + (1 - A) x cross-entropy with the data (default: .5; with --search-preset "
        "paper, 1)",
        least=0,
        most=1,
    )
    hidden_loss_weight: float = flag(
        "factor of a loss on hidden states in recovery: the squared relative distance of each kept layer's output to "
        "the teacher's",
        0.0,
        least=0,
    )
    mtp_loss_scaling_factor: float = flag(
        "factor of the cross-entropy of multi-token-prediction layers; 0 copies them untrained", 0.0, least=0
    )
    teacher: Literal["online", "self", "cached"] = flag(
        "online: a frozen copy of the original model; self: with LoRA, the student's own frozen weights; cached: the "
        "outputs stored in --teacher-logits",
        "online",
    )
    teacher_logits: str | None = flag("with --teacher cached: folder written by `megaprune cache-teacher`")
