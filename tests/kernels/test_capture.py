"""Tables of kernels under the capture of a CUDA graph."""

from functools import lru_cache

import pytest
import torch

from ditfast.kernels import adamw_ema, captured_tables
from ditfast.kernels._capture import look_up, upload

CPU = torch.device("cpu")


@lru_cache
def table(*values):
    return upload(values, torch.int64, CPU)


def test_outside_of_a_capture_tables_are_made_once():
    assert look_up(table, 1, 2) is look_up(table, 1, 2)
    assert look_up(table, 1, 2).tolist() == [1, 2]


def test_in_a_capture_they_are_made_anew_written_at_its_end_and_kept():
    outside = look_up(table, 3, 4)
    with captured_tables() as kept:
        inside = look_up(table, 3, 4)
        inside.fill_(0)  # a copy from the host must not be part of the graph, which would repeat it
    assert inside is not outside and inside.tolist() == [3, 4]
    assert kept[0] is inside
    assert look_up(table, 3, 4) is outside


def test_a_capture_that_fails_leaves_nothing_behind():
    with pytest.raises(RuntimeError, match="no"), captured_tables():
        look_up(table, 5)
        raise RuntimeError("no")
    assert look_up(table, 5).tolist() == [5]


def test_captures_are_not_nested():
    with captured_tables(), pytest.raises(RuntimeError, match="one CUDA graph after the other"), captured_tables():
        pass


def test_a_capture_without_the_scope_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"must be captured inside ditfast.kernels.captured_tables\(\)"):
        upload([1], torch.int64, torch.device("cuda"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["adamw_ema"])  # by which the ledger knows whose test it is
def test_steps_of_a_graph_are_the_same_to_the_bit(name):
    def state():
        return [torch.full((n,), 0.5, device="cuda") for n in (1000, 5000)]

    def step(tensors, grad, steps, lr):
        weights, m, v, ema = tensors
        grads = [grad * 2, (grad * 3).repeat(5)]  # where they lie is known in the capture alone
        zero, alpha = torch.zeros_like(lr), torch.full_like(lr, 0.1)
        adamw_ema(
            weights, grads, m, v, [ema], [], steps=steps, lr=lr, found_inf=zero, alphas=alpha, decays=[0.0, 0.1],
            backend="triton",
        )  # fmt: skip

    def run(graphed):
        tensors, steps = [state() for _ in range(4)], torch.zeros(2, device="cuda")
        grad, lr = torch.empty(1000, device="cuda"), torch.empty(1, device="cuda")
        graph = torch.cuda.CUDAGraph()
        for i in range(8):
            grad.copy_(torch.arange(1000.0) * (i + 1)), lr.fill_(0.1 / (i + 1))
            if graphed and i == 3:
                torch.cuda.synchronize()
                with captured_tables() as kept, torch.cuda.graph(graph):
                    step(tensors, grad, steps, lr)
            if graphed and i >= 3:
                assert kept
                graph.replay()
            else:
                step(tensors, grad, steps, lr)
        return [*(t for group in tensors for t in group), steps]

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))
