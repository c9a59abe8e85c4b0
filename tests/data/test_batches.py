"""Windows, their order, and batches. Token i of each stream is i."""

import numpy as np
import pytest
import torch

from megaprune.data.batches import PADDING_ID, batches_for, eval_batches, even_size, train_batches
from megaprune.data.datasets import PackedDataset, calibration_ids, sample_order
from megaprune.data.token_cache import TokenStream
from megaprune.utils.errors import UsageError

PAD = 9999


def packed(num_tokens, seq_length, pad_last=False, loss_mask=None):
    tokens = np.arange(num_tokens, dtype=np.uint16)
    stream = TokenStream(tokens, loss_mask, np.array([0, num_tokens]), "fingerprint")
    return PackedDataset(stream, seq_length, PAD, pad_last)


def labels_with_loss(batches):
    return torch.cat([batch.labels[batch.loss_mask == 1] for batch in batches]).tolist()


def test_window_starts_with_the_token_that_ended_the_one_before():
    dataset = packed(14, 4)
    assert len(dataset) == 3  # 13 predicted tokens: the last one fills no window
    tokens, loss_mask = dataset.window(2)
    assert tokens.tolist() == [8, 9, 10, 11, 12] and tokens.dtype == np.int64
    assert loss_mask.tolist() == [1, 1, 1, 1]
    with pytest.raises(IndexError):
        dataset.window(3)


@pytest.mark.parametrize("num_tokens", range(2, 15))
def test_padded_windows_predict_every_token_but_the_first_exactly_once(num_tokens):
    dataset = packed(num_tokens, 4, pad_last=True)
    predicted = []
    for i in range(len(dataset)):
        tokens, loss_mask = dataset.window(i)
        predicted += tokens[1:][loss_mask == 1].tolist()
        assert (tokens[1:][loss_mask == 0] == PAD).all()
    assert predicted == list(range(1, num_tokens))


def test_loss_mask_belongs_to_the_label_token():
    mask = np.zeros(9, np.uint8)
    mask[[3, 5, 8]] = 1
    dataset = packed(9, 4, loss_mask=mask)
    carried = [(w[0][1:][w[1] == 1]).tolist() for w in map(dataset.window, range(2))]
    assert carried == [[3], [5, 8]]


def test_sample_order_is_a_new_permutation_each_epoch_and_needs_no_history():
    order = sample_order(10, seed=3, start=0, count=30)
    epochs = order.reshape(3, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3
    assert sample_order(10, 3, 7, 16).tolist() == order[7:23].tolist()
    assert sample_order(10, 4, 0, 10).tolist() != epochs[0].tolist()


def test_sample_order_is_fixed_for_good():
    # The numbers themselves: another order after an upgrade would break runs that resume.
    assert sample_order(8, seed=1234, start=0, count=10).tolist() == [4, 5, 3, 1, 2, 0, 6, 7, 5, 7]


def test_batches_of_one_window_and_many_epochs():
    assert sample_order(1, seed=0, start=0, count=5).tolist() == [0] * 5


def global_batch(dataset, iteration, micro_batch_size, dp_size):
    ranks = [
        train_batches(
            dataset,
            iteration=iteration,
            global_batch_size=12,
            micro_batch_size=micro_batch_size,
            dp_rank=rank,
            dp_size=dp_size,
            seed=5,
        )
        for rank in range(dp_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    # Micro-batch m of rank r holds the samples from (m * dp_size + r) * micro_batch_size on.
    return [i for micro in zip(*ranks, strict=True) for batch in micro for i in batch.sample_ids]


@pytest.mark.parametrize(("micro_batch_size", "dp_size"), [(1, 1), (4, 1), (2, 3), (1, 12), (3, 2)])
def test_global_batch_is_the_same_at_every_layout_and_follows_the_sample_order(micro_batch_size, dp_size):
    dataset = packed(4 * 20 + 1, 4)
    for iteration in (0, 1, 7):  # 20 windows: iteration 1 crosses into the second epoch
        ids = global_batch(dataset, iteration, micro_batch_size, dp_size)
        assert ids == sample_order(20, 5, iteration * 12, 12).tolist()


def test_train_batch_holds_its_windows_shifted_by_one():
    dataset = packed(41, 4)
    batch = train_batches(dataset, iteration=0, global_batch_size=6, micro_batch_size=3, dp_rank=1, dp_size=2, seed=0)[
        0
    ]
    assert batch.tokens.dtype == batch.labels.dtype == batch.position_ids.dtype == torch.long
    assert batch.loss_mask.dtype == torch.float32
    assert batch.tokens[:, 0].tolist() == [4 * i for i in batch.sample_ids]
    assert torch.equal(batch.labels, batch.tokens + 1)
    assert batch.position_ids.tolist() == [[0, 1, 2, 3]] * 3
    assert batch.loss_mask.sum() == 12


def test_indivisible_global_batch_is_refused():
    with pytest.raises(UsageError, match="--global-batch-size 10 .* --micro-batch-size 2 .* size 3"):
        train_batches(
            packed(41, 4), iteration=0, global_batch_size=10, micro_batch_size=2, dp_rank=0, dp_size=3, seed=0
        )


@pytest.mark.parametrize(("micro_batch_size", "dp_size"), [(1, 1), (2, 1), (2, 3), (4, 4), (1, 5)])
def test_evaluation_counts_every_token_once_in_equally_many_batches(micro_batch_size, dp_size):
    dataset = packed(31, 4, pad_last=True)  # 8 windows, the last one half full
    ranks = [
        list(eval_batches(dataset, micro_batch_size=micro_batch_size, dp_rank=r, dp_size=dp_size))
        for r in range(dp_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    everything = [batch for micro in zip(*ranks, strict=True) for batch in micro]
    assert {batch.tokens.shape for batch in everything} == {(micro_batch_size, 4)}
    assert labels_with_loss(everything) == list(range(1, 31))
    ids = [i for batch in everything for i in batch.sample_ids]
    assert ids[:8] == list(range(8)) and set(ids[8:]) <= {PADDING_ID}
    assert len(ids) - 8 < micro_batch_size * dp_size


def test_evaluation_limit_takes_the_first_windows():
    dataset = packed(31, 4, pad_last=True)
    for limit, expected in ((3, 3), (100, 8)):
        batches = eval_batches(dataset, micro_batch_size=2, dp_rank=0, dp_size=1, limit=limit)
        ids = [i for batch in batches for i in batch.sample_ids if i != PADDING_ID]
        assert ids == list(range(expected))


def test_padding_rows_have_no_loss():
    (batch,) = batches_for(packed(41, 4), [6], micro_batch_size=3, dp_rank=0, dp_size=1)
    assert batch.sample_ids == [6, PADDING_ID, PADDING_ID]
    assert batch.loss_mask.sum(dim=1).tolist() == [4, 0, 0]
    assert (batch.tokens[1:] == PAD).all()


def test_calibration_windows_are_distinct_and_fixed_by_the_seed():
    ids = calibration_ids(100, 40, seed=1)
    assert ids == sorted(set(ids)) and len(ids) == 40 and ids[0] >= 0 and ids[-1] < 100
    assert ids == calibration_ids(100, 40, seed=1) != calibration_ids(100, 40, seed=2)
    with pytest.raises(UsageError, match="--calibration-samples 5 .* 4 windows"):
        calibration_ids(4, 5, seed=1)


@pytest.mark.parametrize(
    ("count", "most", "dp_size", "size"),
    [(1, 8, 1, 1), (8, 8, 1, 8), (9, 8, 1, 5), (10, 8, 2, 5), (17, 8, 2, 5), (3, 8, 4, 1), (0, 8, 2, 1)],
)
def test_few_windows_are_not_filled_up_to_a_whole_micro_batch(count, most, dp_size, size):
    assert even_size(count, most, dp_size) == size
    windows, dealt = packed(81, 4), range(dp_size)
    ranks = [[*batches_for(windows, range(count), micro_batch_size=size, dp_rank=r, dp_size=dp_size)] for r in dealt]
    rows = [row for batches in ranks for batch in batches for row in batch.sample_ids]
    assert sorted(row for row in rows if row != PADDING_ID) == list(range(count))
    assert rows.count(PADDING_ID) < dp_size * max(1, -(-count // (most * dp_size)))
