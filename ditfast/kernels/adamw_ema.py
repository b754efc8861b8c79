"""One optimizer step over many tensors: AdamW (Loshchilov & Hutter 2019), EMAs, low-precision copies; in place.

g = grad_factor * grad,  m <- m + (1 - beta1) (g - m),  v <- beta2 v + (1 - beta2) g^2,  t <- t + 1
w <- w - lr decay w - lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps),  ema <- ema + alpha (w - ema),  copy <- w
Where found_inf is not zero nothing is written: not the weights, the moments, the EMAs, the copies, nor t.

weights, exp_avgs, exp_avg_sqs   N contiguous tensors each, fp32: the masters, m and v
grads, copies                    N contiguous tensors each of one dtype, fp32, bf16 or fp16; copies may be empty (none)
emas                             E lists of N contiguous tensors, fp32
steps                            (N,) fp32: t of each tensor
lr, found_inf, grad_factor       (1,) fp32; grad_factor is the inverse loss scale times the clip factor, None for one
alphas                           (E,) fp32: 1 - rate of each EMA in this step
decays                           N floats
fp32                             all arithmetic; the bias corrections in fp64, as 1 - beta^t cancels
saved                            nothing, there is no derivative

All scalars that change from step to step are tensors on the device, so that the host neither waits nor is waited for.
A table of the tensors' addresses, kept from step to step, lets one launch serve them all: int64 loaded and cast to a
pointer, which compiles and interprets alike in Triton 3.6 to 3.9. Flat buffers with the parameters as views would do
without, but would take the storages away from whoever made the model. Tensors whose address or size is no multiple of
16 have a launch of their own with narrow loads. A first small launch counts the steps and makes the bias corrections.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from ._capture import look_up, upload
from ._checks import check_dims, check_floating, check_number
from ._op import InPlace, Op
from ._triton import jit, launch, tl
from .autotune import pick
from .peers import apex_adamw, torch_adamw, transformer_engine_adamw
from .spec import Case, OpSpec

Tensors = Sequence[torch.Tensor]

DIMS = {"steps": "N", "lr": "1", "found_inf": "1", "grad_factor": "1", "alphas": "E"}

# Elements of a program, elements of a tile, warps. Not measured on a chip yet: a thread holds 8 elements of a tile, so
# bf16 comes in one 16-byte load and fp32 in two; the chain map -> address -> data is waited for once in 8 tiles.
CONFIG = (8192, 1024, 4)
STEP_BLOCK = 256


def adamw_ema_ref(*args: Any) -> None:
    """The equations in plain PyTorch, of the schema's arguments; emas are one list, the first EMA's tensors first."""
    weights, grads, exp_avgs, exp_avg_sqs, emas, copies, *scalars, decays, beta1, beta2, eps = args
    steps, lr, found_inf, grad_factor, alphas = scalars
    keep = found_inf == 0
    steps += keep

    def write(target: torch.Tensor, value: torch.Tensor) -> None:
        target.copy_(torch.where(keep, value, target))

    for i, (w, m, v) in enumerate(zip(weights, exp_avgs, exp_avg_sqs, strict=True)):
        g = grads[i].to(w.dtype)
        if grad_factor is not None:
            g = g * grad_factor
        write(m, m + (1 - beta1) * (g - m))
        write(v, beta2 * v + (1 - beta2) * g * g)
        t = steps[i].double()
        step_size, root = (lr / (1 - beta1**t)).to(w.dtype), (1 - beta2**t).sqrt().to(w.dtype)
        write(w, w - lr * decays[i] * w - step_size * m / (v.sqrt() / root + eps))
        for alpha, ema in zip(alphas, emas[i :: len(weights)], strict=True):
            write(ema, ema + alpha * (w - ema))
        if copies:
            write(copies[i], w.to(copies[i].dtype))


def _adamw_ema_torch(*args: Any) -> None:
    """The same by torch's fused AdamW, several passes but quick ones: what runs on a CPU."""
    weights, grads, exp_avgs, exp_avg_sqs, emas, copies, *scalars, decays, beta1, beta2, eps = args
    steps, lr, found_inf, grad_factor, alphas = scalars
    if steps.is_meta:  # for which torch has no kernel, and where there is nothing to compute
        return
    keep = found_inf == 0
    steps += keep
    # Not fused AdamW's grad_scale, which would write the scaled gradients back.
    grads = [g.to(w.dtype) for g, w in zip(grads, weights, strict=True)]
    if grad_factor is not None:
        grads = [g * grad_factor for g in grads]
    each = steps.unbind()
    for decay in sorted(set(decays)):
        group = [i for i, mine in enumerate(decays) if mine == decay]
        torch._fused_adamw_(
            [weights[i] for i in group],
            [grads[i] for i in group],
            [exp_avgs[i] for i in group],
            [exp_avg_sqs[i] for i in group],
            [],
            [each[i] for i in group],
            lr=lr.reshape(()),
            beta1=beta1,
            beta2=beta2,
            weight_decay=decay,
            eps=eps,
            amsgrad=False,
            maximize=False,
            found_inf=(~keep).float().reshape(()),
        )
    for k, alpha in enumerate(alphas * keep):
        for ema, w in zip(emas[k * len(weights) : (k + 1) * len(weights)], weights, strict=True):
            ema.lerp_(w, alpha)
    for copy, w in zip(copies, weights, strict=False):
        copy.copy_(torch.where(keep, w.to(copy.dtype), copy))


@jit
def _adamw_ema_step_kernel(
    steps_ptr, found_inf_ptr, lr_ptr, corrections_ptr, n, log_beta1, log_beta2, BLOCK: tl.constexpr
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = i < n
    step = tl.load(steps_ptr + i, mask=live, other=1.0)
    step += tl.where(tl.load(found_inf_ptr) == 0.0, 1.0, 0.0)
    tl.store(steps_ptr + i, step, mask=live)
    t = step.to(tl.float64)
    step_size = tl.load(lr_ptr).to(tl.float64) / (1.0 - tl.exp(t * log_beta1))
    root = tl.sqrt(1.0 - tl.exp(t * log_beta2))
    tl.store(corrections_ptr + i, step_size.to(tl.float32), mask=live)
    tl.store(corrections_ptr + n + i, root.to(tl.float32), mask=live)


@jit
def _adamw_ema_update_kernel(
    map_ptr, table_ptr, decays_ptr, corrections_ptr, lr_ptr, found_inf_ptr, factor_ptr, alphas_ptr, grad_like,
    copy_like, n, one_minus_beta1, beta2, one_minus_beta2, eps,
    EMAS: tl.constexpr, HAS_FACTOR: tl.constexpr, HAS_COPY: tl.constexpr, WIDE: tl.constexpr,
    SPAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if tl.load(found_inf_ptr) != 0.0:
        return
    chunk = map_ptr + tl.program_id(0) * 2
    i = tl.load(chunk)
    first = tl.load(chunk + 1) * SPAN
    row = table_ptr + i
    numel = tl.load(row)
    if WIDE:
        numel = tl.multiple_of(numel, 16)
    weight_ptr = tl.load(row + n).to(tl.pointer_type(tl.float32))
    grad_ptr = tl.load(row + 2 * n).to(tl.pointer_type(grad_like.dtype.element_ty))
    exp_avg_ptr = tl.load(row + 3 * n).to(tl.pointer_type(tl.float32))
    exp_avg_sq_ptr = tl.load(row + 4 * n).to(tl.pointer_type(tl.float32))
    step_size = tl.load(corrections_ptr + i)
    root = tl.load(corrections_ptr + n + i)
    shrink = tl.load(lr_ptr) * tl.load(decays_ptr + i)
    if HAS_FACTOR:
        factor = tl.load(factor_ptr)

    for start in range(0, SPAN, BLOCK):
        at = first + start + tl.arange(0, BLOCK)
        live = at < numel
        weight_at, grad_at, exp_avg_at, exp_avg_sq_at = (
            weight_ptr + at,
            grad_ptr + at,
            exp_avg_ptr + at,
            exp_avg_sq_ptr + at,
        )
        if WIDE:
            weight_at = tl.multiple_of(weight_at, 16)
            grad_at = tl.multiple_of(grad_at, 16)
            exp_avg_at = tl.multiple_of(exp_avg_at, 16)
            exp_avg_sq_at = tl.multiple_of(exp_avg_sq_at, 16)
        g = tl.load(grad_at, mask=live, other=0.0).to(tl.float32)
        w = tl.load(weight_at, mask=live, other=0.0)
        m = tl.load(exp_avg_at, mask=live, other=0.0)
        v = tl.load(exp_avg_sq_at, mask=live, other=0.0)
        if HAS_FACTOR:
            g = g * factor
        m = m + one_minus_beta1 * (g - m)
        v = beta2 * v + one_minus_beta2 * g * g
        w = w - shrink * w
        w = w - step_size * m / (tl.sqrt(v) / root + eps)
        tl.store(exp_avg_at, m, mask=live)
        tl.store(exp_avg_sq_at, v, mask=live)
        tl.store(weight_at, w, mask=live)
        for k in tl.static_range(EMAS):
            ema_at = tl.load(row + (5 + k) * n).to(tl.pointer_type(tl.float32)) + at
            if WIDE:
                ema_at = tl.multiple_of(ema_at, 16)
            ema = tl.load(ema_at, mask=live, other=0.0)
            tl.store(ema_at, ema + tl.load(alphas_ptr + k) * (w - ema), mask=live)
        if HAS_COPY:
            copy_at = tl.load(row + (5 + EMAS) * n).to(tl.pointer_type(copy_like.dtype.element_ty)) + at
            if WIDE:
                copy_at = tl.multiple_of(copy_at, 16)
            tl.store(copy_at, w, mask=live)


class _Tables(NamedTuple):
    """What the kernel looks up: sizes and addresses (columns, N), decays (N,), and (tensor, chunk) of each program."""

    addresses: torch.Tensor
    decays: torch.Tensor
    maps: tuple[tuple[bool, torch.Tensor], ...]


@lru_cache(maxsize=8)
def _tables(
    numels: tuple[int, ...], addresses: tuple[int, ...], decays: tuple[float, ...], span: int, device: torch.device
) -> _Tables:
    """The tables of these tensors: made once, since gradients too come back to their addresses step after step."""
    n = len(numels)
    wide = [not any(number % 16 for number in (numels[i], *addresses[i::n])) for i in range(n)]
    maps = []
    for kind in (True, False):
        chunks = [(i, c) for i in range(n) if wide[i] is kind for c in range(-(-numels[i] // span))]
        if chunks:
            maps.append((kind, upload(chunks, torch.int64, device)))
    table = upload([*numels, *addresses], torch.int64, device)
    return _Tables(table, upload(decays, torch.float32, device), tuple(maps))


def _adamw_ema(*args: Any) -> None:
    """The launches."""
    weights, grads, exp_avgs, exp_avg_sqs, emas, copies, *scalars, decays, beta1, beta2, eps = args
    steps, lr, found_inf, grad_factor, alphas = scalars
    n, numels = len(weights), tuple(w.numel() for w in weights)
    kinds = (grads[0].dtype, copies[0].dtype if copies else None)
    # How many tensors there are changes little, and by name and by the byte no two models would be alike.
    size = f"below 2^{sum(numels).bit_length()}"
    span, block, warps = pick("adamw_ema_update", CONFIG, size, len(emas) // n, *kinds)
    groups = (weights, grads, exp_avgs, exp_avg_sqs, emas, copies)
    addresses = tuple(t.data_ptr() for group in groups for t in group)
    tables = look_up(_tables, numels, addresses, tuple(decays), span, steps.device)
    corrections = torch.empty((2, n), dtype=torch.float32, device=steps.device)
    logs = (math.log(beta) if beta else -math.inf for beta in (beta1, beta2))
    launch(_adamw_ema_step_kernel, -(-n // STEP_BLOCK), steps, found_inf, lr, corrections, n, *logs, BLOCK=STEP_BLOCK)
    given = (lr, found_inf, lr if grad_factor is None else grad_factor, alphas)
    likes = (grads[0], copies[0] if copies else grads[0])
    flags = {"EMAS": len(emas) // n, "HAS_FACTOR": grad_factor is not None, "HAS_COPY": bool(copies)}
    for wide, chunks in tables.maps:
        launch(
            *(_adamw_ema_update_kernel, len(chunks), chunks, tables.addresses, tables.decays, corrections),
            *(*given, *likes, n, 1 - beta1, beta2, 1 - beta2, eps),
            **flags, WIDE=wide, SPAN=span, BLOCK=block, num_warps=warps,
        )  # fmt: skip


_OP = Op(
    "adamw_ema",
    adamw_ema_ref,
    functions={"torch": _adamw_ema_torch},
    kernels=InPlace(
        "Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] emas, "
        "Tensor(e!)[] copies, Tensor(f!) steps, Tensor lr, Tensor found_inf, Tensor? grad_factor, Tensor alphas, "
        "float[] decays, float beta1, float beta2, float eps",
        _adamw_ema,
    ),
)


@torch.no_grad()
def adamw_ema(
    weights: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    emas: Sequence[Tensors],
    copies: Tensors,
    *,
    steps: torch.Tensor,
    lr: torch.Tensor,
    found_inf: torch.Tensor,
    alphas: torch.Tensor,
    decays: Sequence[float],
    grad_factor: torch.Tensor | None = None,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    backend: str = "auto",
) -> None:
    """One AdamW step on N tensors, the update of E EMAs and of the rounded copies, in place (see the module).

    weights, grads, exp_avgs, exp_avg_sqs: N tensors each; emas: E sequences of N; copies: N or none; steps (N,),
    lr, found_inf, grad_factor (1,), alphas (E,) on the same device; decays: N weight decays.
    ValueError for lists that do not match, BackendError where the backend cannot run.
    """
    scalars = {"steps": steps, "lr": lr, "found_inf": found_inf, "grad_factor": grad_factor, "alphas": alphas}
    sizes = check_dims(_OP.name, DIMS, scalars, _OP.optional)
    check_floating(_OP.name, scalars)
    flat = [ema for each in emas for ema in each]
    lists = {"weights": weights, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    lists |= {f"emas[{k}]": ema for k, ema in enumerate(emas)} | ({"copies": copies} if copies else {})
    _check_lists(lists, steps)
    if not isinstance(decays, Sequence):
        raise ValueError(f"{_OP.name}: decays is {decays!r}, expected a number for each of the {len(weights)} weights")
    for name, count, expected in (
        ("steps", sizes["N"], len(weights)),
        ("alphas", sizes["E"], len(emas)),
        ("decays", len(decays), len(weights)),
    ):
        if count != expected:
            raise ValueError(f"{_OP.name}: {name} has {count} elements, expected {expected}")
    for name, value in (
        ("beta1", beta1),
        ("beta2", beta2),
        ("eps", eps),
        *((f"decays[{i}]", d) for i, d in enumerate(decays)),
    ):
        check_number(_OP.name, name, value)
    attrs = (list(decays), beta1, beta2, eps)
    inputs = (list(weights), list(grads), list(exp_avgs), list(exp_avg_sqs), flat, list(copies))
    _OP(backend, (*inputs, steps, lr, found_inf, grad_factor, alphas), attrs)


def _check_lists(lists: dict[str, Tensors], steps: torch.Tensor) -> None:
    """ValueError for the first tensor that the flat walk over the weights could not pair with its weight."""
    weights = lists["weights"]
    if not weights:
        raise ValueError(f"{_OP.name}: weights is empty, expected at least one tensor")
    for name, tensors in lists.items():
        if len(tensors) != len(weights):
            raise ValueError(f"{_OP.name}: {name} has {len(tensors)} tensors, expected {len(weights)} as weights has")
        for i, tensor in enumerate(tensors):
            if not isinstance(tensor, torch.Tensor):
                raise ValueError(f"{_OP.name}: {name}[{i}] is a {type(tensor).__name__}, expected a torch.Tensor")
        dtype = tensors[0].dtype if name in ("grads", "copies") else steps.dtype
        for i, (tensor, weight) in enumerate(zip(tensors, weights, strict=True)):
            if tensor.shape != weight.shape:
                shapes = f"{tuple(tensor.shape)}, expected {tuple(weight.shape)}"
                raise ValueError(f"{_OP.name}: {name}[{i}] has shape {shapes} as weights[{i}] has")
            if tensor.dtype != dtype or not dtype.is_floating_point:
                raise ValueError(f"{_OP.name}: {name}[{i}] has dtype {tensor.dtype}, expected {dtype}; convert it")
            if tensor.device != steps.device:
                raise ValueError(f"{_OP.name}: {name}[{i}] is on {tensor.device}, steps on {steps.device}; move it")
            if not tensor.is_contiguous():
                raise ValueError(f"{_OP.name}: {name}[{i}] is not contiguous, expected contiguous; pass a copy")


def _inputs(
    case: Case, dtype: torch.dtype, device: str | torch.device, generator: torch.Generator | None
) -> dict[str, Any]:
    """The parameters of DiT blocks of width D, in turn, until there are N; grads and copies in `dtype`."""
    N, D, E = (case.sizes[letter] for letter in "NDE")
    block = ((3 * D, D), (3 * D,), (D, D), (D,), (4 * D, D), (4 * D,), (D, 4 * D), (D,), (6 * D, D), (6 * D,))
    state = torch.float64 if dtype == torch.float64 else torch.float32

    def draw(kind: torch.dtype = state) -> list[torch.Tensor]:
        shapes = [block[i % len(block)] for i in range(N)]
        return [(0.25 + 0.5 * torch.randn(s, device=device, generator=generator)).to(kind) for s in shapes]

    def scalar(value: float) -> torch.Tensor:
        return torch.full((1,), value, dtype=state, device=device)

    return {
        "weights": draw(),
        "grads": draw(state if case.mixed else dtype),
        "exp_avgs": draw(),
        "exp_avg_sqs": [v.square() for v in draw()],
        "emas": [draw() for _ in range(E)],
        "copies": [] if case.mixed else draw(dtype),
        "steps": torch.arange(N, device=device).fmod(4).to(state),
        "lr": scalar(1e-2),
        "found_inf": scalar(case.sizes.get("found_inf", 0)),
        "grad_factor": scalar(0.5),
        "alphas": torch.arange(1, E + 1, device=device).to(state) / 100,
        "decays": [0.1 * (i % 2) for i in range(N)],
        # Large, so that its place inside or outside of the root shows.
        "eps": 1e-2,
        **case.kwargs,
    }


SPEC = OpSpec(
    op=_OP,
    fn=adamw_ema,
    dims=DIMS,
    cases=(
        Case("odd", {"N": 4, "D": 21, "E": 1}),
        Case("xl", {"N": 10, "D": 32, "E": 1}),
        Case("mixed", {"N": 9, "D": 16, "E": 2}, mixed=True),
        Case("no_ema", {"N": 3, "D": 16, "E": 0}, absent=("grad_factor",)),
        Case("found_inf", {"N": 4, "D": 9, "E": 1, "found_inf": 1}),
        Case("beta_zero", {"N": 4, "D": 9, "E": 1}, {"beta1": 0.0}, full=True),
        Case("empty", {"N": 4, "D": 0, "E": 1}),
    ),
    bench=(
        Case("DiT-XL/2", {"N": 280, "D": 1152, "E": 1}),
        Case("DiT-XL/2 official", {"N": 280, "D": 1152, "E": 1}, mixed=True),
    ),
    traffic=(Case("DiT-XL/2", {"N": 10, "D": 128, "E": 1}),),
    optional=("grad_factor",),
    inputs=_inputs,
    mutates=("weights", "exp_avgs", "exp_avg_sqs", "emas", "steps"),
    overwrites=("copies",),
    peers={"torch": torch_adamw, "apex": apex_adamw, "transformer-engine": transformer_engine_adamw},
)
