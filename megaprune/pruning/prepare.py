"""Everything that a run needs and that can be refused, gathered before anything is written."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaprune import device
from megaprune.config.schema import Config, num_layers_to_prune
from megaprune.data.batches import Batch, batches_for, eval_batches, train_ids
from megaprune.data.blend import Blend, calibration_windows, find_blend, open_blend, training_windows
from megaprune.data.datasets import Windows, calibration_ids
from megaprune.data.indexed_files import IndexedFile
from megaprune.data.prepare import prepare_dataset
from megaprune.data.sources import find_sources
from megaprune.data.tokenizer import end_of_text, tokenizer_in
from megaprune.distillation.cache_reader import TeacherCache
from megaprune.mcore import parallel
from megaprune.mcore.builder import EngineOptions, check_parallel_sizes
from megaprune.mcore.layers.lora import TARGETS, LoRAOptions
from megaprune.mcore.optimizer import OptimizerOptions
from megaprune.mcore.parallel import ParallelSizes
from megaprune.mcore.pipeline_layout import balanced_stages, stages_of
from megaprune.models import Architecture, Family, HFConfig
from megaprune.models.sizes import layer_costs, layer_sizes, model_size, output_cost
from megaprune.pruning.run_dir import RunDir
from megaprune.pruning.teacher_cache import check_cacheable, open_cache
from megaprune.selection.budget import Budget
from megaprune.selection.registry import HELD_OUT_WINDOWS
from megaprune.selection.segments import cut_position
from megaprune.selection.selector import protected_layers
from megaprune.utils.errors import UsageError
from megaprune.weights.hub import resolve_hf_model
from megaprune.weights.source import HFSource
from megaprune.weights.torch_dist.source import CheckpointSource
from megaprune.weights.writer import parse_size


@dataclass(frozen=True)
class Setup:
    """A checked run: the model, the layers in question, the engine and the batch."""

    config: Config
    source: HFSource
    arch: Architecture
    budget: Budget
    protected: frozenset[int]
    manual: list[int] | None
    sizes: ParallelSizes
    engine: EngineOptions
    lora: LoRAOptions | None
    optimizer: OptimizerOptions
    global_batch_size: int
    run_dir: RunDir

    @property
    def tokens_per_iteration(self) -> int:
        return self.global_batch_size * self.config.data.seq_length

    def fewest_layers(self) -> list[int]:
        """The layers of the shortest model that may come out."""
        return self.budget.fewest_layers(self.protected) if self.manual is None else self.manual

    def stages(self) -> list[int]:
        """Layers of the original model on each pipeline stage."""
        layout = self.config.parallel.pipeline_model_parallel_layout
        if layout is not None:
            return stages_of(layout, self.sizes.pipeline, self.arch.num_layers)
        return self.stages_of_layers(range(self.arch.num_layers))

    def stages_of_layers(self, kept_layers: Sequence[int]) -> list[int]:
        """Layers of a pruned model on each pipeline stage, balanced by what they cost."""
        costs = layer_costs(self.source.config)
        return balanced_stages(
            [costs[layer] for layer in kept_layers], self.sizes.pipeline, output_cost(self.source.config)
        )


@dataclass(frozen=True)
class Data:
    """The datasets of a run, as this replica sees them. Text is calibrated on in the windows that are trained on."""

    config: Config
    train: Windows | None
    valid: Windows | None
    calibration: Windows | None
    teacher_cache: TeacherCache | None = None

    def calibration_batches(self, count: int, skip: int = 0) -> list[Batch]:
        """This replica's share of `count` calibration windows, behind the first `skip`."""
        ids = calibration_ids(len(self.calibration), count, self.config.recovery.seed, skip)
        return list(batches_for(self.calibration, ids, **self._dealt()))

    @property
    def num_calibration_windows(self) -> int:
        return len(self.calibration)

    def valid_batches(self, limit: int | None = None) -> list[Batch]:
        """This replica's share of the validation windows, or of the first `limit`; each token counts once."""
        return list(eval_batches(self.valid, limit=limit, **self._dealt())) if self.valid else []

    def read_ahead(self, iteration: int, global_batch_size: int) -> None:
        """Begins to read what the teacher said of this replica's share of an iteration to come, if that is cached."""
        if self.teacher_cache is not None and parallel.is_last_stage():
            recovery, dealt = self.config.recovery, self._dealt()
            if iteration < recovery.train_iters:
                sizes = dict(iteration=iteration, global_batch_size=global_batch_size, seed=recovery.seed)
                self.teacher_cache.prefetch([id for row in train_ids(self.train, **sizes, **dealt) for id in row])

    def _dealt(self) -> dict[str, int]:
        return dict(
            micro_batch_size=self.config.recovery.micro_batch_size,
            dp_rank=parallel.data_parallel_rank(),
            dp_size=parallel.data_parallel_size(),
        )


def prepare(config: Config) -> Setup:
    """Checks the run against its model and its processes. Reads headers only; writes nothing.

    Raises:
        MegapruneError: what was asked can't be done.
        UsageError: flags that don't fit the model or the processes.
    """
    parse_size(config.run.max_shard_size)
    source = open_source(config)
    arch = source.family.architecture(source.config)
    config = config.with_window(arch.max_position_embeddings)
    run_dir = RunDir(Path(config.run.save))
    run_dir.check(config)
    source.check_tensors()
    sizes = parallel_sizes(config, arch, parallel.world_size())
    check_parallel_sizes(arch, sizes, parallel.world_size())
    transformer_engine = _uses_transformer_engine(config)
    check_sequence(config, arch, sizes, config.reads_windows)
    if config.distils:
        check_top_k(config, arch)
    manual, protected, budget = layers_in_question(config, source.config)
    if config.method.check is not None:
        config.method.check(budget, protected)
    if manual is not None and config.needs_one_cut:
        behind = cut_position(manual, arch.num_layers)
        if config.stitches and behind == len(manual):
            raise UsageError("--stitch linear-patch: no layer behind the cut is left to stitch to; leave it out")
    setup = Setup(
        config=config,
        source=source,
        arch=arch,
        budget=budget,
        protected=protected,
        manual=manual,
        sizes=sizes,
        engine=EngineOptions(
            sizes, transformer_engine, config.recovery.bf16, config.engine.recompute_granularity, config.data.seq_length
        ),
        lora=lora_options(config, source.family, arch),
        optimizer=_optimizer_options(config),
        global_batch_size=global_batch_size(config, sizes, parallel.world_size()),
        run_dir=run_dir,
    )
    setup.stages()
    setup.stages_of_layers(setup.fewest_layers())
    return setup


def open_source(config: Config) -> HFSource:
    """The model that the flags name.

    Raises:
        MegapruneError: it is not there, or can't be read.
    """
    if config.model.load:
        return CheckpointSource(config.model.load)
    return HFSource(resolve_hf_model(config.model.hf_model))


def describe(setup: Setup) -> str:
    """What a run would do, in a few lines."""
    config, sizes = setup.config, setup.sizes
    iterations = config.recovery.train_iters
    searching = f"{config.search_iters} of them search"
    parameters = f"{model_size(setup.source.config).total:,} parameters"
    shortest = setup.fewest_layers()
    goal = f"{len(shortest)} layers"
    if not setup.budget.counts_layers:
        goal = f"at most {config.prune.target_params:,} parameters, at least {goal}"
    lines = [
        f"model      {config.model.given}: {setup.arch.num_layers} layers, {parameters}",
        f"pruning    {config.prune.method}: {setup.arch.num_layers} layers -> {goal}",
        f"processes  TP {sizes.tensor} x PP {sizes.pipeline} x DP {parallel.data_parallel_size()}",
        f"stages     {setup.stages()} layers, after pruning {setup.stages_of_layers(shortest)}",
        f"training   {iterations} iterations ({searching}) of {setup.tokens_per_iteration:,} tokens",
        f"writes     {setup.run_dir.path}",
    ]
    return "\n".join(lines)


def prepare_data(setup: Setup, tokenizer: Any) -> Data:
    """Tokenises the data on rank 0, or maps what is cached. Collective.

    Raises:
        MegapruneError: the data can't be used; on every rank.
    """
    config = setup.config
    # A cached teacher knows windows as they lie in the files, which are then shuffled as those of text are.
    cached = config.distillation.teacher == "cached"
    blend = None if cached else find_blend(config.data.train_data, "--train-data")
    if config.data.train_data and not config.reads_training_data:
        if not blend:
            find_sources(config.data.train_data, "--train-data")  # nothing is read, but a wrong path is wrong
        blend = None
    cache = Path(config.data.data_cache_path or setup.run_dir.data_cache)
    if cached:
        check_cacheable(config)

    # What the others map, the first has looked through.
    vocab_size = setup.arch.vocab_size if parallel.rank() == 0 else None

    def load() -> tuple[Windows | None, Windows | None, list[IndexedFile]]:
        common = dict(
            seq_length=config.data.seq_length,
            text_key=config.data.text_key,
            messages_key=config.data.messages_key,
            cache_dir=cache,
            vocab_size=vocab_size,
        )
        train, valid, files = None, None, []
        if blend:
            end_of_text(tokenizer, vocab_size, "--train-data")
            files = open_blend(blend, "--train-data", config.data.seq_length, vocab_size)
        elif config.data.train_data and config.reads_training_data:
            train = prepare_dataset(config.data.train_data, tokenizer, flag="--train-data", **common)
        if config.data.valid_data:
            valid = prepare_dataset(config.data.valid_data, tokenizer, flag="--valid-data", pad_last=True, **common)
        return train, valid, files

    train, valid, files = parallel.on_first_rank(load) or load()
    calibration = train
    if blend:
        train, calibration = _blended(setup, blend, files, tokenizer.eos_token_id, cache)
    if calibration and config.calibrates:
        calibration_ids(len(calibration), config.data.calibration_samples, config.recovery.seed)
        if config.method.needs_held_out and len(calibration) < 1 + HELD_OUT_WINDOWS:
            raise UsageError(
                f"--method {config.prune.method} judges on other windows than it chooses by, and needs "
                f"{1 + HELD_OUT_WINDOWS}: --train-data has {len(calibration)}; give more data, or lower --seq-length"
            )
    teacher_cache = open_cache(config, setup.source, tokenizer, train) if cached else None
    return Data(config, train, valid, calibration, teacher_cache)


def _blended(
    setup: Setup, blend: Blend, files: list[IndexedFile], pad_id: int, cache: Path
) -> tuple[Windows | None, Windows | None]:
    """The training samples of preprocessed data and its calibration windows, where the run has a use for them.
    Collective."""
    config = setup.config
    common = dict(
        seq_length=config.data.seq_length,
        seed=config.recovery.seed,
        pad_id=pad_id,
        vocab_size=setup.arch.vocab_size,
        cache_dir=cache,
    )
    train = calibration = None
    if config.calibrates:
        most = config.data.calibration_samples * (1 + HELD_OUT_WINDOWS)
        calibration = calibration_windows(blend, files, most=most, **common)
    num_samples = config.recovery.train_iters * setup.global_batch_size
    if num_samples:
        train = training_windows(blend, files, num_samples=num_samples, **common)
    return train, calibration


def load_tokenizer(setup: Setup) -> Any:
    """The model's own tokenizer; None where the run reads no text.

    Raises:
        MegapruneError: the folder holds none that transformers can load.
    """
    if not setup.config.reads_windows:
        return None
    return tokenizer_in(setup.source.folder, setup.config.model.trust_remote_code)


def _uses_transformer_engine(config: Config) -> bool:
    choice = config.engine.transformer_impl
    if config.lora.lora_rank is not None:
        if choice == "transformer_engine":
            raise UsageError("--lora-rank works on Megatron's own linear layers: use --transformer-impl local")
        choice = "local"
    return device.use_transformer_engine(choice)


def parallel_sizes(config: Config, arch: Architecture, world_size: int) -> ParallelSizes:
    """The sizes of the groups that the flags ask for."""
    parallel_config = config.parallel
    expert_tensor = parallel_config.expert_tensor_parallel_size
    if expert_tensor is None:
        # As in Megatron-LM, experts are cut like the rest unless the user says otherwise; but not where there are too
        # few processes for that.
        expert_tensor = parallel_config.tensor_model_parallel_size if arch.num_experts else 1
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


def layers_in_question(config: Config, hf_config: HFConfig) -> tuple[list[int] | None, frozenset[int], Budget]:
    """The user's own choice of kept layers if there is one, the protected layers, and what those that stay may cost.

    Raises:
        UsageError: the flags don't fit the model.
    """
    num_layers = len(layer_sizes(hf_config))
    if config.method.names_layers:
        whole = Budget.of_layers(num_layers, num_layers)
        manual = config.method.choose(whole, frozenset(), config.method_options()).kept_layers
        return manual, frozenset(), Budget.of_layers(num_layers, len(manual))
    if config.prune.target_params is not None:
        budget = _parameter_budget(config.prune.target_params, hf_config)
    else:
        num_pruned = num_layers_to_prune(config.prune, num_layers)
        if num_pruned == 0:
            raise UsageError(f"--prune-ratio {config.prune.prune_ratio} of {num_layers} layers rounds to none")
        budget = Budget.of_layers(num_layers, num_layers - num_pruned)
    protected = protected_layers(config.search.protect_layers, num_layers)
    budget.check(protected)
    return None, protected, budget


def _parameter_budget(target: int, hf_config: HFConfig) -> Budget:
    total, costs = model_size(hf_config).total, tuple(size.total for size in layer_sizes(hf_config))
    if target >= total:
        raise UsageError(f"--target-params {target:,}: the model has {total:,}; give a smaller number")
    return Budget(costs, target - (total - sum(costs)))


def check_sequence(config: Config, arch: Architecture, sizes: ParallelSizes, reads_windows: bool = True) -> None:
    """Checks that the model and the ranks can take the windows, where any are read.

    Raises:
        UsageError: they can't.
    """
    if sizes.context > 1:
        raise UsageError("--context-parallel-size > 1 is not supported: use tensor and sequence parallelism instead")
    if not reads_windows:
        return
    seq_length = config.data.seq_length
    if seq_length > arch.max_position_embeddings:
        raise UsageError(f"--seq-length {seq_length} is more than the model's {arch.max_position_embeddings} positions")
    if sizes.sequence_parallel and seq_length % sizes.tensor:
        raise UsageError(f"--seq-length {seq_length} can't be split over {sizes.tensor} tensor-parallel ranks")


def global_batch_size(config: Config, sizes: ParallelSizes, world_size: int) -> int:
    """Windows in one iteration.

    Raises:
        UsageError: the replicas can't share them out.
    """
    replicas = world_size // sizes.model
    per_step = config.recovery.micro_batch_size * replicas
    size = config.recovery.global_batch_size or per_step
    if size % per_step and config.recovery.train_iters == 0:
        return per_step  # no batch is made
    if size % per_step:
        raise UsageError(
            f"--global-batch-size {size} is not a multiple of --micro-batch-size "
            f"{config.recovery.micro_batch_size} x {replicas} data-parallel replicas"
        )
    return size


def check_top_k(config: Config, arch: Architecture) -> None:
    """Checks that the vocabulary has as many tokens as the teacher is to name.

    Raises:
        UsageError: it has fewer.
    """
    if config.distillation.distill_top_k > arch.vocab_size:
        raise UsageError(
            f"--distill-top-k {config.distillation.distill_top_k} is more than the {arch.vocab_size} tokens of the "
            "vocabulary"
        )


def lora_options(config: Config, family: Family, arch: Architecture) -> LoRAOptions | None:
    """The adapters that the flags ask for.

    Raises:
        UsageError: a target is no layer of the model.
    """
    lora = config.lora
    if lora.lora_rank is None:
        return None
    rules = [rule for layer in range(arch.num_layers) for rule in family.layer_rules(arch, layer)]
    modules = {rule.megatron.split(".")[-2] for rule in rules}
    known = [target for target in TARGETS if target in modules]
    unknown = [target for target in lora.lora_target_modules if target not in known]
    if unknown:
        raise UsageError(
            f"--lora-target-modules {unknown[0]} is no linear layer of this model: choose of {' '.join(known)}"
        )
    alpha = 2.0 * lora.lora_rank if lora.lora_alpha is None else lora.lora_alpha
    return LoRAOptions(lora.lora_rank, alpha, tuple(lora.lora_target_modules) or tuple(known))


def _optimizer_options(config: Config) -> OptimizerOptions:
    recovery = config.recovery
    return OptimizerOptions(
        lr=recovery.lr,
        min_lr=recovery.min_lr,
        lr_decay_style=recovery.lr_decay_style,
        lr_warmup_iters=recovery.lr_warmup_iters,
        train_iters=recovery.train_iters,
        weight_decay=recovery.weight_decay,
        clip_grad=recovery.clip_grad,
        distributed=config.engine.use_distributed_optimizer,
    )
