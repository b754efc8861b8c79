"""The peers of the benches: each agrees with the reference, is imported when called, and says what is missing."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from ditfast.kernels import OPS, parity
from ditfast.kernels.peers import PeerError, as_backend, peers_of

ROOT = Path(__file__).parents[2]
SPECS = {spec.name: spec for spec in OPS}
PEERS = [
    pytest.param(spec, name, id=f"{spec.name}-{name}", marks=[pytest.mark.full] if name == "compile" else [])
    for spec in OPS
    for name in peers_of(spec)
]


def verdicts(spec, name, case, device, generator):
    """In float32, since the budgets of lower dtypes leave no room for the roundings between a peer's several passes."""
    dtype = torch.bfloat16 if spec.mutates else torch.float32
    truth = parity.truth(spec, spec.make_inputs(case, dtype, device, generator), generator)
    return replace(truth, spec=as_backend(spec, peers_of(spec)[name])).judge(name)


@pytest.mark.parametrize(("spec", "name"), PEERS)
def test_each_peer_that_is_here_agrees_with_the_reference(spec, name, device, generator):
    if name == "liger-kernel" and device == "cpu":
        pytest.skip("its kernels do not run in the interpreter")
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
        ("adaln_modulate", "liger-kernel", "liger_kernel", r"pip install 'liger-kernel"),
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


class ModulatedNorm:
    """What Liger's function computes, in PyTorch."""

    @staticmethod
    def apply(x, weight, scale, shift, eps, offset, casting_mode, in_place):
        assert (offset, casting_mode, in_place) == (0.0, "gemma", False)
        y = torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps) * (1 + scale.unsqueeze(1))
        return y if shift is None else y + shift.unsqueeze(1)


def test_liger_is_given_the_norm_that_it_has_and_refuses_others(device, generator, monkeypatch):
    module = ModuleType("liger_kernel.ops.modulated_rms_norm")
    module.LigerModulatedRMSNormFunction = ModulatedNorm
    for name in ("liger_kernel", "liger_kernel.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    spec, fits = SPECS["adaln_modulate"], 0
    for case in spec.cases:
        if case.kwargs.get("norm") == "rms" and "scale" not in case.absent:
            found = verdicts(spec, "liger-kernel", case, device, generator)
            fits += all(verdict.ok for verdict in found)
        else:
            with pytest.raises(PeerError, match="norm='rms', with a scale"):
                verdicts(spec, "liger-kernel", case, device, generator)
    assert fits >= 4


def multi_tensor_adam(chunk, noop, lists, lr, beta1, beta2, eps, step, mode, bias_correction, decay):
    """What apex's kernel computes, in PyTorch."""
    assert mode == bias_correction == 1 and len({t.dtype for tensors in lists for t in tensors}) == 1
    for g, w, m, v in zip(*lists, strict=True):
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        update = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps)
        w.sub_(lr * (update + decay * w))


@pytest.mark.parametrize("case", SPECS["adamw_ema"].cases[:5], ids=lambda case: case.name)
def test_apex_is_called_with_the_groups_that_its_kernel_takes(case, device, generator, monkeypatch):
    launcher, kernels = ModuleType("apex.multi_tensor_apply"), ModuleType("amp_C")
    launcher.multi_tensor_applier = lambda kernel, noop, lists, *args: kernel(65536, noop, lists, *args)
    kernels.multi_tensor_adam = multi_tensor_adam
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.multi_tensor_apply", launcher)
    monkeypatch.setitem(sys.modules, "amp_C", kernels)
    found = verdicts(SPECS["adamw_ema"], "apex", case, device, generator)
    assert all(verdict.ok for verdict in found), [verdict for verdict in found if not verdict.ok]


def test_importing_the_kernels_imports_no_peer():
    code = "import sys, ditfast.kernels; print([m for m in ('liger_kernel', 'apex', 'amp_C') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
