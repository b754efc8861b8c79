"""Bugs planted in the kernels of attention must fail the budgets, in every dtype."""

import itertools

import pytest
import torch

from ditfast.kernels import OPS, parity
from ditfast.kernels.attention import backward, forward, short

SPECS = {spec.name: spec for spec in OPS}
CASES = {case.name: (SPECS["attention"], case) for case in SPECS["attention"].cases}
# Views into a larger tensor: what an unmasked load reads too much is there.
PACKED = {case.name: case for case in SPECS["attention_qkvpacked"].cases}
CASES["packed"], CASES["packed_groups"] = ((SPECS["attention_qkvpacked"], PACKED[n]) for n in ("strided", "grouped"))
MODULES = (backward, forward, short)

# kernel, what is wrong, the right text, the wrong one, and the cases that show it: "odd" takes the short backward in 16
# bits and the long one in float32, "long" the long one in all.
BUGS = (
    ("_attention_fwd_kernel", "missing scale", "scale * 1.44", "1.44", "odd"),
    ("_attention_fwd_kernel", "unmasked last keys", "s = tl.where(there[None, :], s,", "s = tl.where(True, s,", "odd"),
    ("_attention_fwd_kernel", "last key dropped", "start + key < Tk", "start + key < Tk - 1", "odd"),
    ("_attention_fwd_kernel", "head of sample 0", "sample * stride_kb", "0 * stride_kb", "odd"),
    ("_attention_fwd_kernel", "first head for all", "(head % H)", "(0 * head)", "odd"),
    ("_attention_fwd_kernel", "heads of k in turn", "h // GROUP", "h % (H // GROUP)", "grouped"),
    ("_attention_fwd_kernel", "k of the first heads", "kv_head = h // GROUP", "kv_head = h", "grouped"),
    ("_attention_fwd_kernel", "tail forgotten in the scores", "s = tl.dot(tail_q", "_ = tl.dot(tail_q", "odd"),
    ("_attention_fwd_kernel", "unmasked tail", " & tail_in, other", ", other", "packed"),
    ("_attention_fwd_kernel", "sums not shrunk", "o * shrink[:, None]", "o", "peaked"),
    ("_attention_fwd_kernel", "total not shrunk", "total * shrink +", "total +", "peaked"),
    ("_attention_fwd_kernel", "lse without the largest", "most + tl.log2(total)", "tl.log2(total)", "odd"),
    ("_attention_fwd_kernel", "unwritten last query", "(row < Tq)[:, None]", "(row < Tq - 1)[:, None]", "odd"),
    ("dq_tile", "missing delta", "(dp - delta[:, None])", "dp", "odd", "long"),
    ("dq_tile", "delta without the tail", "delta += tl.sum(tail_o", "_ = tl.sum(tail_o", "odd", "long"),
    ("dq_tile", "dq x 0.99", "cols, dq * scale", "cols, 0.99 * dq * scale", "odd"),
    ("dq_tile", "missing scale", "dq_row + cols, dq * scale", "dq_row + cols, dq", "odd", "long"),
    ("dq_tile", "last key dropped", "start + key < Tk", "start + key < Tk - 1", "odd", "long"),
    ("dq_tile", "tail of dq forgotten", "tail_dq * scale,", "0.0 * tail_dq,", "odd", "long"),
    ("dkdv_tile", "missing delta", "(dp - delta[None, :])", "dp", "odd", "long"),
    ("dkdv_tile", "missing scale", "dk_row + cols, dk * scale", "dk_row + cols, dk", "odd", "long"),
    ("dkdv_tile", "last query dropped", "start + query < Tq", "start + query < Tq - 1", "odd", "long"),
    ("dkdv_tile", "dv of unweighted do", "dv = tl.dot(p,", "dv = tl.dot(ds,", "odd", "long"),
    ("dkdv_tile", "unmasked tail", " & tail_in, other", ", other", "packed"),
    ("_attention_dq_kernel", "do of sample 0", "sample * stride_dob", "0 * stride_dob", "long"),
    ("_attention_dq_kernel", "statistics of head 0", "sample * H + h", "sample * H", "heads"),
    ("_attention_dq_kernel", "heads of k in turn", "h // GROUP", "h % (H // GROUP)", "grouped"),
    ("dkdv_tile", "last head of a group dropped", "range(GROUP)", "range(max(1, GROUP - 1))", "grouped"),
    ("dkdv_tile", "q of the first head of a group", "stride_qh - past", "-past", "grouped", "packed_groups"),
    ("dkdv_tile", "do of the first head of a group", "stride_doh - past", "-past", "grouped"),
    ("dkdv_tile", "lse of the first head of a group", "lse_ptr += Tq", "lse_ptr += 0", "grouped"),
    ("dkdv_tile", "delta of the first head of a group", "delta_ptr += Tq", "delta_ptr += 0", "grouped"),
    ("_attention_dkdv_kernel", "statistics of a group before", "H_kv + h) * GROUP", "H_kv + h)", "grouped"),
    ("_attention_dkdv_kernel", "groups that overlap", "h * GROUP *", "h *", "grouped"),
    ("_attention_dkdv_kernel", "v of sample 0", "sample * stride_vb", "0 * stride_vb", "long"),
    ("_attention_dkdv_kernel", "first block only", "(pid % blocks)", "(0 * pid)", "heads"),
    ("_attention_short_bwd_kernel", "o of sample 0", "(sample * Tq * H + h)", "h", "odd"),
    ("_attention_short_bwd_kernel", "statistics of head 0", "head.to(tl.int64) * Tq", "sample * H * Tq", "odd"),
)  # fmt: skip
FLOAT32 = (torch.float32,)
HALVES = (torch.bfloat16, torch.float16)


def cases():
    for kernel, bug, right, wrong, *names in BUGS:
        dtypes = HALVES if "short" in kernel else FLOAT32 + HALVES
        for name, dtype in itertools.product(names, dtypes):
            # In float32 "odd" and "long" are one form.
            if not (dtype == torch.float32 and name == "long" and "odd" in names):
                breadth = [pytest.mark.full] if dtype != torch.bfloat16 else []
                id = f"{kernel.strip('_')}-{bug}-{name}-{str(dtype).removeprefix('torch.')}"
                yield pytest.param(kernel, right, wrong, name, dtype, id=id, marks=breadth)


@pytest.mark.parametrize(("kernel", "right", "wrong", "case", "dtype"), tuple(cases()))
def test_planted_bug_is_rejected(kernel, right, wrong, case, dtype, device, generator, plant):
    plant(MODULES, kernel, right, wrong)
    spec, case = CASES[case]
    verdicts = parity.check(spec, spec.make_inputs(case, dtype, device, generator), "triton", generator)
    assert not all(verdict.ok for verdict in verdicts), verdicts
