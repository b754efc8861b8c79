"""mse = mean((target - prediction)^2), target = a x_0 + b noise; vb = the bound's term of a learned variance.

One pass each way for epsilon (a, b = 0, 1), x_0 (1, 0) and velocity (alpha', sigma') predictions. With e = target -
prediction, means over a sample's N elements, and the columns gap, posterior, middle, half, first of `bound`:

logvar = middle + half v
vb     = weight / ln 2 * mean of 0.5 (exp(posterior - logvar) - 1 - (posterior - logvar) + (gap e)^2 exp(-logvar)), the
         KL of the posterior q(x_{t-1} | x_t, x_0) from p(x_{t-1} | x_t); where first is not 0: of the negative log
         likelihood of x_0's bin, 2 / 255 wide, under N(x_0 - gap e, exp(logvar)) (DDPM, arXiv:2006.11239, equation 13)

e is detached in vb, which trains the variance alone (L_hybrid; IDDPM, arXiv:2102.09672, equation 16):
dprediction = -2 e dmse / N,  dv = weight / (N ln 2) half dvb d(KL or -log likelihood)/dlogvar

The difference of the means of q and p is gap e, whatever is predicted, since both are affine in x_0 and x_t: x_t itself
is not needed. gap = c sigma_t / (a sigma_t - b alpha_t) with the posterior mean's coefficient c of x_0.

output     (B, C, ...), the prediction; with bound (B, 2C, ...), prediction and v; batch stride free, each sample
           contiguous (else it is copied): a slice of channels is read in place
x_0, noise (B, C, ...), likewise; not read where a or b is 0 (x_0 is, where first is not 0)
a, b       (B,), strides free
bound      (B, 5), row stride free: a row of one table for each sample; None for a fixed variance, and then no vb
mse, vb    (B,), in the widest dtype of all; vb in bits per dimension
doutput    contiguous, in output's dtype; the other inputs have no gradient
fp32       all arithmetic; the sums over a program's lanes in float64, so that (B,) values round about once
saved      output, x_0, noise, a, b, bound

A sample is one long row. A program adds up a chunk of it in registers and writes one partial row, which _rows.py adds
up in a fixed order. The likelihood of a bin is a product without cancellation; the reference subtracts two CDFs.
"""

import math
from typing import Any

import torch

from ._checks import check_dims, check_floating, check_number, sample_dims
from ._op import Kernels, Op
from ._rows import empty_partials, rows_per_program, sum_partials
from ._triton import jit, launch, rows, samples, tl
from .autotune import pick
from .bound import bin_log_likelihood, discretized_gaussian_log_likelihood, mean_flat, normal_kl
from .q_sample import mix, widest
from .spec import Case, OpSpec

# (elements of a tile, elements of a program, warps). Not measured on a chip yet; 8 elements a thread are two loads of
# 16 bytes of each fp32 tensor, and what the likelihood needs of them stays in registers. The forward's chunks of 4096
# make partial rows of nothing; the backward has no sums and takes a tile.
FWD_CONFIG = (1024, 4096, 4)
BWD_CONFIG = (1024, 4)


def diffusion_loss_ref(
    output: torch.Tensor,
    x_0: torch.Tensor,
    noise: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    bound: torch.Tensor | None,
    weight: float,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The equations in plain PyTorch."""
    target = mix(x_0, noise, a, b)
    if bound is None:
        return mean_flat((target - output) ** 2), None
    prediction, v = output.chunk(2, dim=1)
    gap, posterior, middle, half, first = bound.view(*bound.shape, *(1,) * (x_0.ndim - 1)).unbind(1)
    difference = gap * (target - prediction.detach())
    logvar = middle + half * v
    kl = normal_kl(difference, posterior, 0.0, logvar)
    likelihood = discretized_gaussian_log_likelihood(x_0, means=x_0 - difference, log_scales=0.5 * logvar)
    nats = mean_flat(torch.where(first != 0, -likelihood, kl))
    return mean_flat((target - prediction) ** 2), weight / math.log(2) * nats


@jit
def _error(output, x_0, noise, a, b, first, n, N):
    """(e, x_0) in fp32; x_0 is 0 where neither the target nor the likelihood needs it."""
    needed_x_0 = tl.where((a != 0.0) | (first != 0.0), N, 0)
    needed_noise = tl.where(b != 0.0, N, 0)
    prediction = tl.load(output, mask=n < N, other=0.0).to(tl.float32)
    x_0 = tl.load(x_0, mask=n < needed_x_0, other=0.0).to(tl.float32)
    noise = tl.load(noise, mask=n < needed_noise, other=0.0).to(tl.float32)
    return a * x_0 + b * noise - prediction, x_0


@jit
def _diffusion_loss_fwd_kernel(
    output_ptr,
    x_0_ptr,
    noise_ptr,
    a_ptr,
    b_ptr,
    bound_ptr,
    partial_ptr,
    N,
    chunks,
    weight,
    stride_output,
    stride_x_0,
    stride_noise,
    stride_a,
    stride_b,
    stride_bound,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    pid = tl.program_id(0)
    sample = (pid // chunks).to(tl.int64)
    begin = (pid % chunks).to(tl.int64) * CHUNK
    a = tl.load(a_ptr + sample * stride_a).to(tl.float32)
    b = tl.load(b_ptr + sample * stride_b).to(tl.float32)
    first = 0.0
    if bound_ptr is not None:
        row = bound_ptr + sample * stride_bound
        gap = tl.load(row).to(tl.float32)
        posterior = tl.load(row + 1).to(tl.float32)
        middle = tl.load(row + 2).to(tl.float32)
        half = tl.load(row + 3).to(tl.float32)
        first = tl.load(row + 4).to(tl.float32)
        nats = tl.zeros([BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)

    for start in range(begin, tl.minimum(begin + CHUNK, N), BLOCK):
        n = start + tl.arange(0, BLOCK)
        live = n < N
        output = output_ptr + sample * stride_output + n
        x_0, noise = x_0_ptr + sample * stride_x_0 + n, noise_ptr + sample * stride_noise + n
        e, x_0 = _error(output, x_0, noise, a, b, first, n, N)
        squares += e * e
        if bound_ptr is not None:
            logvar = middle + half * tl.load(output + N, mask=live, other=0.0).to(tl.float32)
            difference = gap * e
            if first != 0.0:
                log_p, _ = bin_log_likelihood(x_0, difference, logvar)
                nats += tl.where(live, -log_p, 0.0)
            else:
                ratio = posterior - logvar
                kl = 0.5 * (tl.exp(ratio) - 1.0 - ratio + difference * difference * tl.exp(-logvar))
                nats += tl.where(live, kl, 0.0)

    partial = partial_ptr + pid.to(tl.int64)
    if bound_ptr is not None:
        partial += pid
        tl.store(partial + 1, (tl.sum(nats.to(tl.float64), 0) / N * 1.4426950408889634 * weight).to(tl.float32))
    tl.store(partial, (tl.sum(squares.to(tl.float64), 0) / N).to(tl.float32))


@jit
def _diffusion_loss_bwd_kernel(
    dmse_ptr,
    dvb_ptr,
    output_ptr,
    x_0_ptr,
    noise_ptr,
    a_ptr,
    b_ptr,
    bound_ptr,
    doutput_ptr,
    N,
    blocks,
    mse_scale,
    vb_scale,
    stride_dmse,
    stride_dvb,
    stride_output,
    stride_x_0,
    stride_noise,
    stride_a,
    stride_b,
    stride_bound,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    sample = (pid // blocks).to(tl.int64)
    n = (pid % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = n < N
    a = tl.load(a_ptr + sample * stride_a).to(tl.float32)
    b = tl.load(b_ptr + sample * stride_b).to(tl.float32)
    dmse = tl.load(dmse_ptr + sample * stride_dmse).to(tl.float32)
    output = output_ptr + sample * stride_output + n
    x_0, noise = x_0_ptr + sample * stride_x_0 + n, noise_ptr + sample * stride_noise + n
    first = 0.0
    if bound_ptr is not None:
        row = bound_ptr + sample * stride_bound
        first = tl.load(row + 4).to(tl.float32)
    e, x_0 = _error(output, x_0, noise, a, b, first, n, N)
    if bound_ptr is not None:
        doutput = doutput_ptr + sample * (2 * N) + n
        gap = tl.load(row).to(tl.float32)
        posterior = tl.load(row + 1).to(tl.float32)
        middle = tl.load(row + 2).to(tl.float32)
        half = tl.load(row + 3).to(tl.float32)
        dvb = tl.load(dvb_ptr + sample * stride_dvb).to(tl.float32)
        logvar = middle + half * tl.load(output + N, mask=live, other=0.0).to(tl.float32)
        difference = gap * e
        if first != 0.0:
            _, slope = bin_log_likelihood(x_0, difference, logvar)
            slope = -slope
        else:
            slope = 0.5 * (1.0 - tl.exp(posterior - logvar) - difference * difference * tl.exp(-logvar))
        tl.store(doutput + N, vb_scale * dvb * half * slope, mask=live)
    else:
        doutput = doutput_ptr + sample * N + n
    tl.store(doutput, mse_scale * dmse * e, mask=live)


def _diffusion_loss_empty(
    output: torch.Tensor,
    x_0: torch.Tensor,
    noise: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    bound: torch.Tensor | None,
    weight: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """mse and vb, not yet written; vb without elements where there is no bound, since a raw op cannot return None."""
    B = x_0.shape[0]
    mse = torch.empty(B, dtype=widest(output, x_0, noise, a, b), device=output.device)
    vb = mse.new_empty(0) if bound is None else torch.empty(B, dtype=widest(mse, bound), device=output.device)
    return mse, vb


def _loads(
    output: torch.Tensor,
    x_0: torch.Tensor,
    noise: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    bound: torch.Tensor | None,
) -> tuple[tuple[torch.Tensor | None, ...], tuple[int, ...]]:
    """What both kernels read of these, and the strides between its samples."""
    read = (samples(output), samples(x_0), samples(noise), a, b, None if bound is None else rows(bound))
    return read, tuple(0 if tensor is None else tensor.stride(0) for tensor in read)


def _diffusion_loss_fwd(
    results: tuple[torch.Tensor, ...],
    output: torch.Tensor,
    x_0: torch.Tensor,
    noise: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    bound: torch.Tensor | None,
    weight: float,
) -> None:
    B, N = x_0.shape[0], x_0.shape[1:].numel()
    block, most, warps = pick("diffusion_loss_fwd", FWD_CONFIG, output, x_0)
    per_program = rows_per_program(block, most, B, N)
    chunks = -(-N // per_program)
    outs = [result.unsqueeze(1) for result in (results if bound is not None else results[:1])]
    partial = empty_partials(B, chunks, len(outs), 1, output.device)
    read, strides = _loads(output, x_0, noise, a, b, bound)
    meta = {"BLOCK": block, "CHUNK": per_program, "num_warps": warps}
    args = (*read, partial, N, chunks, weight, *strides)
    launch(_diffusion_loss_fwd_kernel, B * chunks, *args, **meta)
    sum_partials(partial, *outs)


def _diffusion_loss_bwd(
    grads: tuple[torch.Tensor, ...],
    dmse: torch.Tensor,
    dvb: torch.Tensor,
    output: torch.Tensor,
    x_0: torch.Tensor,
    noise: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    bound: torch.Tensor | None,
    weight: float,
) -> None:
    B, N = x_0.shape[0], x_0.shape[1:].numel()
    block, warps = pick("diffusion_loss_bwd", BWD_CONFIG, output, x_0)
    blocks = -(-N // block)
    read, strides = _loads(output, x_0, noise, a, b, bound)
    scales = (-2 / N, weight / (N * math.log(2)))
    args = (dmse, dvb, *read, *grads, N, blocks, *scales, dmse.stride(0), dvb.stride(0), *strides)
    launch(_diffusion_loss_bwd_kernel, B * blocks, *args, BLOCK=block, num_warps=warps)


_OP = Op(
    "diffusion_loss",
    diffusion_loss_ref,
    kernels=Kernels(
        inputs="Tensor output, Tensor x_0, Tensor noise, Tensor a, Tensor b, Tensor? bound",
        attrs="float weight",
        outputs=("mse", "vb"),
        saved=(),
        empty=_diffusion_loss_empty,
        fwd=_diffusion_loss_fwd,
        bwd=_diffusion_loss_bwd,
        constants=("x_0", "noise", "a", "b", "bound"),
    ),
)


def diffusion_loss(
    output: torch.Tensor,
    x_0: torch.Tensor,
    noise: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    bound: torch.Tensor | None = None,
    *,
    weight: float = 1.0,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """mse (B,) of a network's output against a x_0 + b noise, and vb (B,) in bits per dimension; see above.

    Args:
        output: (B, C, ...), or with `bound` (B, 2C, ...), whose second half is the position v of the log variance.
        x_0, noise: (B, C, ...); a, b: (B,).
        bound: (B, 5), its columns gap, posterior, middle, half, first; None for a fixed variance, and then vb is None.
        weight: multiplies vb.

    Raises:
        ValueError: shapes that disagree, a sample without elements, dtypes that are not floating.
        BackendError: the backend cannot run. Its kernels have the gradient of output alone; where another input needs
            one, "auto" takes the reference.
    """
    tensors = {"x_0": x_0, "noise": noise, "output": output, "a": a, "b": b, "bound": bound}
    sample = sample_dims(_OP.name, "x_0", x_0)
    if 0 in x_0.shape[1:]:
        raise ValueError(f"{_OP.name}: x_0 has shape {tuple(x_0.shape)}, expected (B, C, ...) with C, ... at least 1")
    dims = {"x_0": sample, "noise": sample, "output": sample.replace("C", "K"), "a": "B", "b": "B", "bound": "B 5"}
    sizes = check_dims(_OP.name, dims, tensors, _OP.optional)
    check_floating(_OP.name, tensors)
    check_number(_OP.name, "weight", weight)
    expected = sizes["C"] if bound is None else 2 * sizes["C"]
    if sizes["K"] != expected:
        form = "C channels without a bound" if bound is None else "2C channels with a bound"
        raise ValueError(f"{_OP.name}: output has {sizes['K']} channels, expected {expected}: {form}")
    mse, vb = _OP(backend, (output, x_0, noise, a, b, bound), (weight,))
    return mse, None if bound is None else vb


def _inputs(
    case: Case, dtype: torch.dtype, device: str | torch.device, generator: torch.Generator | None
) -> dict[str, Any]:
    """A network near its target; every other sample at its first step, two thirds with one of a, b at 0."""
    B, C, H, W = (case.sizes[dim] for dim in "BCHW")
    stream = torch.float32 if case.mixed else dtype

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, generator=generator)

    def view(tensor: torch.Tensor, dims: int = 4) -> torch.Tensor:
        """In a strided case a view into a larger one, its first `dims` dims cut out."""
        if not case.strided:
            return tensor
        room = tensor.new_zeros([size + 2 * (dim < dims) for dim, size in enumerate(tensor.shape)])
        inside = room[tuple(slice(1, -1) for _ in tensor.shape[:dims])]
        return inside.copy_(tensor)

    x_0, noise, a, b = draw(B, C, H, W).mul(0.7).clamp(-1, 1), draw(B, C, H, W), 1 + 0.3 * draw(B), 1 + 0.3 * draw(B)
    first = torch.zeros(B, device=device)
    first[::2], a[1::3], b[2::3] = 1, 0, 0
    output = mix(x_0, noise, a, b) + 0.5 * draw(B, C, H, W)
    if "bound" not in case.absent:
        output = torch.cat([output, 0.25 + 0.5 * draw(B, C, H, W)], dim=1)
    posterior = -6 + draw(B)
    half = 0.3 + 0.1 * draw(B)
    bound = torch.stack([(1 + 0.3 * draw(B)) * (posterior / 2).exp(), posterior, posterior + half, half, first], dim=1)
    wide = torch.float32 if "output" in case.float32 else dtype
    tensors = {"output": view(output.to(wide), 2), "x_0": view(x_0.to(stream)), "noise": view(noise.to(stream), 1)}
    return {**tensors, "a": view(a), "b": view(b), "bound": view(bound), **case.kwargs}


SPEC = OpSpec(
    op=_OP,
    fn=diffusion_loss,
    dims={"output": "B K H W", "x_0": "B C H W", "noise": "B C H W", "a": "B", "b": "B", "bound": "B 5"},
    cases=(
        Case("odd", {"B": 33, "C": 3, "H": 7, "W": 9}, {"weight": 0.25}),
        Case("xl", {"B": 16, "C": 4, "H": 32, "W": 32}),
        Case("mixed", {"B": 32, "C": 4, "H": 8, "W": 8}, mixed=True),
        Case("strided", {"B": 32, "C": 4, "H": 6, "W": 5}, strided=True),
        Case("mse", {"B": 17, "C": 3, "H": 7, "W": 9}, absent=("bound",)),
        Case("mse_mixed_strided", {"B": 16, "C": 5, "H": 16, "W": 15}, mixed=True, strided=True, absent=("bound",)),
        Case("empty", {"B": 0, "C": 4, "H": 8, "W": 8}),
    ),
    bench=(
        # Under every precision the loss is of a float32 output.
        Case("DiT-XL/2 official", {"B": 256, "C": 4, "H": 32, "W": 32}, mixed=True, float32=("output",)),
        Case("DiT-XL/2", {"B": 256, "C": 4, "H": 32, "W": 32}),
        Case("SiT-XL/2", {"B": 256, "C": 4, "H": 32, "W": 32}, mixed=True, absent=("bound",), float32=("output",)),
    ),
    optional=("bound",),
    shard=("B",),
    inputs=_inputs,
)
