"""Program that builds every family with the real Transformer Engine on the meta device, without a GPU, and compares the
names and shapes of the parameters with the weight rules: python -m tests.te.names [FOUND.json].

It needs a Transformer Engine that can be imported (see build.sh). A line of output per model and layout.
"""

import json
import sys
import types
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")

from megaprune import device  # noqa: E402

device.prepare_megatron()

import torch  # noqa: E402

if device.NAME == "cpu":  # the package asks for the device's properties when it is imported and its modules are built
    cuda: Any = torch.cuda
    cuda.is_available = lambda: True
    cuda.get_device_capability = lambda *args, **kwargs: (9, 0)
    properties = dict(major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, name="none")
    cuda.get_device_properties = lambda *args, **kwargs: types.SimpleNamespace(**properties)

from megatron.core.extensions import transformer_engine as extension  # noqa: E402

from megaprune.mcore.builder import EngineOptions, build_model  # noqa: E402
from megaprune.mcore.hf_weights import rules_by_parameter  # noqa: E402
from megaprune.mcore.parallel import ParallelSizes  # noqa: E402
from megaprune.mcore.simulation import simulated_rank  # noqa: E402
from megaprune.models.shards import VOCAB, TensorParallel  # noqa: E402
from tests.helpers.paper_source import PaperSource  # noqa: E402
from tests.helpers.real_configs import DEEPSEEK_R1, DENSE, MOE  # noqa: E402

_WORLD_SIZE = 4
_PLAIN_ROPE = {name: value for name, value in DEEPSEEK_R1.items() if name != "rope_scaling"}
_ALL = (DENSE | MOE) | {
    "deepseek-plain-rope": _PLAIN_ROPE,
    "deepseek-without-query-latents": DEEPSEEK_R1 | {"q_lora_rank": None},
    "kimi-k2": DEEPSEEK_R1 | {"model_type": "kimi_k2", "n_group": 1, "topk_group": 1},
}
_EXPERTS = {"num_experts", "n_routed_experts", "num_routed_experts"}
LAYOUTS = {
    "tp1": {},
    "tp2": dict(tensor=2),
    "tp2_sp": dict(tensor=2, sequence_parallel=True),
    "ep2": dict(expert=2),
    "tp2_sp_ep2": dict(tensor=2, sequence_parallel=True, expert=2),
    "tp2_sp_ep2_etp2": dict(tensor=2, sequence_parallel=True, expert=2, expert_tensor=2),
    "tp2_sp_etp2": dict(tensor=2, sequence_parallel=True, expert_tensor=2),
}


def configs() -> dict[str, dict[str, Any]]:
    """Return released configs with 5 layers and, where they have any, 16 experts."""
    found = {}
    for name, config in _ALL.items():
        fewer = {key: 16 for key in _EXPERTS & config.keys()}
        found[name] = config | {"num_hidden_layers": 5} | fewer
    return found


def layouts_of(config: dict[str, Any]) -> list[str]:
    """Return the layouts at which a model can be built."""
    experts = bool(_EXPERTS & config.keys())
    fits = {True: lambda sizes: "tensor" not in sizes or "sequence_parallel" in sizes, False: lambda sizes: True}
    if not experts:
        fits[False] = lambda sizes: "expert" not in sizes and "expert_tensor" not in sizes
    return [name for name, sizes in LAYOUTS.items() if fits[experts](sizes)]


def compared(config: dict[str, Any], layout: str) -> dict[str, Any]:
    """Return the number of parameters, those without a rule, rules without a parameter, and wrong shapes."""
    sizes, source = ParallelSizes(**LAYOUTS[layout]), PaperSource(config)
    source.config = config
    arch = replace(source.family.architecture(config), num_mtp=len(source.mtp_layers))
    rules, wrong, held = rules_by_parameter(source, transformer_engine=True), [], set()
    with simulated_rank(0, _WORLD_SIZE, sizes), device.on_meta():
        model = build_model(arch, [arch.num_layers], EngineOptions(sizes, transformer_engine=True, bf16=True))
        weights = {name: tuple(weight.shape) for name, weight in model.named_weights()}
        local = arch.num_experts // sizes.expert if arch.num_experts else 0
    for name, shape in weights.items():
        if name not in rules:
            continue
        rule = rules[name]
        with torch.device("meta") if rule.shard is VOCAB else torch.device("cpu"):
            part = rule.read(source, arch, TensorParallel(0, sizes.expert_tensor if rule.expert else sizes.tensor))
        held.add(name)
        if tuple(part.shape) != shape:
            wrong.append(f"{name}: {shape}, not {tuple(part.shape)}")
    unfilled = {name for name in rules.keys() - held if not rules[name].expert}
    experts = [name for name in held if rules[name].expert]
    per_expert = sum(rule.expert for rule in rules.values()) // max(1, arch.num_experts)
    return {
        "parameters": len(weights),
        "without a rule": sorted(weights.keys() - rules.keys()),
        "rules without a parameter": sorted(unfilled),
        "missing experts": local * per_expert - len(experts),
        "wrong shapes": wrong,
    }


def main(output: Path | None) -> None:
    """Compare all families at all layouts."""
    if not extension.HAVE_TE:
        raise SystemExit("Transformer Engine is not installed, or Megatron-Core can't import it")
    found = {}
    for name, config in configs().items():
        for layout in layouts_of(config):
            try:
                found[f"{name} {layout}"] = compared(config, layout)
            except Exception as error:
                found[f"{name} {layout}"] = {"error": f"{type(error).__name__}: {error}"}
            print(f"{name} {layout}: {found[f'{name} {layout}']}", flush=True)
    if output is not None:
        output.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
