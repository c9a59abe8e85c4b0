"""Program that runs the parts of a job on the simulated machine: steps.py FOLDER reads cases.json, writes found.json.

For each part of a case it gives the counts of `Machine`, or the traceback of its failure.
"""

import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
warnings.filterwarnings("ignore")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from tests.simulated_cuda.machine import LOCAL_RANK, MACHINE, install, patch_core  # noqa: E402

install()

from megaprune import device  # noqa: E402

assert device.NAME == "cuda", device.NAME
device.prepare_megatron()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402

patch_core()

from megaprune.distillation import hidden_states, teachers  # noqa: E402
from megaprune.distillation.hidden_states import WithHiddenStates  # noqa: E402
from megaprune.distillation.multi_token import WithMTP  # noqa: E402
from megaprune.distillation.objectives import make_objective  # noqa: E402
from megaprune.distillation.teachers import OnlineTeacher, SelfTeacher, vocab_shard  # noqa: E402
from megaprune.importance import measures, stitch  # noqa: E402
from megaprune.importance.evaluator import LayerEvaluator  # noqa: E402
from megaprune.mcore import fold, hf_weights, parallel  # noqa: E402
from megaprune.mcore.adapters import attach_adapters  # noqa: E402
from megaprune.mcore.builder import EngineOptions, build_model, in_half_precision  # noqa: E402
from megaprune.mcore.hf_weights import export_weights, import_weights, round_to_source_dtype  # noqa: E402
from megaprune.mcore.layers.gated import LayerGate  # noqa: E402
from megaprune.mcore.layers.lora import LoRAOptions, merge_adapters  # noqa: E402
from megaprune.mcore.optimizer import OptimizerOptions, Trainer  # noqa: E402
from megaprune.mcore.parallel import ParallelSizes  # noqa: E402
from megaprune.mcore.pipeline_layout import balanced_stages  # noqa: E402
from megaprune.models.sizes import layer_costs, output_cost  # noqa: E402
from megaprune.pruning.step import search_step, train_step  # noqa: E402
from megaprune.selection.budget import Budget  # noqa: E402
from megaprune.selection.gumbel_topk import GumbelTopK  # noqa: E402
from megaprune.selection.measured_topk import MeasuredTopK  # noqa: E402
from megaprune.weights.source import HFSource  # noqa: E402
from tests.helpers import tiny  # noqa: E402

_DEVICE = torch.device("cuda", LOCAL_RANK)
_SEQ_LENGTH, _TOP_K = 32, 10


class Parts:
    """Results of the parts of a case."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, Any]] = {}

    def run(self, name: str, run: Callable[[], Any]) -> Any:
        """Run a part, and record what the machine has seen; None if it fails."""
        MACHINE.clear()
        result, error = None, None
        try:
            result = run()
        except Exception:
            error = traceback.format_exc()
        self.found[name] = {
            "error": error,
            "syncs": dict(MACHINE.syncs),
            "collectives": sum(MACHINE.collectives.values()),
            "on_cpu": dict(MACHINE.cpu_in_collectives),
        }
        return result


@contextmanager
def rank_of(rank: int, world_size: int, sizes: ParallelSizes):
    """Make this process a rank of a cluster whose collectives do nothing."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    new_group = dist.new_group
    dist.new_group = lambda ranks=None, *args, backend=None, **kwargs: new_group(ranks, *args, **kwargs)
    try:
        parallel.set_up_groups(sizes)
        yield
    finally:
        dist.new_group = new_group
        parallel.finish()
        parallel.leave()


def _batch() -> Any:
    return tiny.make_batch(torch.randint(tiny.VOCAB_SIZE, (1, _SEQ_LENGTH + 1)))


def _route_evenly(arch: Any, sizes: ParallelSizes) -> None:
    """Let every expert get as many tokens as the others, where the host reads their numbers."""
    if not arch.num_experts:
        MACHINE.values.clear()
        return
    tokens = _SEQ_LENGTH // (sizes.tensor if sizes.sequence_parallel else 1) * arch.transformer["moe_router_topk"]
    ep, local = sizes.expert, arch.num_experts // sizes.expert
    ranks = ep * sizes.expert_tensor
    MACHINE.values = {
        (ep,): tokens // ep,
        (ep, local): tokens // arch.num_experts,
        (ranks, local): tokens // arch.num_experts,
        (1, ep, local): tokens // arch.num_experts,
        (arch.num_experts,): tokens // arch.num_experts,
        (local,): tokens * ranks // arch.num_experts,
    }
    MACHINE.selected = lambda: tokens


class Job:
    """A model at a layout, with what the parts share."""

    def __init__(self, case: dict[str, Any], parts: Parts) -> None:
        self.parts, self.source = parts, HFSource(case["hf_model"])
        self.arch = self.source.family.architecture(self.source.config)
        self.arch = replace(self.arch, num_mtp=case.get("num_mtp", 0))
        self.sizes, self.lora = ParallelSizes(**case["sizes"]), case.get("lora")
        self.engine = EngineOptions(
            self.sizes, case.get("te", False), True, case.get("recompute"), seq_length=_SEQ_LENGTH
        )
        self.shard, self.gate = vocab_shard(self.arch), LayerGate()
        self.batches = [_batch() for _ in range(case.get("micro_batches", 2))]
        self.budget = Budget.of_layers(self.arch.num_layers, self.arch.num_layers - 1)
        _route_evenly(self.arch, self.sizes)
        hidden_states.stage_of_layers = teachers.stage_of_layers = self.stage_of_layers

    def stage_of_layers(self, model: Any) -> dict[int, int]:
        """Return the stage of each layer of a model, which the ranks would tell each other."""
        whole = model.config.num_layers == self.arch.num_layers
        counts = self.stages(list(range(self.arch.num_layers)) if whole else self.kept)
        numbered = enumerate(stage for stage, count in enumerate(counts) for _ in range(count))
        return dict(numbered)

    @property
    def kept(self) -> list[int]:
        """The layers of the pruned model."""
        return [layer for layer in range(self.arch.num_layers) if layer != 1]

    def stages(self, kept: list[int]) -> list[int]:
        costs = layer_costs(self.source.config)
        return balanced_stages([costs[each] for each in kept], self.sizes.pipeline, output_cost(self.source.config))

    def build(self, kept: list[int] | None = None, gate: LayerGate | None = None, num_mtp: int = 0) -> Any:
        layers = list(range(self.arch.num_layers)) if kept is None else kept
        arch = replace(self.arch, num_mtp=num_mtp)
        model = build_model(arch if kept is None else arch.pruned(kept), self.stages(layers), self.engine, gate)
        import_weights(model, self.source, kept)
        elsewhere = [name for name, weight in model.named_parameters() if weight.device != _DEVICE]
        elsewhere += [name for name, buffer in model.named_buffers() if buffer.device != _DEVICE]
        assert not elsewhere, f"not on {_DEVICE}: {elsewhere}"
        return model


def training(case: dict[str, Any], parts: Parts) -> None:
    """Importance, search, recovery and export of a model, all parts on one rank."""
    job = Job(case, parts)
    original = parts.run("import", lambda: job.build(gate=job.gate))
    half = in_half_precision(original, job.engine)
    _importance(job, half)
    student = original
    if job.lora:
        attach_adapters(original, LoRAOptions(8, 16.0), 1)
    options = OptimizerOptions(1e-3, 0.0, "cosine", 1, 10, 0.01, 1.0, distributed=not job.lora, averaged_from=0)
    trainer = parts.run("trainer", lambda: Trainer(student, job.engine, options))
    if job.lora:
        teacher: Any = SelfTeacher(trainer.ddp, job.gate, job.shard, _TOP_K)
    else:
        teacher = OnlineTeacher(in_half_precision(job.build(), job.engine), job.shard, _TOP_K)
    _search(job, trainer, teacher)
    if job.lora:
        job.gate.bypass([1])
        _recovery(job, trainer, teacher, list(range(job.arch.num_layers)))
        parts.run("merge", lambda: merge_adapters(trainer.model))
        return
    trainer.close()
    kept = job.kept
    pruned = parts.run("pruned", lambda: job.build(kept, num_mtp=job.arch.num_mtp))
    trainer = Trainer(pruned, job.engine, options)
    _recovery(job, trainer, teacher, kept)
    folder = Path(case["out"])
    folder.mkdir(parents=True, exist_ok=True)
    hf_weights.all_gather_objects = lambda written: [written]  # the other ranks write no files
    parts.run("round", lambda: round_to_source_dtype(trainer.model, job.source, kept))
    parts.run("export", lambda: export_weights(trainer.model, job.source, kept, folder, 10**9))


def _importance(job: Job, model: Any) -> None:
    evaluator = LayerEvaluator(model, job.gate, lambda *_: job.batches, len(job.batches), job.budget, job.shard)
    sets = [[layer for layer in range(job.arch.num_layers) if layer != gone] for gone in (1, 2)]
    run, layers = job.parts.run, job.arch.num_layers
    run("validation", lambda: measures.mean_loss(model, job.batches, job.shard))
    run("masks", lambda: evaluator.losses(sets))
    run("masks by cross-entropy", lambda: evaluator.losses(sets, "ce"))
    run("block influence", evaluator.block_influence)
    run("gradient of a mask", lambda: evaluator.mask_gradient(torch.full((layers,), 0.5), 0))
    run("taylor", evaluator.taylor_importance)
    run("moments", lambda: stitch.moments(model, job.batches, 0, 1, job.arch.transformer["hidden_size"]))
    hidden = job.arch.transformer["hidden_size"]
    run("fold", lambda: fold.fold(model, {0: torch.zeros(hidden, hidden)}))


def _search(job: Job, trainer: Trainer, teacher: Any) -> None:
    """Run two steps of each search; the second is the one that repeats."""
    objective = make_objective("adaptive", "rest", job.shard, teacher)
    kl = torch.linspace(1, 2, job.arch.num_layers)
    selectors = {
        "search": MeasuredTopK(kl, job.budget, {0}, 10, seed=1),
        "search by the paper": GumbelTopK(kl, job.budget, {0}, 10, temperature=1.0, lr=0.1, seed=1),
    }
    for name, selector in selectors.items():
        for step in range(2):
            job.parts.run(
                name,
                lambda: search_step(trainer, job.batches, objective, step, selector, job.gate),  # noqa: B023
            )


def _recovery(job: Job, trainer: Trainer, teacher: Any, kept: list[int]) -> None:
    plain = make_objective("adaptive", "rest", job.shard, teacher)
    mixture = make_objective("kl", "renormalized", job.shard, teacher, 0.5)
    if job.arch.num_mtp:
        mixture = WithMTP(mixture, job.shard, job.arch.num_mtp, 0.3)
    everything = WithHiddenStates(mixture, teacher, trainer.model, dict(enumerate(kept)), 0.5)
    for name, objective in (("recovery", plain), ("recovery with every loss", everything)):
        for step in range(2):
            job.parts.run(name, lambda: train_step(trainer, job.batches, objective, step))  # noqa: B023
    job.parts.run("stop", lambda: parallel.any_rank(False))
    job.parts.run("average", trainer.average.use)


def main(folder: Path) -> None:
    """Run the cases of a folder."""
    found = {}
    for name, case in json.loads((folder / "cases.json").read_text()).items():
        parts = Parts()
        try:
            sizes = ParallelSizes(**case.get("sizes", {}))
            with MACHINE, rank_of(case.get("rank", 0), case.get("world_size", 1), sizes):
                training(case, parts)
        except Exception:
            parts.found["case"] = {"error": traceback.format_exc(), "syncs": {}, "collectives": 0, "on_cpu": {}}
        found[name] = parts.found
        (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
