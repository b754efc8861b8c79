"""The data order is a function of (seed, step) alone: not of ranks, workers, resumption or the global random state."""

import itertools
import multiprocessing
import os
import random
import signal

import numpy as np
import pytest
import torch

from ditfast.data import DataError, Digits, Loader, epoch_order


class Numbered:
    """Sample i is filled with i on the left half and -i on the right, and has label i % 10."""

    channels, image_size, num_classes = 2, (3, 4), 10

    def __init__(self, size=20, flip=False):
        self.size, self.flip = size, flip

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        x = torch.full((2, 3, 4), float(index))
        x[..., 2:] *= -1
        return x, index % 10


class Broken(Numbered):
    """Sample 13 is `bad`."""

    def __init__(self, bad):
        super().__init__()
        self.bad = bad

    def __getitem__(self, index):
        return self.bad if index == 13 else super().__getitem__(index)


def take(count, *args, **kwargs):
    with Loader(*args, **kwargs) as loader:
        return list(itertools.islice(loader, count))


def assert_same(batches, others):
    assert len(batches) == len(others) > 0
    for (x, y), (other_x, other_y) in zip(batches, others, strict=True):
        assert torch.equal(x, other_x) and torch.equal(y, other_y)


def indices(batches):
    return [int(i) for x, _ in batches for i in x[:, 0, 0, :].abs().amax(1)]


def test_batch_shapes_and_dtypes():
    ((x, y),) = take(1, Digits(), 6)
    assert (x.shape, x.dtype, y.shape, y.dtype) == ((6, 1, 8, 8), torch.float32, (6,), torch.int64)


def test_labels_belong_to_their_images():
    batches = take(5, Numbered(), 6)
    assert indices(batches) == [int(i) for i in indices(batches)]
    assert [i % 10 for i in indices(batches)] == [int(label) for _, y in batches for label in y]


def test_each_epoch_has_every_sample_once_in_another_order():
    drawn = indices(take(10, Numbered(20), 6))  # 60 positions: three epochs, batches span them
    epochs = [drawn[i : i + 20] for i in (0, 20, 40)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != list(range(20))


def test_order_is_pinned():
    """A run must resume identically under a newer ditfast, so the order is part of the format."""
    order, mirrored = epoch_order(8, seed=3, epoch=5)
    assert order.tolist() == [1, 0, 6, 5, 3, 2, 7, 4]
    assert mirrored.nonzero().flatten().tolist() == [1, 3, 7]


def test_seeds_that_agree_in_their_low_32_bits_differ():
    assert not torch.equal(epoch_order(50, 1, 0)[0], epoch_order(50, 1 + 2**32, 0)[0])


def test_seeds_differ():
    assert indices(take(3, Numbered(), 6, seed=0)) != indices(take(3, Numbered(), 6, seed=1))


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_ranks_together_see_the_batch_of_one(world_size):
    whole = take(7, Numbered(flip=True), 6)
    shares = [take(7, Numbered(flip=True), 6, rank=r, world_size=world_size) for r in range(world_size)]
    joined = [tuple(torch.cat(parts) for parts in zip(*step, strict=True)) for step in zip(*shares, strict=True)]
    assert_same(joined, whole)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_the_data(workers):
    assert_same(take(9, Numbered(flip=True), 6, workers=workers), take(9, Numbered(flip=True), 6))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [1, 5])
def test_resuming_is_starting_at_a_step(workers, start):
    whole = take(8, Numbered(flip=True), 6)
    with Loader(Numbered(flip=True), 6, workers=workers, start_step=start) as loader:
        assert loader.step == start
        assert_same([next(loader) for _ in range(8 - start)], whole[start:])
        assert loader.step == 8


def test_dataset_smaller_than_the_batch_wraps_over_epochs():
    drawn = indices(take(2, Numbered(4), 10))
    assert [sorted(drawn[i : i + 4]) for i in range(0, 20, 4)] == [list(range(4))] * 5


def test_flip_mirrors_about_half_and_differs_by_epoch():
    drawn = take(20, Numbered(100, flip=True), 10)  # two epochs
    mirrored = torch.cat([x[:, 0, 0, 0] < 0 for x, _ in drawn])
    order = torch.tensor(indices(drawn))
    by_index = [dict(zip(order[i : i + 100].tolist(), mirrored[i : i + 100].tolist(), strict=True)) for i in (0, 100)]
    assert 30 < sum(by_index[0].values()) < 70
    assert by_index[0] != by_index[1]
    assert [by_index[1][i] for i in range(100)] == epoch_order(100, seed=0, epoch=1)[1].tolist()


def test_nothing_is_mirrored_unless_asked():
    assert all((x[..., 0] >= 0).all() for x, _ in take(5, Numbered(), 8))


@pytest.mark.parametrize("workers", [0, 2])
def test_global_random_states_are_untouched(workers):
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    first = take(3, Numbered(flip=True), 6, workers=workers)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all() and random.getstate() == states[2]
    torch.manual_seed(123)
    assert_same(take(3, Numbered(flip=True), 6, workers=workers), first)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ((torch.full((2, 3, 4), torch.nan), 1), "sample 13 of the dataset holds NaN or infinity"),
        ((torch.full((2, 3, 4), -torch.inf), 1), "sample 13 of the dataset holds NaN or infinity"),
        ((torch.zeros(2, 3, 5), 1), r"sample 13 .*\(2, 3, 5\), expected torch.float32 \(2, 3, 4\)"),
        ((torch.zeros(2, 3, 4).double(), 1), "sample 13 .*torch.float64"),
        ((torch.zeros(2, 3, 4), 10), r"sample 13 .*label 10, expected 0\.\.9"),
        ((torch.zeros(2, 3, 4), -1), "sample 13 .*label -1"),
    ],
)
def test_bad_sample_is_named(bad, message, workers):
    with pytest.raises(DataError, match=message):
        take(4, Broken(bad), 5, workers=workers)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"global_batch": 7, "world_size": 2}, "global batch 7 cannot be shared by 2 ranks"),
        ({"global_batch": 0}, "global batch 0"),
        ({"global_batch": 4, "rank": 2, "world_size": 2}, r"rank 2 is outside 0\.\.1"),
        ({"global_batch": 4, "start_step": -1}, "start_step -1, expected 0 or more"),
        ({"dataset": Numbered(0), "global_batch": 4}, "empty"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(DataError, match=message):
        Loader(**{"dataset": Numbered()} | arguments)


def test_close_stops_the_workers():
    loader = Loader(Numbered(), 6, workers=2)
    next(loader)
    assert len(multiprocessing.active_children()) == 2
    loader.close()
    loader.close()
    assert multiprocessing.active_children() == []
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)


def test_workers_stop_while_an_error_is_being_handled():
    broken = Broken((torch.full((2, 3, 4), torch.nan), 1))
    with pytest.raises(DataError), Loader(broken, 20, workers=2) as loader:
        next(loader)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_workers_leave_stopping_to_the_main_process(signum):
    with Loader(Numbered(), 6, workers=2) as loader:
        for _ in range(3):  # while they start, and while they read
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, signum)
            next(loader)
        assert_same([next(loader) for _ in range(6)], take(9, Numbered(), 6)[3:])
