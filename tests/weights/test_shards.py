"""Cutting HF tensors into Megatron's shards, and merging them again."""

import math

import pytest
import torch

from megaprune.models import family_of
from megaprune.models.shards import COLUMN, COPY, GATED, QKV, ROW, VOCAB, TensorParallel, padded_vocab_size
from megaprune.utils.errors import MegapruneError
from megaprune.weights.source import HFSource
from tests.helpers.checkpoints import LLAMA, QWEN2, random_tensors, write_folder

ATTENTION = "model.layers.0.self_attn."


@pytest.fixture(scope="module", params=[LLAMA, QWEN2], ids=["llama", "qwen2 with bias, tied"])
def source(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    write_folder(folder, request.param)
    return HFSource(folder)


def rules_of(source):
    return source.family.rules(source.config)


def read_all(rule, source, size):
    arch = source.family.architecture(source.config)
    return [rule.read(source, arch, TensorParallel(rank, size)) for rank in range(size)]


def rule_for(source, hf_name):
    return next(rule for rule in rules_of(source) if hf_name in rule.hf)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_merging_is_the_inverse_of_cutting(source, size):
    arch = source.family.architecture(source.config)
    merged = {}
    for rule in rules_of(source):
        shards = read_all(rule, source, size)
        assert len({shard.shape for shard in shards}) == 1, "ranks hold equal parts"
        merged |= rule.merge(shards, arch)
    assert set(merged) == set(source.names)
    for name, tensor in merged.items():
        assert tensor.dtype == source.dtype(name)
        assert torch.equal(tensor, source.read(name)), name
    assert {rule.shard for rule in rules_of(source)} == {COPY, ROW, VOCAB, QKV, GATED}  # COLUMN is below


@pytest.mark.parametrize("size", [1, 2, 4])
def test_column(source, size):
    rule = rule_for(source, ATTENTION + "o_proj.weight")
    column = type(rule)(rule.megatron, rule.hf, COLUMN)
    whole = source.read(rule.hf[0])
    shards = read_all(column, source, size)
    assert torch.equal(torch.stack(shards), torch.stack(whole.chunk(size)))
    assert torch.equal(column.merge(shards, family_of(LLAMA).architecture(LLAMA))[rule.hf[0]], whole)


def test_bf16_bits_survive(tmp_path):
    write_folder(tmp_path, LLAMA, random_tensors(LLAMA, torch.bfloat16))
    source = HFSource(tmp_path)
    rule = rule_for(source, ATTENTION + "q_proj.weight")
    merged = rule.merge(read_all(rule, source, 2), source.family.architecture(LLAMA))
    for name, tensor in merged.items():
        assert torch.equal(tensor.view(torch.int16), source.read(name).view(torch.int16))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_each_query_group_is_followed_by_its_key_and_value(source, size):
    # 8 heads of 4 rows in 4 groups: two of the query's heads, then one of the key, then one of the value
    query, key, value = (source.read(ATTENTION + f"{x}_proj.weight") for x in "qkv")
    groups = []
    for group in range(4):
        groups += [query[8 * group : 8 * group + 8], key[4 * group : 4 * group + 4], value[4 * group : 4 * group + 4]]
    fused = torch.cat(read_all(rule_for(source, ATTENTION + "q_proj.weight"), source, size))
    assert torch.equal(fused, torch.cat(groups))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_each_rank_holds_its_part_of_gate_above_its_part_of_up(source, size):
    gate, up = (source.read(f"model.layers.2.mlp.{x}_proj.weight").chunk(size) for x in ("gate", "up"))
    shards = read_all(rule_for(source, "model.layers.2.mlp.gate_proj.weight"), source, size)
    for rank in range(size):
        assert torch.equal(shards[rank], torch.cat([gate[rank], up[rank]]))


def test_row_is_cut_along_the_input(source):
    down = source.read("model.layers.1.mlp.down_proj.weight")
    shards = read_all(rule_for(source, "model.layers.1.mlp.down_proj.weight"), source, 4)
    assert torch.equal(shards[2], down[:, 12:18])


@pytest.mark.parametrize("size, padded", [(1, 384), (2, 512), (4, 512)])
def test_vocabulary_is_padded_with_zeros(source, size, padded):
    whole = torch.cat(read_all(rule_for(source, "model.embed_tokens.weight"), source, size))
    assert padded_vocab_size(300, size) == len(whole) == padded
    assert torch.equal(whole[:300], source.read("model.embed_tokens.weight"))
    assert not whole[300:].any()


@pytest.mark.parametrize(
    "vocab_size, size, padded",
    [(32000, 8, 32768), (128256, 8, 129024), (151936, 8, 152576), (152064, 8, 152576), (129280, 8, 130048)],
)
def test_padded_sizes_of_released_models(vocab_size, size, padded):
    assert padded_vocab_size(vocab_size, size) == padded


def test_every_byte_is_read_once(source, monkeypatch):
    read, whole = [], HFSource.read
    monkeypatch.setattr(HFSource, "read", lambda *args: read.append(whole(*args).numel()) or whole(*args))
    for rule in rules_of(source):
        if rule.shard is not COPY:
            read.clear()
            read_all(rule, source, 4)
            assert sum(read) == sum(math.prod(source.shape(name)) for name in rule.hf)


def refusal(rule, source, size):
    with pytest.raises(MegapruneError) as caught:
        read_all(rule, source, size)
    return str(caught.value)


@pytest.mark.parametrize("size", [5, 16])
@pytest.mark.parametrize("name, length", [("down_proj.weight", 24), ("gate_proj.weight", 24)])
def test_uneven_parts(source, name, length, size):
    rule = rule_for(source, f"model.layers.0.mlp.{name}")
    message = refusal(rule, source, size)
    assert f"{length} {'rows' if rule.shard is GATED else 'columns'}, which {size} tensor-parallel" in message
    assert rule.hf[0] in message and "--tensor-model-parallel-size" in message


def test_fewer_key_value_heads_than_ranks(source):
    message = refusal(rule_for(source, ATTENTION + "q_proj.weight"), source, 8)
    assert message.startswith(f"{ATTENTION}k_proj.weight has 4 heads, which 8 tensor-parallel ranks can't share")


def test_missing_tensor(tmp_path):
    tensors = random_tensors(LLAMA)
    del tensors[ATTENTION + "v_proj.weight"]
    write_folder(tmp_path, LLAMA, tensors)
    source = HFSource(tmp_path)
    message = refusal(rule_for(source, ATTENTION + "q_proj.weight"), source, 2)
    assert f"lacks the tensor {ATTENTION}v_proj.weight" in message


@pytest.mark.parametrize("name", ["self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj", "input_layernorm"])
def test_runs_are_where_the_bytes_of_each_tensor_lie(source, name):
    arch, rule = source.family.architecture(source.config), rule_for(source, f"model.layers.0.{name}.weight")
    whole = rule.read(source, arch, TensorParallel())
    stored = whole.numpy().tobytes()
    for number, hf_name in enumerate(rule.hf):
        runs = rule.shard.runs(number, whole.shape, arch, whole.element_size())
        found = b"".join(stored[first : first + length] for first, length in runs)
        assert found == source.read(hf_name).numpy().tobytes()
