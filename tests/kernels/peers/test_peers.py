"""The peers of the benches: each agrees with the reference, is imported when called, and says what is missing."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from ditfast.kernels import OPS, parity
from ditfast.kernels.peers import PeerError, _base, judge_peer, peers_of

ROOT = Path(__file__).parents[3]
SPECS = {spec.name: spec for spec in OPS}
PEERS = [
    pytest.param(spec, name, id=f"{spec.name}-{name}", marks=[pytest.mark.full] if name == "compile" else [])
    for spec in OPS
    for name in peers_of(spec)
]


def verdicts(spec, name, case, device, generator, dtype=torch.float32):
    """In float32, since the budgets of lower dtypes leave no room for the roundings between a peer's several passes."""
    dtype = torch.bfloat16 if spec.mutates else dtype
    truth = parity.truth(spec, spec.make_inputs(case, dtype, device, generator), generator)
    return judge_peer(truth, peers_of(spec)[name])


@pytest.mark.parametrize(("spec", "name"), PEERS)
def test_each_peer_that_is_here_agrees_with_the_reference(spec, name, device, generator):
    for case in (spec.cases[0], *(case for case in spec.cases if case.name in ("no_ema", "found_inf"))):
        try:
            found = verdicts(spec, name, case, device, generator)
        except PeerError as error:
            pytest.skip(str(error))
        assert found and all(verdict.ok for verdict in found), [verdict for verdict in found if not verdict.ok]


@pytest.mark.parametrize("wrong", (lambda y: 0 * y, lambda y: y * 1.001), ids=("zeros", "off by 0.1 %"))
def test_a_peer_that_does_not_agree_is_seen(wrong, device, generator):
    spec = SPECS["adaln_modulate"]
    plain = peers_of(spec)["eager"]
    spec = replace(spec, peers={"wrong": lambda **inputs: wrong(plain(**inputs))})
    assert not all(verdict.ok for verdict in verdicts(spec, "wrong", spec.cases[0], device, generator))


@pytest.mark.parametrize(
    ("op", "name", "module", "says"),
    (
        ("adaln_modulate", "liger-kernel", "liger_kernel.ops.modulated_rms_norm", r"pip install 'liger-kernel"),
        ("adamw_ema", "apex", "amp_C", r"github\.com/NVIDIA/apex .*PyPI is another package"),
        ("adamw_ema", "apex", "apex.multi_tensor_apply", r"github\.com/NVIDIA/apex .*PyPI is another package"),
    ),
)
def test_a_missing_library_is_named_with_what_to_do(op, name, module, says, device, generator, monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))
    monkeypatch.setitem(sys.modules, module, None)
    spec = SPECS[op]
    with pytest.raises(PeerError, match=says):
        verdicts(spec, name, spec.cases[0], device, generator)


@pytest.mark.parametrize(
    ("op", "name"),
    [(s.name, n) for s in OPS for n in peers_of(s) if n not in ("eager", "compile", "torch", "diffusers")],
)
def test_each_library_is_called_as_it_documents(op, name, device, generator, stand_ins):
    """Of the op's cases those that the library can do agree with the reference; at least one is."""
    spec, fits = SPECS[op], []
    for case in (case for case in spec.cases if not case.full and case.name != "xl"):
        for dtype in (torch.float32, torch.bfloat16):
            try:
                found = verdicts(spec, name, case, device, generator, dtype)
            except PeerError as error:
                assert re.search("alone|of one dtype|of x's dtype|plain PyTorch|takes", str(error)), error
                continue
            assert found and all(verdict.ok for verdict in found), (case.name, [v for v in found if not v.ok])
            fits.append(case.name)
            break
    assert fits


def test_a_library_for_gpus_is_not_called_on_a_cpu(stand_ins, monkeypatch):
    monkeypatch.setattr(_base, "_kind", lambda device: device.type)
    with pytest.raises(PeerError, match="Liger-Kernel needs tensors on cuda, these are on cpu"):
        verdicts(SPECS["adaln_modulate"], "liger-kernel", SPECS["adaln_modulate"].cases[0], "cpu", torch.Generator())


def test_what_a_library_cannot_do_is_refused(device, generator, stand_ins):
    def refuses(op, name, case):
        with pytest.raises(PeerError, match="alone"):
            verdicts(SPECS[op], name, next(c for c in SPECS[op].cases if c.name == case), device, generator)

    refuses("qk_norm_rope", "liger-kernel", "odd")
    refuses("swiglu_mlp", "liger-kernel", "recompute")
    refuses("gelu_mlp", "diffusers", "recompute")


def test_importing_the_kernels_imports_no_peer():
    names = "liger_kernel", "apex", "amp_C", "diffusers", "flash_attn", "xformers", "transformer_engine"
    code = f"import sys, ditfast.kernels; print([m for m in {names} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
