"""Masters, decay groups, clipping and averages do what their formulas say, and the swap of weights leaves no trace."""

from functools import partial

import pytest
import torch
from torch import nn

from ditfast import kernels
from ditfast.config import PRECISIONS, OptimConfig
from ditfast.layers import DiT
from ditfast.optimizer import AdamWEMA

MODEL = {
    "input_size": 8,
    "patch_size": 4,
    "in_channels": 1,
    "hidden_size": 16,
    "depth": 1,
    "num_heads": 2,
    "num_classes": 3,
}


def made(precision="fp32", **options):
    """A small DiT with every weight random, and its optimizer."""
    torch.manual_seed(0)
    model = DiT(**MODEL)
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.1)
    policy = PRECISIONS[precision]
    fp32 = {name: p.detach().clone() for name, p in model.named_parameters()}
    return policy.apply(model), AdamWEMA(model, OptimConfig(**options), policy, fp32), fp32


def set_gradients(model, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = (scale * torch.randn(p.shape, generator=generator)).to(p.dtype)


def update(model, optimizer, step, **gradients):
    set_gradients(model, step, **gradients)
    optimizer.schedule(step)
    optimizer.update(optimizer.gradient_norm())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_dtypes_are_what_the_policy_says(precision):
    policy = PRECISIONS[precision]
    model, optimizer, _ = made(precision, ema_rates=[0.9])
    update(model, optimizer, 0)
    assert {p.dtype for p in model.parameters()} == {policy.params}
    assert model.stream_dtype is policy.stream
    assert {m.dtype for m in optimizer.masters.values()} == {policy.optimizer} == {torch.float32}
    assert {e.dtype for e in optimizer.emas[0.9].values()} == {policy.ema} == {torch.float32}
    moments = {moment.dtype for named in optimizer.moments.values() for moment in named.values()}
    assert moments == {policy.optimizer}


@pytest.mark.parametrize("precision", ["bf16-fast", "fp16-fast"])
def test_low_precision_weights_are_the_rounded_masters(precision):
    """Masters start from the unrounded values and keep updates that are lost in the low precision."""
    model, optimizer, fp32 = made(precision, lr=1e-6)
    assert all(torch.equal(m, fp32[name]) for name, m in optimizer.masters.items())
    update(model, optimizer, 0)
    for name, p in optimizer.parameters.items():
        assert not torch.equal(optimizer.masters[name], fp32[name])
        assert torch.equal(p, optimizer.masters[name].to(p.dtype))


def test_weight_decay_spares_biases_and_tables():
    model, optimizer, before = made(lr=0.1, weight_decay=0.5, decay="matrices")
    update(model, optimizer, 0, scale=0.0)
    decayed = {n for n, m in optimizer.masters.items() if not torch.equal(m, before[n])}
    assert decayed == {n for n in optimizer.masters if n.endswith("weight")} - {"y_embedder.embedding_table.weight"}
    for name in decayed:
        torch.testing.assert_close(optimizer.masters[name].detach(), before[name] * (1 - 0.1 * 0.5))


def test_decay_all_is_for_all():
    model, optimizer, before = made(lr=0.1, weight_decay=0.5, decay="all")
    update(model, optimizer, 0, scale=0.0)
    assert all(not torch.equal(m, before[name]) for name, m in optimizer.masters.items())


def test_step_is_adamw():
    """Three steps against the update of Loshchilov and Hutter, written out in float64."""
    model, optimizer, before = made(lr=1e-2, beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.1)
    name = "blocks.0.mlp.fc1.weight"
    w, m, v = before[name].double(), 0.0, 0.0
    for step in range(3):
        set_gradients(model, step)
        g = optimizer.parameters[name].grad.double()
        update(model, optimizer, step)
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g**2
        direction = (m / (1 - 0.8 ** (step + 1))) / ((v / (1 - 0.95 ** (step + 1))).sqrt() + 1e-6)
        w = w - 1e-2 * 0.1 * w - 1e-2 * direction
    torch.testing.assert_close(optimizer.masters[name].detach().double(), w, atol=1e-6, rtol=1e-6)


def applied_factor(optimizer, monkeypatch, *inverse_scale):
    """What an update multiplies the gradients by, and their norm."""
    taken = []
    monkeypatch.setattr(kernels, "adamw_ema", lambda *lists, grad_factor, **scalars: taken.append(grad_factor))
    norm = optimizer.gradient_norm(*inverse_scale)
    optimizer.update(norm, *inverse_scale)
    return taken[0], norm


@pytest.mark.parametrize("precision", ["fp32", "bf16-fast", "fp16-fast"])
@pytest.mark.parametrize("scale, clipped", [(1.0, True), (1e-3, False)])
@pytest.mark.parametrize("loss_scale", [1.0, 32.0])
def test_clipping_bounds_the_norm(precision, scale, clipped, loss_scale, monkeypatch):
    model, optimizer, _ = made(precision, clip_norm=0.5)
    set_gradients(model, 0, scale * loss_scale)
    before = torch.cat([p.grad.double().flatten() for p in optimizer.parameters.values()]) / loss_scale
    factor, norm = applied_factor(optimizer, monkeypatch, torch.tensor(1 / loss_scale))
    torch.testing.assert_close(norm, before.norm().float())
    expected = (0.5 / before.norm() if clipped else torch.ones((), dtype=torch.float64)) / loss_scale
    torch.testing.assert_close(factor[0].double(), expected, atol=0, rtol=1e-5)


def test_no_clipping_by_default(monkeypatch):
    model, optimizer, _ = made()
    set_gradients(model, 0, 100.0)
    assert applied_factor(optimizer, monkeypatch)[0] is None


@pytest.mark.parametrize("precision", ["fp32", "bf16-fast"])
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_gradient_that_is_not_finite_changes_nothing(precision, bad, backend, monkeypatch):
    monkeypatch.setattr(kernels, "adamw_ema", partial(kernels.adamw_ema, backend=backend))
    model, optimizer, _ = made(precision, lr=0.1, ema_rates=[0.5])
    update(model, optimizer, 0)
    weights = {n: p.detach().clone() for n, p in optimizer.parameters.items()}
    before = {group: {n: t.clone() for n, t in named.items()} for group, named in optimizer.state_tensors().items()}
    set_gradients(model, 1)
    optimizer.parameters["x_embedder.proj.bias"].grad[0] = bad
    assert optimizer.update(optimizer.gradient_norm()).item() == 1
    after = optimizer.state_tensors()
    assert all(torch.equal(t, after[group][n]) for group, named in before.items() for n, t in named.items())
    assert all(torch.equal(p, weights[n]) for n, p in optimizer.parameters.items())


@pytest.mark.parametrize("precision", ["fp32", "bf16-fast"])
def test_kernel_and_reference_train_alike(precision, monkeypatch):
    plain, states = kernels.adamw_ema, []
    for backend in ("torch", "triton"):
        monkeypatch.setattr(kernels, "adamw_ema", partial(plain, backend=backend))
        model, optimizer, _ = made(precision, lr=1e-2, ema_rates=[0.5, 0.9], weight_decay=0.1, clip_norm=1.0)
        for step in range(3):
            update(model, optimizer, step)
        states.append(optimizer.state_tensors())
    for group, named in states[0].items():
        for name, value in named.items():
            torch.testing.assert_close(states[1][group][name], value, atol=1e-6, rtol=1e-5)


def test_parameter_without_a_gradient_is_named():
    model, optimizer, _ = made()
    set_gradients(model, 0)
    optimizer.parameters["x_embedder.proj.bias"].grad = None
    with pytest.raises(ValueError, match="x_embedder.proj.bias has no gradient"):
        optimizer.gradient_norm()


@pytest.mark.parametrize("precision", ["fp32", "bf16-fast"])
@pytest.mark.parametrize("warmup", [False, True])
def test_ema_is_its_recurrence(precision, warmup):
    rates = [0.5, 0.9, 0.9999]
    model, optimizer, fp32 = made(precision, lr=1e-2, ema_rates=rates, ema_warmup=warmup)
    expected = {rate: {n: fp32[n].double() for n in optimizer.masters} for rate in rates}
    for step in range(4):
        update(model, optimizer, step)
        for rate in rates:
            r = min(rate, (1 + step) / (10 + step)) if warmup else rate
            for name, master in optimizer.masters.items():
                expected[rate][name] = r * expected[rate][name] + (1 - r) * master.detach().double()
    for rate in rates:
        for name, ema in optimizer.emas[rate].items():
            torch.testing.assert_close(ema.double(), expected[rate][name], atol=1e-7, rtol=1e-6)


def test_frozen_parameters_have_no_master_and_no_ema():
    _, optimizer, _ = made(ema_rates=[0.9])
    assert "pos_embed" not in optimizer.masters and "pos_embed" not in optimizer.emas[0.9]


@pytest.mark.parametrize("precision", ["fp32", "bf16-fast"])
@pytest.mark.parametrize("fails", [False, True])
def test_ema_weights_are_in_the_model_for_a_while(precision, fails):
    model, optimizer, _ = made(precision, lr=0.1, ema_rates=[0.5, 0.9])
    update(model, optimizer, 0)
    weights = {n: p.detach().clone() for n, p in optimizer.parameters.items()}
    emas = {rate: {n: e.clone() for n, e in ema.items()} for rate, ema in optimizer.emas.items()}
    try:
        with optimizer.ema_weights(0.9):
            for name, p in optimizer.parameters.items():
                assert torch.equal(p, emas[0.9][name].to(p.dtype)) and not torch.equal(p, weights[name])
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        assert fails
    assert all(torch.equal(p, weights[n]) for n, p in optimizer.parameters.items())
    assert all(torch.equal(e, emas[rate][n]) for rate, ema in optimizer.emas.items() for n, e in ema.items())
    assert all(m is p for n, p in optimizer.parameters.items() if (m := optimizer.masters[n]).dtype == p.dtype)


@pytest.mark.parametrize(
    "asked, rates, taken", [(None, [0.5, 0.9], 0.5), (0.9, [0.5, 0.9], 0.9), (0, [0.5], 0), (None, [], 0)]
)
def test_which_average_is_meant(asked, rates, taken):
    assert made(ema_rates=rates)[1].ema_rate(asked) == taken


@pytest.mark.parametrize("rates, kept", [([0.5], "0.5"), ([], "none")])
def test_an_average_that_is_not_kept(rates, kept):
    with (
        pytest.raises(ValueError, match=rf"ema 0.7: this run keeps EMAs of rates {kept}"),
        made(ema_rates=rates)[1].ema_weights(0.7),
    ):
        pass


class TestStateTensors:
    @pytest.mark.parametrize("precision", ["fp32", "bf16-fast"])
    def test_round_trip_continues_in_the_same_bits(self, precision):
        model, optimizer, _ = made(precision, ema_rates=[0.9])
        update(model, optimizer, 0)
        saved = {group: {n: t.clone() for n, t in named.items()} for group, named in optimizer.state_tensors().items()}
        other_model, other, _ = made(precision, ema_rates=[0.9])
        update(other_model, other, 7)
        other.load_state_tensors(saved)
        for step in (1, 2):
            update(model, optimizer, step)
            update(other_model, other, step)
        ours, theirs = optimizer.state_tensors(), other.state_tensors()
        assert ours.keys() == theirs.keys() == {"model", "ema-0.9", "optimizer"}
        assert all(torch.equal(t, theirs[group][n]) for group, named in ours.items() for n, t in named.items())
        pairs = zip(model.parameters(), other_model.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)

    @pytest.mark.parametrize("group, name, value, message", [
        ("ema-0.9", None, None, "the checkpoint has no group 'ema-0.9', only model, optimizer"),
        ("model", "x_embedder.proj.bias", None, "model/x_embedder.proj.bias: the checkpoint has nothing"),
        ("model", "x_embedder.proj.bias", torch.zeros(3), r"has \(3,\), this model \(16,\)"),
        ("optimizer", "nothing.weight:step", torch.zeros(()), "no parameter 'nothing.weight'"),
    ])  # fmt: skip
    def test_another_models_state(self, group, name, value, message):
        model, optimizer, _ = made(ema_rates=[0.9])
        update(model, optimizer, 0)
        groups = {group: dict(named) for group, named in optimizer.state_tensors().items()}
        if name is None:
            del groups[group]
        elif value is None:
            del groups[group][name]
        else:
            groups[group][name] = value
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_tensors(groups)
