"""The mended interpreter: bfloat16 behaves as on the chip, or says that it does not."""

import pytest
import torch

from ditfast.kernels._triton import INTERPRETED, jit, launch, tl

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="for kernels in the interpreter")


@jit
def copy_kernel(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, tl.load(x_ptr + i))


@jit
def dot_kernel(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
    i = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(c_ptr + i, tl.dot(tl.load(a_ptr + i), tl.load(b_ptr + i)))


@jit
def accumulating_dot_kernel(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
    i = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    c = tl.load(c_ptr + i)
    for _ in range(2):
        c = tl.dot(tl.load(a_ptr + i), tl.trans(tl.load(b_ptr + i)), c, input_precision="ieee")
    tl.store(c_ptr + i, c)


@jit
def add_kernel(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, tl.load(x_ptr + i) + tl.load(x_ptr + i))


@jit
def sum_kernel(x_ptr, y_ptr, N: tl.constexpr):
    tl.store(y_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, N)), 0))


@jit
def negate_kernel(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, -tl.load(x_ptr + i))


@jit
def select_kernel(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, tl.where(i < 2, tl.load(x_ptr + i), tl.load(x_ptr + N - 1 - i)))


@jit
def count_kernel(y_ptr, n, N: tl.constexpr):
    total = tl.zeros([N], tl.float32)
    for _ in range(tl.program_id(0), tl.minimum(n, 100)):
        total += 1.0
    tl.store(y_ptr + tl.arange(0, N), total)


TRICKY = [0.0, -0.0, 1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -3.3, 3.4e38, 1e-40, 65504.0, 1e5, 1e-7]


@pytest.mark.parametrize("source", (torch.float32, torch.float16, torch.bfloat16))
@pytest.mark.parametrize("target", (torch.float32, torch.float16, torch.bfloat16))
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
def test_casts_round_as_pytorch(source, target):
    x = torch.tensor([*TRICKY, torch.inf, -torch.inf, torch.nan, 1 / 3], dtype=torch.float64).to(source)
    y = torch.empty(16, dtype=target)
    launch(copy_kernel, 1, x, y, N=16)
    torch.testing.assert_close(y, x.to(target), rtol=0, atol=0, equal_nan=True)


def test_random_floats_round_to_nearest_even():
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 100
    y = torch.empty(4096, dtype=torch.bfloat16)
    launch(copy_kernel, 1, x, y, N=4096)
    assert torch.equal(y, x.bfloat16())


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_dot_multiplies_the_values(dtype):
    a, b = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    c = torch.empty(16, 16)
    launch(dot_kernel, 1, a, b, c, N=16)
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
def test_dot_adds_to_its_accumulator_in_float32(dtype):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 16, 16, generator=generator).to(dtype)
    c = torch.randn(16, 16, generator=generator)
    expected = c.double() + 2 * (a.double() @ b.double().T)
    launch(accumulating_dot_kernel, 1, a, b, c, N=16)
    torch.testing.assert_close(c, expected.float(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("kernel", (add_kernel, sum_kernel, negate_kernel), ids=lambda kernel: kernel.__name__)
def test_native_bfloat16_arithmetic_is_refused(kernel):
    x = torch.ones(8, dtype=torch.bfloat16)
    with pytest.raises(Exception, match="cast to float32 first"):
        launch(kernel, 1, x, torch.empty_like(x), N=8)
    y = torch.empty(8, dtype=torch.float16)
    launch(kernel, 1, x.half(), y, N=8)


def test_selection_needs_no_arithmetic():
    x = torch.arange(4).bfloat16()
    y = torch.empty_like(x)
    launch(select_kernel, 1, x, y, N=4)
    assert y.tolist() == [0, 1, 1, 0]


def test_loop_bounds_may_be_tensors():
    y = torch.empty(2)
    launch(count_kernel, 1, y, 5, N=2)
    assert y.tolist() == [5, 5]


def test_interpreter_is_left_as_it_was():
    from triton.runtime import interpreter

    before = dict(vars(interpreter.interpreter_builder)), interpreter.ReduceScanOpInterface.check_tensor
    launch(copy_kernel, 1, torch.ones(4), torch.empty(4), N=4)
    with pytest.raises(Exception, match="float32"):
        launch(add_kernel, 1, torch.ones(4).bfloat16(), torch.empty(4), N=4)
    after = dict(vars(interpreter.interpreter_builder)), interpreter.ReduceScanOpInterface.check_tensor
    assert after[0].keys() - {"grid_idx", "grid_dim"} == before[0].keys() - {"grid_idx", "grid_dim"}
    assert after[1] is before[1]
