"""Assignment of layers to pipeline stages."""

from collections.abc import Sequence

from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from megaprune.utils.errors import UsageError


def balanced_stages(costs: Sequence[float], num_stages: int, last_stage_cost: float = 0.0) -> list[int]:
    """Divide the layers into contiguous stages so that the most expensive stage is as cheap as possible.

    Args:
        costs: cost of each layer, in any unit.
        num_stages: pipeline-parallel size.
        last_stage_cost: cost of the output layer and the loss on the last stage, in the same unit.

    Returns:
        The number of layers on each stage; their sum is ``len(costs)``.

    Raises:
        UsageError: there are fewer layers than stages.
    """
    count = len(costs)
    if count < num_stages:
        raise UsageError(
            f"--pipeline-model-parallel-size {num_stages} leaves stages empty: only {count} layers are left"
        )
    prefix = [0.0]
    for cost in costs:
        prefix.append(prefix[-1] + cost)
    # best[s][i]: the least possible maximum cost of a stage if the first s stages hold the first i layers
    best = [[0.0 if i == 0 else float("inf") for i in range(count + 1)]]
    cuts: list[list[int]] = [[0] * (count + 1)]
    for stage in range(1, num_stages + 1):
        extra = last_stage_cost if stage == num_stages else 0.0
        row, cut = [float("inf")] * (count + 1), [0] * (count + 1)
        for end in range(stage, count + 1):
            # Among equal cuts the last one wins, so that earlier stages hold more layers.
            for start in range(stage - 1, end):
                dearest = max(best[-1][start], prefix[end] - prefix[start] + extra)
                if dearest <= row[end]:
                    row[end], cut[end] = dearest, start
        best.append(row)
        cuts.append(cut)
    sizes, end = [], count
    for stage in range(num_stages, 0, -1):
        start = cuts[stage][end]
        sizes.append(end - start)
        end = start
    return sizes[::-1]


def layout_string(stages: Sequence[int], num_mtp: int = 0) -> str:
    """Return Megatron's layout string, for example ``Ettt|tttL`` for three layers on each of two stages.

    Args:
        num_mtp: number of MTP layers, which are on the last stage.
    """
    return "E" + "|".join("t" * count for count in stages) + "m" * num_mtp + "L"


def parse_layout(layout: str, num_stages: int, num_layers: int) -> list[int]:
    """Return the number of layers on each stage of a ``--pipeline-model-parallel-layout``.

    Raises:
        UsageError: the layout is malformed, or does not fit the stages or the layers.
    """
    try:
        parsed = PipelineParallelLayerLayout(layout, num_stages)
        parsed.validate_layer_layout(num_layers, 0)
    except AssertionError as error:
        raise UsageError(f"--pipeline-model-parallel-layout {layout!r}: {error}") from None
    if parsed.virtual_pipeline_model_parallel_size > 1:
        raise UsageError(
            f"--pipeline-model-parallel-layout {layout!r} has {parsed.virtual_pipeline_model_parallel_size} chunks per "
            "rank: interleaved (virtual) pipeline stages are not supported"
        )
    return [parsed.layout[stage][0].count(LayerType.decoder) for stage in range(num_stages)]
