"""Replays by themselves: what is dropped, and when it must not be."""

import weakref

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ditfast.layers.replay import Replays


def test_a_result_written_to_is_kept():
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    with (replays := Replays()):
        y = replays.call(torch.sin, x, drop=(0,))
        with torch.no_grad():
            y.mul_(2)
        out = y @ w
    (dw,) = torch.autograd.grad(out.sum(), w)
    torch.testing.assert_close(dw, (2 * torch.sin(x)).T @ torch.ones(3, 4))


@pytest.mark.parametrize("drop", [(0,), ()])
def test_what_is_kept_and_written_to_is_an_error(drop):
    x, w = torch.randn(3, 4), torch.randn(4, 4, requires_grad=True)
    with (replays := Replays()):
        y = replays.call(torch.sin, x, drop=drop)
        out = y @ w
    (x if drop else y).add_(1)
    with pytest.raises(RuntimeError, match="written to in place"):
        out.sum().backward()


def test_a_part_of_a_result_is_dropped_with_it():
    x, w = torch.randn(4, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    with (replays := Replays()):
        out = replays.call(torch.sin, x, drop=(0,))[2:] * w
    (dw,) = torch.autograd.grad(out.sum(), w)
    assert torch.equal(dw, torch.sin(x)[2:])


def test_a_transposed_result_is_dropped_with_it():
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    with (replays := Replays()):
        out = replays.call(torch.sin, x, drop=(0,)).T * w
    (dw,) = torch.autograd.grad(out.sum(), w)
    assert torch.equal(dw, torch.sin(x).T)


def test_a_result_that_is_part_of_another_is_kept():
    """Its storage holds what may not be there the next time."""
    x, w, whole = torch.randn(4, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True), []

    def top(x):
        whole.append(torch.sin(x))
        return whole[0][:2] if len(whole) == 1 else whole[-1][:2].clone()

    with (replays := Replays()):
        part = replays.call(top, x, drop=(0,))
        out = part * w + whole[0][2:] * w
    (dw,) = torch.autograd.grad(out.sum(), w)
    assert torch.equal(dw, torch.sin(x)[:2] + torch.sin(x)[2:])


def test_what_is_dropped_is_gone():
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    with (replays := Replays()):
        y = replays.call(torch.sin, x, drop=(0,))
        out, reference = y @ w, weakref.ref(y)
        storage = StorageWeakRef(y.untyped_storage())
        del y
    assert reference() is None and storage.expired() and out.requires_grad


def test_it_runs_once_a_backward():
    x, w, calls = torch.randn(3, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True), []
    with (replays := Replays()):
        y = replays.call(lambda x: [calls.append(1), torch.sin(x)][1], x, drop=(0,))
        out = (y @ w).sum() + (y @ w.T).sum()
    out.backward()
    assert calls == [1, 1]


def test_a_second_derivative_is_refused():
    x = torch.randn(3, requires_grad=True)
    with (replays := Replays()):
        y = replays.call(torch.sin, x)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_what_is_made_again_at_less_cost():
    """From the result that is kept; fn itself runs once, and nothing that was dropped is held."""
    x, w, calls = torch.randn(3, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True), []

    def both(x):
        calls.append("both")
        kept = x * 2
        return kept, kept + 1

    def redo(kept, _):
        return lambda kept: [calls.append("one"), kept + 1][1], kept

    with (replays := Replays()):
        kept, y = replays.call(both, x, drop=(1,), redo=redo)
        out, storage = (y @ w).sum() + (y @ w.T).sum() + kept.sum(), StorageWeakRef(y.untyped_storage())
        del y
    assert storage.expired() and calls == ["both"]
    ours = torch.autograd.grad(out, (x, w))
    assert calls == ["both", "one", "one"]  # for each product
    y = 2 * x + 1
    theirs = torch.autograd.grad((y @ w).sum() + (y @ w.T).sum() + (2 * x).sum(), (x, w))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
