"""Memory of activations: the tensors that autograd keeps for the backward pass, and temporary tensors.

The formulas count the tensors of Megatron-Core's local layers with torch's fused attention kernels. Transformer
Engine's fused layers keep less. Tokens are assumed to be routed evenly to the experts.
"""

from collections.abc import Collection
from dataclasses import dataclass

from megaprune.models import Architecture

_FP32 = 4
_INDEX = 8
# of the search for the teacher's top k, see megaprune.distillation.losses
_BYTES_TO_RANK_A_LOGIT = 20
_RANKED_BYTES = 20 * 2**24


@dataclass(frozen=True)
class Passes:
    """Settings of the forward and backward passes that determine the memory of activations.

    Args:
        tensor: number of tensor-parallel ranks.
        expert_tensor: number of ranks that split each expert.
        recompute: value of ``--recompute-granularity``.
        adapter_rank: rank of LoRA adapters; None if all weights are trained.
        adapter_targets: Megatron's names of the linear layers with adapters.
        fused_norm: RMSNorm is one kernel, as on a GPU. On the CPU, torch composes it and keeps more tensors.
    """

    micro_batch_size: int
    seq_length: int
    bf16: bool = False
    tensor: int = 1
    expert_tensor: int = 1
    sequence_parallel: bool = False
    recompute: str | None = None
    adapter_rank: int | None = None
    adapter_targets: Collection[str] = ()
    fused_norm: bool = True


class Activations:
    """Memory of a micro-batch's activations on one rank. All results are in bytes."""

    def __init__(self, arch: Architecture, passes: Passes) -> None:
        self._arch, self._fields, self._passes = arch, arch.transformer, passes
        self._tokens = passes.micro_batch_size * passes.seq_length
        self._shard = self._tokens // (passes.tensor if passes.sequence_parallel else 1)
        self._bytes = 2 if passes.bf16 else 4
        self._hidden = self._fields["hidden_size"]

    def layer(self, moe: bool) -> float:
        """Return the bytes that one layer keeps from its forward to its backward pass."""
        if self._passes.recompute == "full":
            return self._shard * self._hidden * self._bytes  # its input
        return self._whole_layer(moe)

    def output(self) -> float:
        """Return the bytes that the last stage keeps after its layers: input and output of the norm, fp32 logits."""
        norm = self._norm(self._shard * self._hidden, self._shard)
        output_input = self._shard * self._hidden * self._bytes if self._passes.adapter_rank is None else 0
        return norm + output_input + self.logits()

    def multi_token(self, moe: bool) -> float:
        """Return the bytes that one MTP layer keeps: two normalized inputs, joined, a layer, a norm, and logits."""
        values = self._shard * self._hidden
        joined = self._read_by("eh_proj", tokens=self._shard, columns=2 * self._hidden)
        return 3 * self._norm(values, self._shard) + joined + self.layer(moe) + self.logits()

    def hidden_states(self, layers: int, micro_batches: int) -> float:
        """Return the bytes of the outputs of so many layers in so many micro-batches."""
        return layers * micro_batches * self._shard * self._hidden * self._bytes

    def working(self, moe_layers: Collection[bool], last_stage: bool, largest_trained: int) -> float:
        """Return the peak of temporary memory in the backward pass.

        Args:
            moe_layers: for each layer of the stage, True if it has experts.
            largest_trained: parameters of the largest trained tensor. Its gradient exists separately before it is
                added to the gradient buffer.
        """
        layer = max(max(map(self._gradients, moe_layers), default=0), largest_trained * self._bytes)
        if self._passes.recompute == "full" and moe_layers:
            layer += max(map(self._whole_layer, moe_layers)) - self.layer(False)
        # The loss needs one more copy of the logits. The output's tensors are freed before the layers' backward pass.
        return max(self.logits(), layer - self.output()) if last_stage else layer

    def teacher_pass(self, last_stage: bool) -> float:
        """Return the peak of a forward pass of the teacher, during which the student keeps no activations."""
        layer = 4 * self._shard * self._hidden * self._bytes + self._gradients(False)
        ranked = min(_RANKED_BYTES, self.logits() / _FP32 * _BYTES_TO_RANK_A_LOGIT)
        return max(layer, self.logits() + max(self.logits(), ranked)) if last_stage else layer

    def comparison(self) -> float:
        """Return the peak of comparing a masked model's logits with the original's: both, in fp32, and three copies."""
        return 5 * self.logits()

    def logits(self) -> float:
        """Return the bytes of a micro-batch's logits in fp32, without padding of the vocabulary."""
        return self._tokens * self._arch.vocab_size / self._passes.tensor * _FP32

    def _whole_layer(self, moe: bool) -> float:
        attention = self._latent_attention() if self._arch.mla else self._grouped_attention()
        number = 2 * self._arch.pre_norm + 2 * self._arch.sandwich_norm
        norms = number * self._norm(self._shard * self._hidden, self._shard)
        return norms + attention + (self._experts() if moe else self._mlp(self._fields["ffn_hidden_size"]))

    def _norm(self, values: float, rows: float, input_kept_anyway: bool = False) -> float:
        """Return the bytes of RMSNorm: its input and one factor per row.

        The composed norm keeps the input in fp32, and its normalized form for the gradient of the weight.
        """
        factors = rows * _FP32
        if self._passes.fused_norm:
            return factors + (0 if input_kept_anyway else values * self._bytes)
        copied = 0 if input_kept_anyway and self._bytes == _FP32 else values * _FP32
        return factors + copied + (values * _FP32 if self._passes.adapter_rank is None else 0)

    def _read_by(self, *linears: str, tokens: float, columns: float) -> float:
        """Return the bytes of an input of linear layers; kept only by layers with trained weights or adapters."""
        kept = any(self._trains(linear) for linear in linears)
        return tokens * columns * self._bytes if kept else 0

    def _latents(self, *linears: str, tokens: float) -> float:
        """Return the bytes that adapters keep between their two matrices."""
        if self._passes.adapter_rank is None:
            return 0
        return sum(self._trains(linear) for linear in linears) * tokens * self._passes.adapter_rank * self._bytes

    def _trains(self, linear: str) -> bool:
        return self._passes.adapter_rank is None or linear in self._passes.adapter_targets

    # Attention

    def _core_attention(self, queries: float, keys: float, values: float, heads: int) -> float:
        """Return the bytes of attention: queries, keys, values, log-sum-exp per row, and output.

        The input of the output projection is a view of the attention output.

        Args:
            queries: number of elements, as of keys and values.
        """
        kept, recomputed = (queries + keys + values) * self._bytes, self._passes.recompute is not None
        if not recomputed:
            kept += self._tokens * heads / self._passes.tensor * _FP32
        if not recomputed or self._trains("linear_proj"):
            kept += self._attended() * self._bytes
        return kept + self._latents("linear_proj", tokens=self._shard)

    def _attended(self) -> float:
        width = self._fields["v_head_dim"] if self._arch.mla else self._arch.head_dim
        return self._tokens * self._fields["num_attention_heads"] * width / self._passes.tensor

    def _queries(self) -> float:
        """Return the number of elements of the queries."""
        fields = self._fields
        width = fields["qk_head_dim"] + fields["qk_pos_emb_head_dim"] if self._arch.mla else self._arch.head_dim
        return self._tokens * fields["num_attention_heads"] * width / self._passes.tensor

    def _rope(self, width: int) -> float:
        """Return the bytes of sines and cosines, for queries and keys."""
        return 4 * self._passes.seq_length * width * self._bytes

    def _grouped_attention(self) -> float:
        heads, groups, width = self._fields["num_attention_heads"], self._arch.query_groups, self._arch.head_dim
        a_head = self._tokens * width / self._passes.tensor
        kept = self._read_by("linear_qkv", tokens=self._shard, columns=self._hidden)
        kept += self._latents("linear_qkv", tokens=self._tokens) + self._rope(self._arch.rotary_dim or width)
        if self._fields.get("qk_layernorm") or self._arch.qk_norm_over_width:
            rows = self._tokens / self._passes.tensor
            kept += self._norm(a_head * heads, rows * heads)
            kept += self._norm(a_head * groups, rows * groups, input_kept_anyway=True)
        # The values are a view of the projection's output, so all of it is kept.
        projected = a_head * (heads + 2 * groups)
        return kept + self._core_attention(a_head * heads, a_head * groups, projected, heads)

    def _latent_attention(self) -> float:
        fields = self._fields
        query_rank, rank, rope = fields["q_lora_rank"], fields["kv_lora_rank"], fields["qk_pos_emb_head_dim"]
        downs = ("linear_q_down_proj" if query_rank else "linear_q_proj", "linear_kv_down_proj")
        kept = self._read_by(*downs, tokens=self._shard, columns=self._hidden) + self._rope(rope)
        kept += self._latents(*downs, "linear_kv_up_proj", tokens=self._tokens)
        if query_rank:
            kept += self._norm(self._shard * query_rank, self._shard, input_kept_anyway=True)
            kept += self._read_by("linear_q_up_proj", tokens=self._shard, columns=query_rank)
            kept += self._latents("linear_q_up_proj", tokens=self._tokens)
        kept += self._norm(self._shard * rank, self._shard, input_kept_anyway=True)
        if self._keeps_inputs():
            # With sequence parallelism the norms read slices of the gathered latents, so all of these are kept.
            kept += self._tokens * ((query_rank or 0) + rank + rope) * self._bytes
        kept += self._read_by("linear_kv_up_proj", tokens=self._shard, columns=rank)
        heads = fields["num_attention_heads"]
        a_head = self._tokens * heads / self._passes.tensor
        keys = a_head * (fields["qk_head_dim"] + rope)
        return kept + self._core_attention(keys, keys, a_head * fields["v_head_dim"], heads)

    def _keeps_inputs(self) -> bool:
        """Return True if norms keep their input itself; composed norms in bf16 keep an fp32 copy instead."""
        return self._passes.fused_norm or self._bytes == _FP32

    # MLP and experts

    def _mlp(self, columns: int, reads_input: bool = True) -> float:
        """Return the bytes of SwiGLU: gate and up, silu(gate), a copy of up, and the input of the second layer."""
        inner = self._tokens * columns / self._passes.tensor
        kept = 4 * inner * self._bytes + self._read_by("linear_fc2", tokens=1, columns=inner)
        kept += self._latents("linear_fc1", tokens=self._tokens) + self._latents("linear_fc2", tokens=self._shard)
        if reads_input:
            kept += self._read_by("linear_fc1", tokens=self._shard, columns=self._hidden)
        return kept

    def _experts(self) -> float:
        fields, tokens = self._fields, self._shard
        kept = tokens * self._hidden * self._bytes  # the norm's output, which the router reads
        kept += tokens * self._router()
        routed = self._routed()
        inner = routed * fields["moe_ffn_hidden_size"] / self._passes.expert_tensor
        kept += self._read_by("linear_fc1", tokens=routed, columns=self._hidden) + routed * _FP32  # with probabilities
        kept += 5 * inner * self._bytes + self._read_by("linear_fc2", tokens=1, columns=inner)
        kept += self._latents("linear_fc1", "linear_fc2", tokens=routed)
        if "moe_shared_expert_intermediate_size" in fields:
            kept += self._mlp(fields["moe_shared_expert_intermediate_size"], reads_input=False)
        return kept

    def _router(self) -> float:
        """Return the bytes per token of the router: scores, choices, and the token-to-expert map with probabilities."""
        fields, experts, chosen = self._fields, self._arch.num_experts, self._fields["moe_router_topk"]
        mapping = experts * (1 + _FP32) + chosen * _INDEX
        kept = mapping + chosen * (_INDEX + _FP32)
        if fields["moe_router_score_function"] == "sigmoid":
            kept += experts * _FP32 + _FP32
        elif fields["moe_router_pre_softmax"]:
            kept += experts * _FP32
        groups = fields.get("moe_router_num_groups")
        if groups:
            chosen_in_group = chosen // fields["moe_router_group_topk"]
            kept += experts + (groups * chosen_in_group + fields["moe_router_group_topk"]) * _INDEX
        return kept

    def _routed(self) -> float:
        """Return the number of tokens that the experts of this rank process."""
        return self._shard * self._fields["moe_router_topk"] * self._passes.expert_tensor

    # Gradients of activations

    def _gradients(self, moe: bool) -> float:
        """Return the peak of the gradients of a layer's activations, as measured multiples of the widest tensor."""
        widest = 4 * self._queries()
        mlp = self._fields.get("moe_shared_expert_intermediate_size", 0) if moe else self._fields["ffn_hidden_size"]
        widest = max(widest, 3 * self._tokens * mlp / self._passes.tensor)
        if moe:
            widest = max(widest, 4 * self._routed() * self._hidden)
        return widest * self._bytes
