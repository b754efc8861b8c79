"""`accelerate` on other people's models: the same model, to the kernels' budgets, whatever is done to it around."""

import copy
import io
import pickle

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import ditfast
from ditfast.acceleration import FORMS
from ditfast.acceleration.swap import Swapped
from ditfast.kernels import OPS
from ditfast.kernels._op import recording_calls
from ditfast.kernels.parity import judge

FORM_OPS = {op for form in FORMS for op in form.ops}
TRITON = {spec.name: "triton" for spec in OPS if "triton" in spec.op.backends and spec.name in FORM_OPS}


def exact(model):
    """A float64 copy whose sinusoids are in float64 too, which neither model computes them in."""
    model = copy.deepcopy(model).double()

    def sinusoid(t, divisor):
        angles = t[:, None].double() * 10000.0 ** (-torch.arange(128, dtype=torch.float64) / divisor)
        return torch.cat([angles.cos(), angles.sin()], dim=1)

    for module in model.modules():
        if hasattr(module, "downscale_freq_shift"):
            module.forward = lambda t: sinusoid(t, 127)
        elif hasattr(module, "frequency_embedding_size"):
            module.forward = lambda t, mlp=module.mlp: mlp(sinusoid(t, 128))
    return model


def results(subject, model, dtype=None):
    """The output in training mode, and the gradients of all weights."""
    torch.manual_seed(0)  # for the labels that are dropped
    model.train().zero_grad()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        out = subject.run(model)
    out.double().square().mean().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach()} | grads


def assert_within_budgets(subject, fused, eager):
    truth = results(subject, exact(subject.model))
    # A bias of the keys alone has no gradient, since softmax cancels it: nothing but rounding to compare.
    truth = {name: value for name, value in truth.items() if not name.endswith("to_k.bias")}
    verdicts = judge(fused, eager, truth, library=True)
    assert len(verdicts) > 20
    assert [verdict for verdict in verdicts if not verdict.ok] == []


def accelerated(subject):
    """A fused copy; the subject stays as it is."""
    model = copy.deepcopy(subject.model)
    ditfast.accelerate(model)
    return model


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_outputs_and_gradients_are_within_the_kernels_budgets(subject, dtype):
    eager = results(subject, subject.model.to(dtype))
    assert_within_budgets(subject, results(subject, accelerated(subject)), eager)


def test_autocast(subject):
    eager = results(subject, subject.model, torch.bfloat16)
    assert_within_budgets(subject, results(subject, accelerated(subject), torch.bfloat16), eager)


def test_norms_write_what_the_linears_read(subject):
    """Under autocast the linear would otherwise round the float32 result of the norm in another pass."""
    ditfast.accelerate(subject.model)
    seen = []
    subject.block().get_submodule(subject.called).register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        subject.run()
    subject.run()
    assert seen == [torch.bfloat16, torch.float32]


def test_on_triton_kernels(subject):
    eager = results(subject, subject.model)
    report = ditfast.accelerate(subject.model, backend=TRITON)
    assert {op: report.backends[op] for op in TRITON if op in report.backends}.items() <= TRITON.items()
    with recording_calls() as calls:
        fused = results(subject, subject.model)
    assert {"adaln_modulate", "gate_residual_adaln_modulate", "gate_residual"} <= {
        op for op, backend in calls if backend == "triton"
    }
    ditfast.restore(subject.model)
    assert_within_budgets(subject, fused, eager)


def test_the_model_keeps_its_parameters_and_state_dict(subject):
    modules, parameters = list(subject.model.modules()), dict(subject.model.named_parameters())
    state, attributes = subject.model.state_dict(), [set(vars(module)) for module in modules]
    ditfast.accelerate(subject.model)
    assert all(a is b for a, b in zip(subject.model.modules(), modules, strict=True))
    assert [(n, id(p)) for n, p in subject.model.named_parameters()] == [(n, id(p)) for n, p in parameters.items()]
    assert [set(vars(module)) for module in modules] == attributes
    assert list(subject.model.state_dict()) == list(state)
    assert isinstance(subject.block(), Swapped)


def test_state_dicts_travel_both_ways(subject):
    expected = subject.run()
    fused = accelerated(subject)
    for parameter in subject.model.parameters():
        nn.init.zeros_(parameter)
    subject.model.load_state_dict(fused.state_dict())
    assert torch.equal(subject.run(), expected)
    fused.load_state_dict(subject.model.state_dict())
    torch.testing.assert_close(subject.run(fused), expected, rtol=1e-4, atol=1e-4)


def test_restore_undoes_it_exactly(subject):
    classes, expected, text = [type(m) for m in subject.model.modules()], subject.run(), repr(subject.model)
    report = ditfast.accelerate(subject.model)
    assert repr(subject.model) != text
    assert ditfast.restore(subject.model) == len(report.taken) > 2
    assert [type(m) for m in subject.model.modules()] == classes
    assert repr(subject.model) == text
    assert torch.equal(subject.run(), expected)
    assert ditfast.restore(subject.model) == 0


def train(subject, model, optimizer, steps=4):
    torch.manual_seed(1)
    losses = []
    for _ in range(steps):
        loss = (subject.run(model) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_training_by_an_optimizer_made_before(subject):
    plain = copy.deepcopy(subject.model).train()
    expected = train(subject, plain, torch.optim.AdamW(plain.parameters(), 1e-3))
    optimizer = torch.optim.AdamW(subject.model.train().parameters(), 1e-3)
    ditfast.accelerate(subject.model)
    losses = train(subject, subject.model, optimizer)
    assert losses == pytest.approx(expected, rel=1e-4)
    assert losses[-1] < 0.9 * losses[0]


def test_copies_and_pickles_stay_fused(subject):
    ditfast.accelerate(subject.model)
    expected = subject.run()
    file = io.BytesIO()
    torch.save(subject.model, file)
    file.seek(0)
    copies = (
        copy.deepcopy(subject.model),
        pickle.loads(pickle.dumps(subject.model)),
        torch.load(file, weights_only=False),
    )
    for model in copies:
        assert isinstance(model.get_submodule(f"{subject.blocks}.0"), Swapped)
        assert next(model.parameters()) is not next(subject.model.parameters())
        assert torch.equal(subject.run(model), expected)
        assert ditfast.restore(model) > 2
    assert isinstance(subject.block(), Swapped)


def test_compiles_without_graph_breaks(subject):
    report = ditfast.accelerate(subject.model)
    expected = results(subject, subject.model)
    subject.model.zero_grad()
    compiled = torch.compile(subject.model, backend="aot_eager", fullgraph=True)
    subject.model.train()
    torch.manual_seed(0)
    out = subject.run(compiled)
    out.double().square().mean().backward()
    torch.testing.assert_close(out, expected.pop("out"))
    for name, parameter in subject.model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name])
    assert report.check(*subject.args, **subject.kwargs)


def test_blocks_that_were_compiled_before(subject):
    """One by one, as `block.compile()` does it."""
    graphs = []
    for block in subject.model.get_submodule(subject.blocks):
        block.compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward, fullgraph=True)
    expected, before = subject.run(), len(graphs)
    report = ditfast.accelerate(subject.model)
    torch.testing.assert_close(subject.run(), expected, rtol=1e-4, atol=1e-4)
    compiled = len(graphs)
    assert report.check(*subject.args, **subject.kwargs)
    assert before < compiled == len(graphs)


def test_hooks_see_what_they_saw(subject):
    """On blocks and on parts that are called, and on norms that the ops would bypass: their modules are called then."""
    seen = []
    names = (
        f"{subject.blocks}.0",
        *(f"{subject.blocks}.0.{part}" for part in (subject.called, subject.read, subject.norm)),
    )
    for name in names:
        part = subject.model.get_submodule(name)
        part.register_forward_hook(lambda module, args, out, name=name: seen.append((name, out)))
    expected = subject.run()
    before, seen[:] = dict(seen), []
    assert set(before) == set(names)
    ditfast.accelerate(subject.model)
    torch.testing.assert_close(subject.run(), expected, rtol=1e-4, atol=1e-4)
    assert set(dict(seen)) == set(names)
    for name, out in seen:
        torch.testing.assert_close(out, before[name], rtol=1e-4, atol=1e-4)


def test_hooks_that_come_later(subject):
    report = ditfast.accelerate(subject.model)
    expected, seen = subject.run(), []
    norm = subject.block().get_submodule(subject.norm)
    handle = norm.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(subject.run(), expected, rtol=1e-4, atol=1e-4)
    assert seen == [1]
    with pytest.raises(AssertionError, match=rf"{subject.blocks}\.0 .*ran no op, expected .*gate_residual"):
        report.check(*subject.args, **subject.kwargs)
    handle.remove()
    assert report.check(*subject.args, **subject.kwargs)


class LowRank(nn.Module):
    """As LoRA wraps a linear."""

    def __init__(self, base):
        super().__init__()
        self.base, self.down = base, nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("when", ("before", "after"))
@pytest.mark.parametrize("which", ("called", "read"))
def test_wrapped_linears_are_called(subject, when, which):
    plain = copy.deepcopy(subject.model)
    if when == "after":
        ditfast.accelerate(subject.model)
    for model in (plain, subject.model):
        torch.manual_seed(0)
        name = f"{subject.blocks}.1.{getattr(subject, which)}"
        model.set_submodule(name, LowRank(model.get_submodule(name)))
    report = ditfast.accelerate(subject.model)
    assert any("LowRank" in reason for reason in report.left.values()) == (which == "read")
    fused, expected = results(subject, subject.model), results(subject, plain)
    assert fused.keys() == expected.keys()
    assert fused[f"{name}.up.weight"].abs().max() > 0
    for key, value in expected.items():
        torch.testing.assert_close(fused[key], value, rtol=1e-3, atol=1e-4 * value.abs().max().item() + 1e-8, msg=key)


def test_a_model_without_memory(subject):
    """On meta there are no weights to compare, and none are needed."""
    model = copy.deepcopy(subject.model).to("meta")
    assert len(ditfast.accelerate(model).taken) == len(ditfast.accelerate(subject.model).taken)
    model.to_empty(device="cpu").load_state_dict(subject.model.state_dict())
    for name, buffer in subject.model.named_buffers():
        model.get_buffer(name).copy_(buffer)
    assert torch.equal(subject.run(model), subject.run())


def test_looking_at_a_model_changes_nothing(subject):
    """Nothing is drawn, no gradient appears, no hook fires, no weight moves."""
    seen = []
    for module in (subject.model, subject.block(), subject.block().get_submodule(subject.called)):
        module.register_forward_hook(lambda *_: seen.append(1))
    state = copy.deepcopy(subject.model.state_dict())
    torch.manual_seed(3)
    rng = torch.get_rng_state()
    with torch.inference_mode():
        report = ditfast.accelerate(subject.model)
    assert torch.equal(torch.get_rng_state(), rng)
    assert seen == []
    assert all(p.grad is None for p in subject.model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in subject.model.state_dict().items())
    assert report.taken


def test_a_wrapped_model(subject):
    class Wrapper(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.module = model

        def forward(self, *args, **kwargs):
            return self.module(*args, **kwargs)

    expected = subject.run()
    wrapper = Wrapper(subject.model)
    report = ditfast.accelerate(wrapper)
    assert f"module.{subject.blocks}.0" in {part.path for part in report.taken}
    torch.testing.assert_close(subject.run(wrapper), expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def process_group(tmp_path):
    """One process, all by itself."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("first", ("accelerate", "shard"))
def test_sharded_models(subject, process_group, first):
    """fully_shard derives a class from the module's: whichever comes first, both work, and only the last is undone."""
    expected = results(subject, subject.model)
    if first == "accelerate":
        ditfast.accelerate(subject.model)
    for block in subject.model.get_submodule(subject.blocks):
        fully_shard(block, reshard_after_forward=False)  # diffusers reads weights of its first block outside of it
    fully_shard(subject.model)
    if first == "shard":
        report = ditfast.accelerate(subject.model)
        assert "the weight of" in report.left[f"{subject.blocks}.0.{subject.read.partition('.')[0]}"]
        assert report.check(*subject.args, **subject.kwargs)
    fused = results(subject, subject.model)
    for name, value in expected.items():
        result = fused[name].full_tensor() if isinstance(fused[name], DTensor) else fused[name]
        torch.testing.assert_close(result, value, rtol=1e-3, atol=1e-4 * value.abs().max().item() + 1e-8, msg=name)
    if first == "accelerate":
        with pytest.raises(ValueError, match=rf"{subject.blocks}\.0 was made a FSDP\w+ after accelerate"):
            ditfast.restore(subject.model)
    else:
        assert ditfast.restore(subject.model) == len(report.taken)
    assert isinstance(subject.block(), Swapped) == (first == "accelerate")


def test_a_batch_of_one(subject):
    cut = subject._replace(
        args=tuple(a[:1] for a in subject.args), kwargs={k: v[:1] for k, v in subject.kwargs.items()}
    )
    torch.testing.assert_close(cut.run(accelerated(subject)), cut.run(), rtol=1e-4, atol=1e-4)


def test_long_timesteps(subject):
    """At 999 rad fp32 rounds the angles themselves, by 6e-5: both are as far from the exact sinusoid."""
    late = torch.tensor([997, 998, 999])
    args = (subject.args[0], late, *subject.args[2:]) if len(subject.args) > 1 else subject.args
    kwargs = subject.kwargs | ({"timestep": late} if subject.kwargs else {})
    subject = subject._replace(args=args, kwargs=kwargs)
    truth = subject.run(exact(subject.model)).detach()
    for model in (subject.model, accelerated(subject)):
        assert (subject.run(model) - truth).abs().max() < 1e-4 * truth.abs().max()
