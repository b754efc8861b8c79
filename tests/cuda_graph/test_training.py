"""CUDA graphs of functions and training steps: replays do what calls would, and what a graph cannot hold is refused."""

import pytest
import torch

from ditfast.config import ConfigError
from ditfast.cuda_graph import WARMUP, CudaGraph, check_cuda_graph
from ditfast.distributed import World
from ditfast.layers import DiT
from ditfast.train import Trainer
from tests.cuda_graph.stand_in import DEVICE, GPU, Stream


class TestCudaGraph:
    def test_replays_do_what_calls_would(self):
        state, calls = torch.zeros(3, device=DEVICE), []

        def step(x, scale):
            calls.append(1)
            state.add_(x * scale)
            return {"sum": state.sum(), "both": (x + 1, state * 2)}

        graph, expected = CudaGraph(step, "option", DEVICE), torch.zeros(3, device=DEVICE)
        for i in range(WARMUP + 4):
            x, scale = torch.full((3,), float(i), device=DEVICE), torch.full((1,), 2.0**-i, device=DEVICE)
            expected += x * scale
            out = graph(x, scale)
            x.fill_(-1), scale.fill_(-1)  # the caller's to do with as it likes
            assert torch.equal(state, expected), i
            assert out["sum"] == expected.sum() and torch.equal(out["both"][1], expected * 2)
            assert torch.equal(out["both"][0], torch.full((3,), i + 1.0, device=DEVICE))
        assert len(calls) == WARMUP + 1

    def test_inputs_and_results_outlive_the_next_replay(self):
        graph = CudaGraph(lambda x: x * 2, "option", DEVICE)
        inputs = [torch.full((2,), float(i), device=DEVICE) for i in range(WARMUP + 3)]
        results = [graph(x) for x in inputs]
        assert [int(r[0]) for r in results] == [2 * i for i in range(WARMUP + 3)]
        assert [int(x[0]) for x in inputs] == list(range(WARMUP + 3))

    def test_each_shape_and_dtype_has_its_graph(self):
        graph = CudaGraph(lambda x: x + 1, "option", DEVICE)
        for _ in range(WARMUP + 2):
            for x in (torch.ones(2), torch.ones(3), torch.ones(2, dtype=torch.float64)):
                out = graph(x.to(DEVICE))
                assert out.shape == x.shape and out.dtype == x.dtype and bool((out == 2).all())
        assert len(graph._recorded) == 3

    def test_more_shapes_than_are_kept(self):
        graph = CudaGraph(lambda x: x + 1, "sample.cuda_graph", DEVICE, max_shapes=1)
        graph(torch.ones(2, device=DEVICE))
        with pytest.raises(ConfigError, match=r"sample.cuda_graph: inputs of shapes \(3,\) need graph 2, and 1 can be"):
            graph(torch.ones(3, device=DEVICE))

    def test_what_waits_cannot_be_recorded(self):
        graph, x = CudaGraph(lambda x: x * float(x.sum()), "train.cuda_graph", DEVICE), torch.ones(2, device=DEVICE)
        for _ in range(WARMUP):
            graph(x)
        with pytest.raises(ConfigError, match="train.cuda_graph: the recording failed: .*; leave the option off"):
            graph(x)

    @pytest.mark.skipif(GPU, reason="of the stand-in")
    def test_numbers_of_python_stay_what_they_were(self):
        """Without this the tests of the training step could not fail."""
        count = iter(range(99))
        graph = CudaGraph(lambda x: x * 0 + next(count), "option", DEVICE)
        assert [int(graph(torch.ones(1))) for _ in range(6)] == [0, 1, 2, 3, 3, 3]

    def test_each_form_has_its_graph(self):
        graph, x = CudaGraph(lambda x, form: x + form, "option", DEVICE), torch.ones(2, device=DEVICE)
        for _ in range(WARMUP + 2):
            assert [int(graph(x, form=form)[0]) for form in (1, 2)] == [2, 3]
        assert len(graph._recorded) == 2

    @pytest.mark.skipif(GPU, reason="of the stand-in")
    def test_streams_wait_for_each_other(self):
        graph = CudaGraph(lambda x: x + 1, "option", DEVICE)
        graph(torch.ones(1))
        assert Stream.events == ["side waits for current", "current waits for side"]


class TestRefusals:
    @pytest.fixture
    def model(self):
        return DiT(8, 2, 4, hidden_size=32, depth=1, num_heads=2, num_classes=5)

    def test_without_a_gpu(self, model):
        with pytest.raises(ConfigError, match="train.cuda_graph needs a CUDA device, and this run is on cpu; leave it"):
            check_cuda_graph("train.cuda_graph", torch.device("cpu"), model)

    def test_several_processes(self, model):
        with pytest.raises(ConfigError, match="runs on one process, and this run has 4.*or start one process"):
            check_cuda_graph("train.cuda_graph", torch.device("cuda"), model, world_size=4)

    @pytest.mark.parametrize("add, named", [
        (lambda m: m.register_forward_pre_hook(print), "the model has hooks"),
        (lambda m: m.blocks[0].attn.register_full_backward_hook(print), "blocks.0.attn has hooks"),
        (lambda m: m.blocks[0].mlp.fc1.weight.register_hook(print), "blocks.0.mlp.fc1.weight has hooks"),
    ])  # fmt: skip
    def test_hooks(self, add, named, model):
        check_cuda_graph("train.cuda_graph", torch.device("cuda"), model)
        add(model)
        with pytest.raises(ConfigError, match=f"train.cuda_graph: {named}, whose Python would run once"):
            check_cuda_graph("train.cuda_graph", torch.device("cuda"), model)

    def test_torch_compile_with_graphs_of_its_own(self, model):
        check_cuda_graph("train.cuda_graph", torch.device("cuda"), model, compiled=True)
        message = "torch.compile is set to record CUDA graphs of its own.*turn one of them"
        # Not monkeypatch, which would leave the option deleted.
        with torch._inductor.config.patch({"triton.cudagraphs": True}), pytest.raises(ConfigError, match=message):
            check_cuda_graph("train.cuda_graph", torch.device("cuda"), model, compiled=True)

    @pytest.mark.parametrize("options", [
        {"train.cuda_graph": True}, {"sample.cuda_graph": True, "train.sample_every": 2}
    ], ids=str)  # fmt: skip
    def test_at_the_start_of_a_run(self, options, tiny_run):
        with pytest.raises(ConfigError, match="cuda_graph needs a CUDA device, and this run is on cpu"):
            Trainer(tiny_run(overrides=options), World(0, 1, torch.device("cpu")))


@pytest.fixture
def stepped(tiny_run, allowed):
    """make(overrides, steps) -> the trainer of a run after that many steps, closed."""

    def make(name, overrides, steps=WARMUP + 4, spoil=None):
        given = {"model.hidden_size": 16, "model.depth": 2, "train.batch_size": 4, "device": str(DEVICE)} | overrides
        trainer = Trainer(tiny_run(name, given), World(0, 1, DEVICE))
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for master in trainer.optimizer.masters.values():
                master.copy_(0.1 * torch.randn(master.shape, generator=generator))
            trainer.optimizer._refresh(trainer.optimizer.masters)
        try:
            for step in range(steps):
                if spoil:
                    spoil(trainer, step)
                trainer.step()
        finally:
            trainer.close()
        return trainer

    return make


def everything(trainer):
    """All that training carries from step to step, and what it logs."""
    groups = trainer.optimizer.state_tensors() | {"low": dict(trainer.model.named_parameters())}
    state = {f"{group}/{name}": t for group, named in groups.items() for name, t in named.items()}
    scale = {"scale": trainer.scaler._scale} if trainer.scaler.is_enabled() else {}
    return state | scale | {"losses": trainer.losses.sums, "norm": trainer.norm, "overflow": trainer.first_overflow}


def assert_same_bits(ours, theirs):
    ours, theirs = everything(ours), everything(theirs)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


class TestTraining:
    @pytest.mark.parametrize("options", [
        {"train.recompute": "none"},
        {"train.recompute": "ops", "optim.warmup_steps": 6, "optim.schedule": "cosine", "optim.ema_warmup": True},
        {"train.recompute": "mlp", "train.accumulate": 2, "optim.clip_norm": 0.5, "train.precision": "bf16"},
        {"train.recompute": "block", "train.precision": "bf16-fast", "optim.ema_rates": [0.5, 0.9]},
        {"train.precision": "fp16", "optim.weight_decay": 0.1, "model.class_dropout_prob": 0.0},
        {"model.block": "cross_attention", "diffusion.timestep_sampler": "loss-second-moment"},
    ], ids=str)  # fmt: skip
    def test_steps_are_the_same_to_the_bit(self, options, stepped):
        plain, replayed = (stepped(str(on), options | {"train.cuda_graph": on}) for on in (False, True))
        assert isinstance(replayed.learn, CudaGraph) and len(replayed.learn._recorded) == 1
        assert all(torch.isfinite(t).all() for t in everything(replayed).values())
        assert_same_bits(replayed, plain)

    def test_an_overflow_in_a_replay_is_skipped_and_lowers_the_scale(self, stepped):
        def spoil(trainer, step):
            if step == WARMUP + 2:
                trainer.scaler._scale.fill_(2.0**20)

        options = {"train.precision": "fp16"}
        plain, replayed = (
            stepped(str(on), options | {"train.cuda_graph": on}, WARMUP + 8, spoil) for on in (False, True)
        )
        assert replayed.scaler.get_scale() < 2.0**20 and replayed.norm.isfinite()
        assert_same_bits(replayed, plain)

    def test_weights_are_the_recorded_ones_after_an_ema_was_in_their_place(self, stepped):
        def swap(trainer, step):
            with trainer.optimizer.ema_weights(None):
                pass

        plain, replayed = (stepped(str(on), {"train.cuda_graph": on}, spoil=swap) for on in (False, True))
        assert_same_bits(replayed, plain)
