"""x_t = a x_0 + b noise: a draw of q(x_t | x_0) (DDPM, arXiv:2006.11239, equation 4), or any interpolant's point.

dx_0 = a dx_t,  dnoise = b dx_t

x_0    (B, ...), batch stride free, each sample contiguous (else it is copied); noise, dx_t likewise
a, b   (B,), strides free: entries of the schedule's tables, or alpha_t and sigma_t of a path; no gradient
x_t    (B, ...), contiguous, in the widest dtype of the four: half-precision data is noised in float32 by float32 a, b
fp32   all arithmetic: one rounding per stored value
saved  x_0, noise for their shape and dtype; a, b

The tables stay float64 with who owns them: an `index_select` of (B,) entries is nothing beside x_t, and a kernel that
gathered would take float64 tables and timesteps of its own, of one kind of process.
"""

import torch

from ._checks import check_dims, check_floating, sample_dims
from ._op import Kernels, Op
from ._triton import jit, launch, samples, tl
from .autotune import pick
from .spec import Case, OpSpec

# Elements of a program, warps: 8 elements a thread, two loads of 16 bytes of each fp32 tensor; 1024 programs for 256
# latents of 4 x 32 x 32. Not measured on a chip yet.
CONFIG = (1024, 4)


def mix(x_0: torch.Tensor, noise: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a x_0 + b noise, a and b by sample, in plain PyTorch."""
    shape = (-1, *(1,) * (x_0.ndim - 1))
    return a.view(shape) * x_0 + b.view(shape) * noise


@jit
def _q_sample_fwd_kernel(
    x_0_ptr,
    noise_ptr,
    a_ptr,
    b_ptr,
    x_t_ptr,
    N,
    blocks,
    stride_x_0,
    stride_noise,
    stride_a,
    stride_b,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    sample = (pid // blocks).to(tl.int64)
    n = (pid % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = n < N
    a = tl.load(a_ptr + sample * stride_a).to(tl.float32)
    b = tl.load(b_ptr + sample * stride_b).to(tl.float32)
    x_0 = tl.load(x_0_ptr + sample * stride_x_0 + n, mask=live, other=0.0).to(tl.float32)
    noise = tl.load(noise_ptr + sample * stride_noise + n, mask=live, other=0.0).to(tl.float32)
    tl.store(x_t_ptr + sample * N + n, a * x_0 + b * noise, mask=live)


@jit
def _q_sample_bwd_kernel(
    dx_t_ptr,
    a_ptr,
    b_ptr,
    dx_0_ptr,
    dnoise_ptr,
    N,
    blocks,
    stride_dx_t,
    stride_a,
    stride_b,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    sample = (pid // blocks).to(tl.int64)
    n = (pid % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = n < N
    a = tl.load(a_ptr + sample * stride_a).to(tl.float32)
    b = tl.load(b_ptr + sample * stride_b).to(tl.float32)
    dx_t = tl.load(dx_t_ptr + sample * stride_dx_t + n, mask=live, other=0.0).to(tl.float32)
    tl.store(dx_0_ptr + sample * N + n, a * dx_t, mask=live)
    tl.store(dnoise_ptr + sample * N + n, b * dx_t, mask=live)


def widest(*tensors: torch.Tensor) -> torch.dtype:
    """The dtype of the sum of such tensors."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _q_sample_empty(x_0: torch.Tensor, noise: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor]:
    """x_t, not yet written."""
    return (torch.empty(x_0.shape, dtype=widest(x_0, noise, a, b), device=x_0.device),)


def _tiling(kernel: str, x: torch.Tensor) -> tuple[int, int, int, dict[str, int]]:
    """(programs, elements of a sample, programs of a sample, constants) of a launch over x."""
    block, warps = pick(kernel, CONFIG, x)
    N = x.shape[1:].numel()
    blocks = -(-N // block)
    return x.shape[0] * blocks, N, blocks, {"BLOCK": block, "num_warps": warps}


def _q_sample_fwd(
    results: tuple[torch.Tensor, ...], x_0: torch.Tensor, noise: torch.Tensor, a: torch.Tensor, b: torch.Tensor
) -> None:
    programs, N, blocks, meta = _tiling("q_sample_fwd", x_0)
    x_0, noise = samples(x_0), samples(noise)
    strides = (x_0.stride(0), noise.stride(0), a.stride(0), b.stride(0))
    launch(_q_sample_fwd_kernel, programs, x_0, noise, a, b, *results, N, blocks, *strides, **meta)


def _q_sample_bwd(
    grads: tuple[torch.Tensor, ...],
    dx_t: torch.Tensor,
    x_0: torch.Tensor,
    noise: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
) -> None:
    programs, N, blocks, meta = _tiling("q_sample_bwd", dx_t)
    dx_t = samples(dx_t)
    strides = (dx_t.stride(0), a.stride(0), b.stride(0))
    launch(_q_sample_bwd_kernel, programs, dx_t, a, b, *grads, N, blocks, *strides, **meta)


_OP = Op(
    "q_sample",
    mix,
    kernels=Kernels(
        inputs="Tensor x_0, Tensor noise, Tensor a, Tensor b",
        attrs="",
        outputs=("x_t",),
        saved=(),
        empty=_q_sample_empty,
        fwd=_q_sample_fwd,
        bwd=_q_sample_bwd,
        constants=("a", "b"),
    ),
)


def q_sample(
    x_0: torch.Tensor, noise: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, backend: str = "auto"
) -> torch.Tensor:
    """a x_0 + b noise, shaped like x_0 and noise (B, ...), for a and b (B,), in the widest dtype of the four.

    ValueError for shapes that disagree or dtypes that are not floating; BackendError where the backend cannot run.
    Where a or b needs a gradient, "auto" takes the reference, which has one.
    """
    tensors = {"x_0": x_0, "noise": noise, "a": a, "b": b}
    sample = sample_dims(_OP.name, "x_0", x_0)
    check_dims(_OP.name, {"x_0": sample, "noise": sample, "a": "B", "b": "B"}, tensors)
    check_floating(_OP.name, tensors)
    return _OP(backend, (x_0, noise, a, b))


SPEC = OpSpec(
    op=_OP,
    fn=q_sample,
    dims={"x_0": "B C H W", "noise": "B C H W", "a": "B", "b": "B"},
    cases=(
        Case("odd", {"B": 5, "C": 3, "H": 7, "W": 9}),
        Case("xl", {"B": 2, "C": 4, "H": 32, "W": 32}),
        Case("mixed", {"B": 3, "C": 4, "H": 8, "W": 8}, mixed=True),
        Case("strided", {"B": 3, "C": 4, "H": 6, "W": 5}, strided=True),
        Case("empty", {"B": 0, "C": 4, "H": 8, "W": 8}),
    ),
    bench=(
        # Under every precision latents are noised in float32.
        Case("DiT-XL/2", {"B": 256, "C": 4, "H": 32, "W": 32}, float32=("x_0", "noise")),
        Case("DiT-XL/2@512", {"B": 256, "C": 4, "H": 64, "W": 64}, float32=("x_0", "noise")),
    ),
    stream=("noise",),
    float32=("a", "b"),
    shard=("B",),
    bwd_unread=("x_0", "noise"),
)
