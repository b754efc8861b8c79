"""What the kernels of attention read and write in place, the form that a length takes, and far offsets."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ditfast.kernels import _triton, attention, attention_qkvpacked
from ditfast.kernels.attention import backward, forward, short


@pytest.fixture
def launched(monkeypatch):
    """(name of the kernel, its arguments by name) of each launch from now on."""
    seen = []

    def noted(kernel, programs, *args, **meta):
        seen.append((kernel.__name__, dict(zip(kernel.arg_names, args, strict=False)) | meta))
        _triton.launch(kernel, programs, *args, **meta)

    for module in (forward, backward, short):
        monkeypatch.setattr(module, "launch", noted)
    return seen


def storages(*tensors):
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


@pytest.mark.parametrize(
    ("T", "heads", "options", "kernels"),
    (
        (33, (3, 2), {}, ["short_bwd"]),
        (33, (6,), {"num_heads": 2}, ["short_bwd"]),
        (257, (3, 2), {}, ["dq", "dkdv"]),
        (33, (4,), {"num_heads": 2}, ["dq", "dkdv"]),
    ),
)
def test_qkv_is_read_in_place_and_its_gradient_written_packed(T, heads, options, kernels, launched, device):
    linear = torch.nn.Linear(16, math.prod(heads) * 72, device=device, dtype=torch.bfloat16)
    qkv = linear(torch.randn(2, T, 16, device=device).bfloat16()).detach().unflatten(2, (*heads, 72)).requires_grad_()
    o = attention_qkvpacked(qkv, **options, backend="triton")
    assert storages(*o.grad_fn.saved_tensors[:2]) == storages(qkv, o)
    (dqkv,) = torch.autograd.grad(o, qkv, torch.ones_like(o))
    assert [name for name, _ in launched] == [f"_attention_{name}_kernel" for name in ["fwd", *kernels]]
    for _, args in launched:
        assert storages(*(args[f"{name}_ptr"] for name in "qkv")) == storages(qkv)
        assert storages(*(args[name] for name in ("dq_ptr", "dk_ptr", "dv_ptr") if name in args)) <= storages(dqkv)
        assert args["UNIT"] == 8  # so that 16 bytes are loaded at a time though 16 does not divide the head stride 72


@pytest.mark.parametrize(
    ("lengths", "dtype", "kv_heads", "form"),
    (
        ((256, 256), torch.bfloat16, 4, "short_bwd"),
        ((256, 256), torch.bfloat16, 2, "dq"),
        ((1, 257), torch.float16, 4, "dq"),
        ((257, 1), torch.bfloat16, 4, "dq"),
        ((33, 2), torch.float32, 4, "dq"),
    ),
)
def test_the_form_goes_by_length_dtype_and_heads(lengths, dtype, kv_heads, form):
    sizes = zip(lengths, (4, kv_heads), strict=True)
    q, k = (torch.empty(2, T, H, 72, dtype=dtype, device="meta", requires_grad=True) for T, H in sizes)
    with _triton.recording() as recorded:
        o = attention(q, k, k, backend="triton")
        torch.autograd.grad(o, [q, k], torch.empty_like(o))
    assert recorded[1].kernel.__name__ == f"_attention_{form}_kernel"


FAR_SCRIPT = """
import os, torch
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
from ditfast.kernels import attention
device = "cuda" if torch.cuda.is_available() else "cpu"
far = 2**31 + 64
buffer = torch.empty(far + 1024, dtype=torch.bfloat16, device=device)
# Samples of q, heads of v and do, tokens of k that are 2**31 elements apart, or the last from the first.
strides = {"q": (far, 64, 32, 1), "k": (64, far // 2, 32, 1), "v": (128, 32, far, 1), "do": (128, 32, far, 1)}
torch.manual_seed(0)
near = {name: torch.randn(2, 3, 2, 32).to(device, torch.bfloat16) for name in strides}

def results(tensors):
    q, k, v = (tensors[name].detach().requires_grad_() for name in "qkv")
    o = attention(q, k, v, backend="triton")
    return o.detach(), *torch.autograd.grad(o, [q, k, v], tensors["do"])

for name in strides:
    distant = near[name].new_empty(0).set_(buffer.untyped_storage(), 256, (2, 3, 2, 32), strides[name])
    distant.copy_(near[name])
    for result, expected in zip(results({**near, name: distant}), results(near), strict=True):
        assert torch.equal(result, expected), name
"""


@pytest.mark.full
def test_offsets_beyond_31_bits():
    root = Path(__file__).parents[3]
    subprocess.run([sys.executable, "-c", FAR_SCRIPT], check=True, timeout=300, cwd=root)
