"""Resolution of a Config into frozen options, once, with the model's config.json and the number of processes.

The code below does not read a Config. A run, a plan and teacher caching are resolved from the same parts. A plan may
omit the data, the run folder and the pruning budget; caching omits everything about the student.
"""

from dataclasses import replace
from pathlib import Path

from megaprune import device
from megaprune.config.schema import (
    WHAT_TO_PRUNE,
    Config,
    EngineConfig,
    ParallelConfig,
    RunConfig,
)
from megaprune.data.parallel_encoder import Workers
from megaprune.mcore import parallel
from megaprune.mcore.builder import check_parallel_sizes
from megaprune.mcore.optimizer import check_training_configs
from megaprune.mcore.parallel import ParallelSizes
from megaprune.mcore.pipeline_layout import balanced_stages, parse_layout
from megaprune.models import Architecture, HFConfig, family_of
from megaprune.models.sizes import layer_costs, layer_sizes, output_cost
from megaprune.pruning.cache_teacher import check_output
from megaprune.pruning.data import check_cacheable
from megaprune.pruning.mtp import with_mtp
from megaprune.pruning.options import (
    CachingOptions,
    DataOptions,
    DistillationOptions,
    JobOptions,
    ModelOptions,
    OutputOptions,
    PipelineOptions,
    PlanOptions,
    RunOptions,
    SelectionOptions,
)
from megaprune.pruning.resolve_budget import budget_of
from megaprune.pruning.resolve_training import engine_options, lora_options, optimizer_options, training_options
from megaprune.pruning.run_dir import RunDir
from megaprune.selection.budget import Budget
from megaprune.selection.segments import cut_position
from megaprune.selection.selector import protected_layers
from megaprune.utils.errors import UsageError
from megaprune.weights.hub import shared_hf_model
from megaprune.weights.source import HFSource
from megaprune.weights.tensor_source import TensorSource
from megaprune.weights.torch_dist.source import CheckpointSource
from megaprune.weights.writer import parse_size

# A resumed run may change its layout, its engine and its logging, but not what it computes. The kind of optimizer must
# stay too, because Megatron-Core saves the state of each kind in a different format.
_MAY_CHANGE = {
    *ParallelConfig.__dataclass_fields__,
    *EngineConfig.__dataclass_fields__,
    *RunConfig.__dataclass_fields__,
    *(
        "micro_batch_size",
        "data_cache_path",
        "tokenizer_workers",
        "trust_remote_code",
        "teacher_logits",
        "method_module",
    ),
} - {"use_distributed_optimizer", "override"}


def open_run(config: Config, world_size: int) -> tuple[RunOptions, TensorSource]:
    """Check a run against its folder, its model and its processes. Reads headers only; writes nothing. Collective if a
    launcher started several processes; they join the process group.

    Raises:
        MegapruneError: the request can't be fulfilled.
        UsageError: flags that don't fit the model or the processes.
    """
    parse_size(config.run.max_shard_size)
    source = open_source(config)
    windowed = _for_model(config, source.config)
    parallel.on_rank0(lambda: RunDir(Path(config.run.save or "")).check(fixed_settings(windowed)))
    source.check_tensors()
    return with_mtp(resolve(windowed, source.config, world_size), source), source


def open_caching(config: Config, output: Path, world_size: int) -> tuple[CachingOptions, TensorSource]:
    """Check the caching of a teacher against its folder, its model and its processes. Raises as `open_run`."""
    _join(config)
    parallel.on_rank0(lambda: check_output(output))
    parallel.on_rank0(lambda: check_cacheable(config.data.train_data))
    source = open_source(config)
    source.check_tensors()
    return resolve_caching(config, source.config, world_size, output), source


def open_source(config: Config) -> TensorSource:
    """Return the model that the flags name. Collective if a launcher started several processes.

    Raises:
        MegapruneError: it is not there, or can't be read; on every rank.
    """
    _join(config)
    load = config.model.load
    if load:
        return parallel.together(lambda: CheckpointSource(load))
    folder = shared_hf_model(config.model.given)
    return parallel.together(lambda: HFSource(folder))


def _join(config: Config) -> None:
    """Join the process group: ranks decide together what they find in the file system.

    Without the address of the others a process decides alone, so that wrong flags are reported first.
    """
    if parallel.world_size() > 1 and parallel.has_rendezvous():
        parallel.join(config.parallel.distributed_timeout_minutes)


def resolve(config: Config, hf_config: HFConfig, world_size: int) -> RunOptions:
    """Return the options of a run.

    Raises:
        MegapruneError: the model can't be expressed.
        UsageError: flags that don't fit each other, the model or the processes.
    """
    config = _for_model(config, hf_config)
    fused = device.use_transformer_engine(_transformer_impl(config))
    job = _job(config, hf_config, world_size, fused, config.reads_windows)
    arch = job.model.arch
    if config.distills:
        _check_top_k(config, arch)
    batch = global_batch_size(config, job.sizes, world_size)
    selection = _selection(config, hf_config, batch * job.data.seq_length)
    _check_selection(config, selection, arch)
    options = RunOptions(
        **job.__dict__,
        lora=lora_options(config, arch, hf_config),
        optimizer=optimizer_options(config),
        selection=selection,
        training=training_options(config, batch),
        output=_output_options(config),
    )
    options.pipeline.stages_of_layers(selection.fewest_layers())
    check_training_configs(options.engine, options.optimizer)
    return options


def resolve_plan(config: Config, hf_config: HFConfig, world_size: int) -> PlanOptions:
    """Return the options of a plan. Raises as `resolve`."""
    # Transformer Engine's layers can't be built everywhere; their sizes hardly differ.
    config, trains = _for_model(config, hf_config), config.recovery.train_iters != 0
    job = _job(config, hf_config, world_size, False, trains or config.reads_windows)
    batch = global_batch_size(config, job.sizes, world_size)
    prunes = any(getattr(config.prune, name) is not None for name in WHAT_TO_PRUNE)
    selection = _selection(config, hf_config, batch * job.data.seq_length) if prunes else None
    if selection is not None:  # the first round trains the largest model
        limit = selection.budget.limit_of_round(1, config.recovery.rounds)
        selection = replace(selection, budget=replace(selection.budget, limit=limit))
    return PlanOptions(
        **job.__dict__,
        world_size=world_size,
        lora=lora_options(config, job.model.arch, hf_config),
        global_batch_size=batch,
        selection=selection,
        trains=trains,
        distributed_optimizer=config.engine.use_distributed_optimizer,
    )


def resolve_caching(config: Config, hf_config: HFConfig, world_size: int, output: Path) -> CachingOptions:
    """Return the options of caching a teacher. Raises as `resolve`."""
    config = _for_model(config, hf_config)
    fused = device.use_transformer_engine(config.engine.transformer_impl)
    job = _job(config, hf_config, world_size, fused, reads_windows=True)
    _check_top_k(config, job.model.arch)
    return CachingOptions(**job.__dict__, output=output, dry_run=config.run.dry_run)


def fixed_settings(config: Config) -> dict[str, object]:
    """Return the settings that must be unchanged when a run is resumed in its folder."""
    return {name: value for name, value in config.flat().items() if name not in _MAY_CHANGE}


def _for_model(config: Config, hf_config: HFConfig) -> Config:
    """Return the configuration with the defaults that depend on the model."""
    arch = family_of(hf_config).architecture(hf_config)
    if arch.sandwich_norm and config.recovery.stitch is None:
        config = replace(config, recovery=replace(config.recovery, stitch="none"))
    return config.with_window(arch.max_position_embeddings)


def _job(
    config: Config, hf_config: HFConfig, world_size: int, transformer_engine: bool, reads_windows: bool
) -> JobOptions:
    arch = family_of(hf_config).architecture(hf_config)
    sizes = _parallel_sizes(config, arch, world_size)
    check_parallel_sizes(arch, sizes, world_size)
    seq_length = config.data.seq_length or arch.max_position_embeddings
    _check_sequence(seq_length, arch, sizes, reads_windows)
    recovery, data, distillation = config.recovery, config.data, config.distillation
    save, cache, logits = config.run.save, data.data_cache_path, distillation.teacher_logits
    cache_dir = Path(cache) if cache else RunDir(Path(save)).data_cache if save else None
    return JobOptions(
        model=ModelOptions(
            config.model.given, hf_config, arch, config.model.mtp == "keep", config.model.trust_remote_code
        ),
        engine=engine_options(config, arch, sizes, transformer_engine, seq_length),
        pipeline=_pipeline(config, hf_config, sizes),
        data=DataOptions(
            train=list(data.train_data),
            valid=list(data.valid_data),
            text_key=data.text_key,
            messages_key=data.messages_key,
            seq_length=seq_length,
            micro_batch_size=recovery.micro_batch_size,
            cache_dir=cache_dir,
            reads_windows=reads_windows,
            reads_training=config.reads_training_data,
            calibrates=config.calibrates,
            workers=Workers(data.tokenizer_workers, config.model.trust_remote_code),
        ),
        distillation=DistillationOptions(
            loss=distillation.distill_loss,
            tail=distillation.distill_tail,
            top_k=distillation.distill_top_k,
            teacher=distillation.teacher,
            teaches=config.distills,
            logits=Path(logits) if logits else None,
            alpha=config.kd_share,
            hidden_weight=distillation.hidden_loss_weight,
            mtp_factor=distillation.mtp_loss_scaling_factor,
        ),
        timeout_minutes=config.parallel.distributed_timeout_minutes,
    )


def _parallel_sizes(config: Config, arch: Architecture, world_size: int) -> ParallelSizes:
    parallel_config = config.parallel
    expert_tensor = parallel_config.expert_tensor_parallel_size
    if expert_tensor is None:
        # As in Megatron-LM, experts use the tensor-parallel size by default, unless there are too few processes for it.
        # The core does not split experts that have biases.
        split = arch.num_experts and not arch.mlp_bias
        expert_tensor = parallel_config.tensor_model_parallel_size if split else 1
        in_a_stage = world_size // parallel_config.pipeline_model_parallel_size
        if in_a_stage % (expert_tensor * parallel_config.expert_model_parallel_size):
            expert_tensor = 1
    return ParallelSizes(
        tensor=parallel_config.tensor_model_parallel_size,
        pipeline=parallel_config.pipeline_model_parallel_size,
        context=parallel_config.context_parallel_size,
        expert=parallel_config.expert_model_parallel_size,
        expert_tensor=expert_tensor,
        sequence_parallel=parallel_config.sequence_parallel,
    )


def _pipeline(config: Config, hf_config: HFConfig, sizes: ParallelSizes) -> PipelineOptions:
    costs, last = layer_costs(hf_config), output_cost(hf_config)
    layout = config.parallel.pipeline_model_parallel_layout
    if layout is not None:
        original = parse_layout(layout, sizes.pipeline, len(costs))
    else:
        original = balanced_stages(costs, sizes.pipeline, last)
    return PipelineOptions(tuple(original), tuple(costs), last)


def _transformer_impl(config: Config) -> str:
    choice = config.engine.transformer_impl
    if config.lora.lora_rank is None:
        return choice
    if choice == "transformer_engine":
        raise UsageError("--lora-rank needs Megatron's own linear layers: use --transformer-impl local")
    return "local"


def _selection(config: Config, hf_config: HFConfig, tokens_per_iteration: int) -> SelectionOptions:
    given = config.search.selection_budget
    manual, protected, budget = _layers_in_question(config, hf_config)
    return SelectionOptions(
        name=config.prune.method,
        method=config.method,
        method_options=config.method_options(),
        budget=budget,
        protected=protected,
        manual=manual,
        calibration_samples=config.data.calibration_samples,
        # One iteration of a search: a forward pass, and a backward pass, which counts as two.
        token_budget=given or 3 * config.tenth_of_training * tokens_per_iteration,
        token_budget_given=given is not None,
        heal_candidates=config.search.heal_candidates,
        heal_iters=config.heal_iters,
    )


def _layers_in_question(config: Config, hf_config: HFConfig) -> tuple[list[int] | None, frozenset[int], Budget]:
    """Return the kept layers given by the user (if any), the protected layers, and the budget of the kept layers."""
    num_layers = len(layer_sizes(hf_config))
    if config.method.names_layers:
        whole = Budget.of_layers(num_layers, num_layers)
        manual = config.method.choose(whole, frozenset(), config.method_options()).kept_layers
        return manual, frozenset(), Budget.of_layers(num_layers, len(manual))
    budget = budget_of(config, hf_config)
    protected = protected_layers(config.search.protect_layers, num_layers)
    budget.check(protected)
    return None, protected, budget


def _check_selection(config: Config, selection: SelectionOptions, arch: Architecture) -> None:
    selection.budget.check_rounds(config.recovery.rounds)
    if selection.method.check is not None:
        selection.method.check(selection.budget, selection.protected)
    if selection.manual is not None and config.tunes_endpoints:
        cut_position(selection.manual, arch.num_layers)
    if config.stitches and arch.sandwich_norm:
        raise UsageError(
            f"--stitch {config.recovery.stitch}: {config.model.given} has a norm after each MLP, so that a linear map "
            "can't be folded into it; remove the flag"
        )


def _check_sequence(seq_length: int, arch: Architecture, sizes: ParallelSizes, reads_windows: bool) -> None:
    if sizes.context > 1:
        raise UsageError("--context-parallel-size > 1 is not supported: use tensor and sequence parallelism instead")
    if not reads_windows:
        return
    if seq_length > arch.max_position_embeddings:
        raise UsageError(f"--seq-length {seq_length} is more than the model's {arch.max_position_embeddings} positions")
    if arch.longest_sequence is not None and seq_length > arch.longest_sequence:
        raise UsageError(
            f"--seq-length {seq_length} is more than {arch.longest_sequence} (index_topk): in longer sequences the "
            "model attends to tokens that its indexer chooses, which training does not; give --seq-length "
            f"{arch.longest_sequence} or less"
        )
    if sizes.sequence_parallel and seq_length % sizes.tensor:
        raise UsageError(f"--seq-length {seq_length} can't be split over {sizes.tensor} tensor-parallel ranks")


def _check_top_k(config: Config, arch: Architecture) -> None:
    top_k = config.distillation.distill_top_k
    if top_k > arch.vocab_size:
        raise UsageError(f"--distill-top-k {top_k} is more than the {arch.vocab_size} tokens of the vocabulary")


def global_batch_size(config: Config, sizes: ParallelSizes, world_size: int) -> int:
    """Return the windows of one iteration.

    Raises:
        UsageError: the replicas can't share them out.
    """
    replicas = world_size // sizes.model
    per_step = config.recovery.micro_batch_size * replicas
    size = config.recovery.global_batch_size or per_step
    if size % per_step and config.recovery.train_iters == 0:
        return per_step  # batches are not used
    if size % per_step:
        raise UsageError(
            f"--global-batch-size {size} is not a multiple of --micro-batch-size "
            f"{config.recovery.micro_batch_size} x {replicas} data-parallel replicas"
        )
    return size


def _output_options(config: Config) -> OutputOptions:
    run = config.run
    return OutputOptions(
        run_dir=RunDir(Path(run.save or "")),
        settings=fixed_settings(config),
        max_shard_bytes=parse_size(run.max_shard_size),
        export_adapter=config.lora.export_adapter,
        save_interval=run.save_interval,
        async_save=run.async_save,
        log_interval=run.log_interval,
        peak_tflops=run.peak_tflops,
        tensorboard_dir=run.tensorboard_dir,
        wandb_project=run.wandb_project,
        dry_run=run.dry_run,
    )
