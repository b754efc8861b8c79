"""The training loop: what a step computes, precisions, the loss scaler, recompute, compile, and where it starts."""

import argparse
import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch

from ditfast import checkpoint, convert, kernels, reference
from ditfast.build import build_model, predictor
from ditfast.config import PRECISIONS, ModelConfig
from ditfast.distributed import World
from ditfast.reproducibility import generator_for
from ditfast.train import Trainer, lr_factor, train
from tests.test_sit import SIT

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture
def trainer(tiny_run):
    """make(overrides) -> a Trainer that has not stepped yet; closed at the end."""
    opened = []

    def make(overrides=None, name=None):
        opened.append(Trainer(tiny_run(name or f"run{len(opened)}", overrides), ALONE))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


def weights(trainer):
    return {name: m.detach().clone() for name, m in trainer.optimizer.masters.items()}


def gradients(trainer):
    """The gradients of the trainer's next step, which is not applied."""
    kept = {}

    def keep():
        for name, p in trainer.optimizer.parameters.items():
            kept[name], p.grad = p.grad.float(), None
        return torch.zeros(()), torch.zeros(1)

    trainer._update = keep
    trainer.step()
    del trainer._update
    return kept


def randomize(trainer, std=0.1):
    """Random weights everywhere, since a new DiT's gates and last layer are zero and hide most gradients."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for master in trainer.optimizer.masters.values():
            master.copy_(std * torch.randn(master.shape, generator=generator))
        trainer.optimizer._refresh(trainer.optimizer.masters)
    return trainer


def records(config):
    return [json.loads(line) for line in (Path(config.out) / "log.jsonl").read_text().splitlines()]


def same_bits(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(v, theirs[n]) for n, v in ours.items())


def assert_close(ours, theirs, relative):
    """Equal up to rounding, measured against the whole: a gradient that is zero but for rounding has no digits."""
    ours, theirs = (torch.cat([v.flatten().double() for v in named.values()]) for named in (ours, theirs))
    assert (ours - theirs).norm() <= relative * theirs.norm()


class TestStep:
    @pytest.mark.parametrize("accumulate", [2, 4])
    @pytest.mark.parametrize("sampler", ["uniform", "loss-second-moment"])
    def test_accumulated_chunks_are_one_big_batch(self, accumulate, sampler, trainer):
        options = {"diffusion.timestep_sampler": sampler}
        one, many = (randomize(trainer(options | {"train.accumulate": k})) for k in (1, accumulate))
        assert_close(gradients(many), gradients(one), 1e-6)
        assert many.losses.sums.tolist() == pytest.approx(one.losses.sums.tolist(), rel=1e-6)

    def test_gradient_is_that_of_the_mean_loss(self, trainer, monkeypatch):
        """As the official loop has it, with labels dropped by hand."""
        run = randomize(trainer())
        x, y = next(run.loader)
        monkeypatch.setattr(run, "loader", iter([(x, y)]))
        t, _, noise, drop = run._draw(x.shape[1:])
        assert drop.any()
        found = gradients(run)
        terms = run.process.training_losses(
            lambda x, t, y: run.model.eval()(x, t, y), x, t, {"y": torch.where(drop, 10, y)}, noise=noise
        )
        names = list(run.optimizer.parameters)
        expected = torch.autograd.grad(terms["loss"].mean(), [run.optimizer.parameters[n] for n in names])
        assert_close(found, dict(zip(names, expected, strict=True)), 1e-6)

    def test_draws_of_a_step(self, trainer):
        run = trainer({"train.batch_size": 4096, "model.class_dropout_prob": 0.25})
        t, weights, noise, drop = run._draw(torch.Size([1, 2, 2]))
        assert t.min() >= 0 and t.max() < 1000 and abs(t.double().mean() - 499.5) < 30
        assert torch.equal(weights, torch.ones(4096)) and abs(drop.double().mean() - 0.25) < 0.03
        assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03
        again = run._draw(torch.Size([1, 2, 2]))
        assert all(torch.equal(a, b) for a, b in zip(again, (t, weights, noise, drop), strict=True))
        run.step_done += 1
        assert not torch.equal(run._draw(torch.Size([1, 2, 2]))[2], noise)

    def test_every_draw_has_its_own_stream(self, trainer, monkeypatch):
        """One stream for timesteps and noise would tie them together."""
        run, seeds = trainer(), []

        def spy(*args):
            seeds.append(generator_for(*args).initial_seed())
            return generator_for(*args)

        monkeypatch.setattr("ditfast.train.generator_for", spy)
        run._draw(torch.Size([1]))
        run.step_done += 1
        run._draw(torch.Size([1]))
        assert len(seeds) == len(set(seeds)) == 4

    def test_label_dropout_zero_trains(self, trainer):
        run = trainer({"model.class_dropout_prob": 0.0})
        run.step()
        assert run.model.y_embedder.embedding_table.num_embeddings == 10

    @pytest.mark.parametrize("block", ["adaln", "cross_attention", "in_context"])
    def test_other_blocks_train(self, block, trainer):
        run = trainer({"model.block": block})
        before = weights(run)
        run.step()
        run.step()
        moved = [name for name, value in weights(run).items() if not torch.equal(value, before[name])]
        assert len(moved) > len(before) / 2

    @pytest.mark.parametrize("options, terms", [
        ({}, {"loss", "mse", "vb"}),
        ({"model.learn_sigma": False}, {"loss", "mse"}),
        ({"diffusion.use_kl": True}, {"loss"}),
    ])  # fmt: skip
    def test_loss_types(self, options, terms, tiny_run):
        config = tiny_run(overrides={"train.steps": 2} | options)
        train(config)
        assert records(config)[0].keys() & {"loss", "mse", "vb"} == terms

    def test_clipping_bounds_the_applied_gradient(self, trainer, monkeypatch):
        run = randomize(trainer({"optim.clip_norm": 0.01}))
        applied = []

        def keep(weights, grads, *lists, grad_factor, **scalars):
            applied.append(torch.nn.utils.get_total_norm(grads) * grad_factor.item())

        monkeypatch.setattr(kernels, "adamw_ema", keep)
        run.step()
        assert run.last_norm > 0.02 and applied[0] == pytest.approx(0.01, rel=1e-4)


class TestSchedule:
    def test_warmup_then_constant(self, tiny_run):
        config = tiny_run(overrides={"optim.warmup_steps": 4, "train.steps": 8})
        assert [lr_factor(config, s) for s in range(8)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]

    def test_cosine_falls_to_zero(self, tiny_run):
        config = tiny_run(overrides={"optim.schedule": "cosine", "optim.warmup_steps": 2, "train.steps": 10})
        factors = [lr_factor(config, s) for s in range(11)]
        assert factors[:3] == [0.5, 1.0, 1.0] and factors[6] == pytest.approx(0.5) and factors[10] == pytest.approx(0)
        assert factors[2:] == sorted(factors[2:], reverse=True)

    def test_the_optimizer_gets_it(self, trainer):
        run = trainer({"optim.warmup_steps": 4, "optim.lr": 8e-3, "optim.weight_decay": 0.1})
        for expected in (2e-3, 4e-3):
            run.step()
            assert run.optimizer._lr.item() == pytest.approx(expected)


class TestPrecision:
    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_loss_falls(self, precision, tiny_run):
        config = tiny_run(overrides={"train.steps": 40, "train.log_every": 20, "train.precision": precision})
        train(config)
        first, last = (r["mse"] for r in records(config))
        assert last < 0.9 * first

    @pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
    def test_official_policies_are_autocast_of_the_reference(self, precision, tiny):
        """Twice the reference's own rounding error, against fp32, is what another order of roundings may cost."""
        policy = PRECISIONS[precision]
        torch.manual_seed(0)
        oracle = reference.DiT(**tiny).eval()
        for p in oracle.parameters():
            if p.requires_grad:
                torch.nn.init.normal_(p, std=0.1)
        model = build_model(
            ModelConfig(**{k: v for k, v in tiny.items() if k != "input_size"}, input_size=(8, 8), in_channels=4)
        )
        model.load_state_dict(oracle.state_dict())
        policy.apply(model).eval()
        x, t, y = torch.randn(8, 4, 8, 8), torch.randint(0, 1000, (8,)), torch.randint(0, 11, (8,))
        with torch.no_grad():
            exact = oracle.double()(x.double(), t, y)
            oracle.float()
            with torch.autocast("cpu", dtype=policy.compute, enabled=policy.compute is not torch.float32):
                theirs = oracle(x, t, y)
            ours = predictor(model, policy, torch.device("cpu"))(x, t, y=y)
        assert ours.dtype is torch.float32
        error, allowed = (ours - exact).norm() / exact.norm(), (theirs - exact).norm() / exact.norm()
        assert error <= 1.2 * allowed + 1e-6, (error, allowed)
        assert precision == "fp32" or error > 1e-5, "nothing was computed in low precision"

    @pytest.mark.parametrize("precision", ["bf16", "bf16-fast"])
    def test_stream_dtype(self, precision, trainer):
        run = trainer({"train.precision": precision})
        seen = {}
        run.model.blocks[1].register_forward_pre_hook(lambda _, args: seen.update(x=args[0].dtype))
        run.step()
        assert seen["x"] is PRECISIONS[precision].stream


class TestLossScaler:
    def test_its_start(self, trainer):
        scaler = trainer({"train.precision": "fp16"}).scaler
        assert (scaler.get_scale(), scaler.get_growth_factor(), scaler.get_backoff_factor()) == (65536.0, 2.0, 0.5)
        assert scaler.get_growth_interval() == 1000

    @pytest.mark.parametrize("precision", ["fp16", "fp16-fast"])
    def test_overflow_skips_the_update(self, precision, trainer):
        run = randomize(trainer({"train.precision": precision, "optim.clip_norm": 1.0}))
        run.step()
        scale = run.scaler.get_scale()
        before = {g: {n: t.clone() for n, t in named.items()} for g, named in run.optimizer.state_tensors().items()}
        low = {n: p.detach().clone() for n, p in run.model.named_parameters()}
        overflow(run)
        run.step()
        after = run.optimizer.state_tensors()
        assert all(same_bits(after[group], before[group]) for group in before)
        assert any(name.endswith(":step") for name in after["optimizer"])
        assert same_bits(dict(run.model.named_parameters()), low)
        assert run.scaler.get_scale() == scale / 2 and run.step_done == 2
        assert all(p.grad is None for p in run.optimizer.parameters.values())
        run.step()
        assert not same_bits(run.optimizer.state_tensors()["model"], before["model"])

    def test_importance_sampler_does_not_learn_from_an_overflow(self, trainer):
        run = trainer({"train.precision": "fp16", "diffusion.timestep_sampler": "loss-second-moment"})
        overflow(run)
        run.step()
        assert run.timesteps.state_dict()["counts"].sum() == 0
        run.step()
        assert run.timesteps.state_dict()["counts"].sum() == 16

    def test_endless_overflow_is_an_error(self, trainer):
        from ditfast.train import TrainingError

        run = trainer({"train.precision": "fp16"})
        run.scaler.load_state_dict(run.scaler.state_dict() | {"scale": 2.0**-14})
        overflow(run)
        with pytest.raises(TrainingError, match="fp16 overflows at any loss scale .* Use train.precision bf16"):
            run.step()

    def test_scale_is_undone(self, trainer):
        """The same gradients at any scale, as far as fp16 can tell."""
        runs = [randomize(trainer({"train.precision": "fp16"})) for _ in range(2)]
        runs[1].scaler.load_state_dict(runs[1].scaler.state_dict() | {"scale": 1024.0})
        for run in runs:
            run.step()
        assert runs[0].last_norm == pytest.approx(runs[1].last_norm, rel=1e-2)


@pytest.mark.parametrize("read", ["_log", "_save"])
def test_where_looking_costs_a_wait_the_bad_gradient_is_found_later(read, trainer):
    """As on a GPU: not applied all the same, and found before anything is written."""
    from ditfast.train import TrainingError

    run = randomize(trainer())
    run.checks_each_step = False
    before = weights(run)
    overflow(run)
    run.step()
    assert same_bits(weights(run), before)
    run.step()
    assert not same_bits(weights(run), before)
    with pytest.raises(TrainingError, match="the gradient at step 1 is not finite, so it was not applied"):
        getattr(run, read)()


def overflow(run):
    """Makes the next backward overflow in one weight's gradient."""
    handle = run.optimizer.parameters["x_embedder.proj.bias"].register_hook(
        lambda grad: [handle.remove(), torch.full_like(grad, math.inf)][1]
    )


class TestMemoryAndCompile:
    @pytest.mark.parametrize("policy", ["ops", "block:2"])
    def test_the_configured_policy_is_that_of_the_blocks(self, policy, trainer):
        model = trainer({"train.recompute": policy}).model
        assert [block.recompute for block in model.blocks] == ["ops", "block" if ":" in policy else "ops"]

    @pytest.mark.parametrize("backend, options", [
        ("aot_eager", {}),  # the whole graph, without a minute of C++ compilation
        ("aot_eager", SIT | {"transport.cosine_loss": True}),
        *(pytest.param("inductor", o, marks=pytest.mark.full) for o in (
            {}, {"train.precision": "bf16"}, {"train.recompute": "block:2"}, {"train.precision": "bf16-fast"},
        )),
    ])  # fmt: skip
    def test_compile_trains_alike(self, backend, options, tiny_run, monkeypatch):
        common = {"train.steps": 3, "train.log_every": 1, "model.depth": 1, "optim.eps": 1e-4} | options
        eager, compiled = tiny_run("eager", common), tiny_run("compiled", common | {"train.compile": True})
        train(eager)
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
        train(compiled)
        tolerance = 1e-5 if "train.precision" not in options else 2e-2
        for ours, theirs in zip(records(compiled), records(eager), strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=tolerance)
        assert (
            checkpoint.load(compiled.out).tensors["model"].keys() == checkpoint.load(eager.out).tensors["model"].keys()
        )


class TestStartingPoint:
    @pytest.mark.parametrize("form", ["bare", "wrapped", "safetensors"])
    def test_from_an_official_checkpoint(self, form, tiny_run, trainer, tmp_path):
        source = randomize(trainer()).model.state_dict()
        other = {name: 2 * value for name, value in source.items()}
        path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pt")
        if form == "safetensors":
            import safetensors.torch

            safetensors.torch.save_file(source, path)
        elif form == "bare":
            torch.save(source, path)
        else:
            args = argparse.Namespace(model="DiT-XL/2", num_classes=10)
            torch.save({"model": other, "ema": source, "opt": {"state": {}}, "args": args}, path)
        run = trainer({"train.init_from": str(path)})
        assert same_bits(weights(run), {n: source[n] for n in weights(run)})
        for ema in run.optimizer.emas.values():
            assert same_bits(ema, weights(run))

    def test_other_classes_get_a_new_table(self, trainer, tmp_path, caplog):
        source = randomize(trainer({"model.num_classes": 37})).model.state_dict()
        torch.save(source, tmp_path / "w.pt")
        with caplog.at_level("INFO", "ditfast"):
            run = trainer({"train.init_from": str(tmp_path / "w.pt")})
        assert "label table made anew for 10 classes (the checkpoint has 37)" in caplog.text
        label = "y_embedder.embedding_table.weight"
        state = weights(run)
        assert state[label].shape == (11, 32) and 0.015 < state[label].std() < 0.025
        assert all(torch.equal(v, source[n]) for n, v in state.items() if n != label)

    def test_a_run_that_has_begun_goes_on_instead(self, tiny_run, trainer, tmp_path):
        torch.save(randomize(trainer()).model.state_dict(), tmp_path / "w.pt")
        options = {"train.init_from": str(tmp_path / "w.pt")}
        train(tiny_run("begun", options | {"train.steps": 3}))
        resumed = trainer(options, name="begun")
        assert resumed.step_done == 3
        assert same_bits(weights(resumed), checkpoint.load(resumed.out).tensors["model"])

    def test_another_shape_is_refused(self, trainer, tmp_path):
        torch.save(trainer({"model.hidden_size": 16}).model.state_dict(), tmp_path / "w.pt")
        with pytest.raises(convert.ConvertError, match="the checkpoint does not fit the model"):
            trainer({"train.init_from": str(tmp_path / "w.pt")})


class TestSampleGrids:
    @pytest.mark.parametrize("precision", ["fp32", "bf16-fast"])
    @pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
    def test_are_written_and_change_nothing(self, precision, sampler, tiny_run):
        common = {"train.steps": 4, "train.precision": precision, "sample.sampler": sampler}
        plain, drawn = tiny_run("plain", common), tiny_run("drawn", common | {"train.sample_every": 2})
        train(plain)
        train(drawn)
        names = sorted(p.name for p in (Path(drawn.out) / "samples").iterdir())
        assert names == ["step-00000002.png", "step-00000004.png"]
        ours, theirs = (checkpoint.load(c.out).tensors for c in (drawn, plain))
        assert ours.keys() == theirs.keys() and all(same_bits(ours[group], theirs[group]) for group in ours)

    @pytest.mark.parametrize("options, message", [
        ({"model.class_dropout_prob": 0.0}, "guidance_scale 4.0 needs a null class"),
        ({"sample.steps": 150}, "ddim150"),
        ({"sample.ema": 0.5}, "ema 0.5: this run keeps EMAs of rates 0.9"),
    ])  # fmt: skip
    def test_what_cannot_be_drawn_is_refused_at_the_start(self, options, message, trainer):
        with pytest.raises(ValueError, match=message):
            trainer({"train.sample_every": 2} | options)
