"""CUDA graphs: replays do what calls would have done, and what a graph cannot hold is refused.

Where there is no GPU a stand-in records and replays the operators themselves. It has those properties of the real thing
that programs stumble over: a recording computes nothing, and replays use its memory and the numbers of then.
"""

import contextlib
import dataclasses
import math
from collections import Counter
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ditfast.config import PRECISIONS, ConfigError, ModelConfig, RunConfig, SampleConfig, TransportConfig
from ditfast.cuda_graph import WARMUP, CudaGraph, StepGraph, check_cuda_graph
from ditfast.diffusion import ClassifierFreeGuidance, create_diffusion, samplers
from ditfast.distributed import World
from ditfast.layers import DiT
from ditfast.sample import Network, cycle_labels, draw
from ditfast.train import Trainer

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
WAITS = ("_local_scalar_dense", "nonzero", "equal", "unique", "rand", "bernoulli", "normal")


def tensors(tree):
    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


class Recording(TorchDispatchMode):
    """The stand-in's capture: notes every operator, and takes back what it did."""

    def __init__(self):
        super().__init__()
        self.calls, self.before, self.own = [], {}, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, schema = func._schema.name.split("::")[1], func._schema
        if any(word in name for word in WAITS):
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs or {}))
        for i, argument in enumerate(schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for t in tensors(args[i] if i < len(args) else kwargs.get(argument.name)):
                    storage = t.untyped_storage()
                    if storage._cdata not in self.own:
                        self.before.setdefault(storage._cdata, (storage, storage.clone()))
        out = func(*args, **kwargs)
        made = [t.detach() for t in tensors(out)]
        if any(r.alias_info is not None for r in schema.returns):
            made = None if not any(r.alias_info.is_write for r in schema.returns if r.alias_info) else []
        else:
            self.own |= {t.untyped_storage()._cdata for t in made}
        if made is not None:  # views are there already
            self.calls.append((func, args, kwargs, made))
        return out

    def __exit__(self, *exception):
        super().__exit__(*exception)
        for storage, values in self.before.values():
            storage.copy_(values)
        for t in (t for call in self.calls for t in call[3]):
            if t.untyped_storage()._cdata in self.own:
                t.fill_(math.nan if t.is_floating_point() else 0)


class StandIn:
    """torch.cuda.CUDAGraph."""

    made: list = []

    def __init__(self):
        self.calls, self.replays = [], 0
        StandIn.made.append(self)

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for func, args, kwargs, out in self.calls:
            new = func(*args, **kwargs)
            for t, value in zip(out, tensors(new) if out else (), strict=True):
                t.copy_(value)


class Stream:
    """torch.cuda.Stream, which notes who waits for whom."""

    events: list = []

    def __init__(self, device=None):
        self.name = "side"

    def wait_stream(self, other):
        Stream.events.append(f"{self.name} waits for {other.name}")


@contextlib.contextmanager
def capture(graph, pool, stream, capture_error_mode):
    assert stream.name == "side" and capture_error_mode == "thread_local"
    with Recording() as recording:
        yield
    graph.calls = recording.calls


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    """Lets CUDA graphs be made on a machine without a GPU."""
    torch.set_num_threads(1)
    monkeypatch.setattr(StandIn, "made", [])
    monkeypatch.setattr(Stream, "events", [])
    if GPU:
        return
    current = Stream()
    current.name = "current"
    replaced = {
        "CUDAGraph": StandIn, "Stream": Stream, "graph": capture, "graph_pool_handle": object,
        "current_stream": lambda device: current, "stream": lambda stream: contextlib.nullcontext(),
    }  # fmt: skip
    for name, value in replaced.items():
        monkeypatch.setattr(torch.cuda, name, value)
    # Labels are looked at on a CPU only.
    monkeypatch.setattr("ditfast.layers.embed.check_labels", lambda labels, rows: None)


@pytest.fixture
def allowed(monkeypatch):
    """As if this were a GPU, for what refuses others."""
    if not GPU:
        for module in ("train", "sample"):
            monkeypatch.setattr(f"ditfast.{module}.check_cuda_graph", lambda *args, **kwargs: None)


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

    def test_in_sampling(self):
        with pytest.raises(ConfigError, match="sample.cuda_graph needs a CUDA device"):
            draw(dataclasses.replace(network(), device=torch.device("cpu")), config(cuda_graph=True), torch.tensor([0]))


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


def network(seed=0, **options):
    torch.manual_seed(seed)
    model = DiT(8, 2, 4, hidden_size=32, depth=1, num_heads=2, num_classes=5, **options)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    return Network(PRECISIONS["fp32"].apply(model.to(DEVICE)).eval(), PRECISIONS["fp32"], DEVICE)


def config(**options):
    return RunConfig(sample=SampleConfig(**{"sampler": "ddim", "steps": 7, "guidance_scale": 2.0} | options))


class TestSampling:
    """Seven steps and more are three that warm up, one recorded, and replays."""

    @pytest.mark.parametrize("ahead", [True, False])
    @pytest.mark.parametrize("options, graphs", [
        ({}, 1),
        ({"eta": 0.7}, 1),
        ({"sampler": "ddpm", "guidance_scale": 1.0}, 1),
        ({"sampler": "ddpm", "steps": 16, "guidance_interval": (0.3, 0.7)}, 2),
        ({"eta": 1.0, "steps": 10, "guidance_interval": (0.0, 0.5), "clip_denoised": True}, 2),
        ({"batch_size": 2, "guidance_channels": None}, 2),
    ], ids=str)  # fmt: skip
    def test_samples_are_the_same_to_the_bit(self, options, graphs, ahead, allowed):
        """The last batch is the smaller one, and batches have labels of their own."""
        labels, options = torch.tensor([0, 3, 3, 3, 4, 1, 2]), options | {"modulation_ahead": ahead}
        plain, replayed = (draw(network(), config(**options, cuda_graph=on), labels) for on in (False, True))
        assert torch.equal(plain, replayed)
        if not GPU:
            assert len(StandIn.made) == graphs and all(graph.replays > 1 for graph in StandIn.made)

    @pytest.mark.parametrize("ahead", [True, False])
    @pytest.mark.parametrize("options, graphs", [
        ({"sampler": "ode"}, 1),
        ({"sampler": "ode", "method": "heun"}, 2),
        ({"sampler": "sde", "guidance_interval": (0.5, 1.0), "steps": 16}, 2),
        ({"sampler": "sde", "method": "heun", "last_step": "none", "diffusion_form": "linear"}, 2),
        ({"sampler": "dpm-solver++", "steps": 8}, 1),
    ], ids=str)  # fmt: skip
    def test_other_solvers(self, options, graphs, ahead, allowed):
        """A step of Heun is two; where only one step in a batch is of a kind (no noise, no past), it stays as it is."""
        process = "ddpm" if options["sampler"] == "dpm-solver++" else "sit"
        transport = TransportConfig(sample_eps=1e-3 if process == "sit" else None)
        run = RunConfig(process=process, model=ModelConfig(learn_sigma=False), transport=transport)
        options = {"steps": 7, "guidance_scale": 2.0, "modulation_ahead": ahead} | options
        labels = torch.tensor([0, 3, 4, 1, 2])
        plain, replayed = (
            draw(
                network(learn_sigma=False),
                dataclasses.replace(run, sample=SampleConfig(**options, cuda_graph=on)),
                labels,
            )
            for on in (False, True)
        )
        assert torch.equal(plain, replayed)
        if not GPU:
            assert len(StandIn.made) == graphs and all(graph.replays > 1 for graph in StandIn.made)

    @pytest.mark.parametrize("options", [{}, {"steps": 10, "guidance_interval": (0.5, 1.0)}], ids=str)
    def test_two_networks(self, options, allowed):
        labels = cycle_labels(3, None, 5)
        plain, replayed = (
            draw(network(0), config(**options, cuda_graph=on), labels, unconditional=network(1)) for on in (False, True)
        )
        assert torch.equal(plain, replayed)

    def test_a_graph_holds_the_whole_step(self, allowed, monkeypatch):
        """No network, guidance or update of a replayed step passes through Python."""
        calls = Counter()

        def counted(module, name):
            real = getattr(module, name)
            monkeypatch.setattr(module, name, lambda *args, **kwargs: calls.update([name]) or real(*args, **kwargs))

        counted(samplers, "guided_step")
        counted(ClassifierFreeGuidance, "_both")
        counted(DiT, "forward_modulated")
        draw(network(), config(cuda_graph=True, steps=25), torch.tensor([1, 2]))
        assert calls == dict.fromkeys(("guided_step", "_both", "forward_modulated"), WARMUP + 1)

    def test_steps_of_a_progressive_loop(self):
        """Each is that of the plain loop, x_0 too, until the next one is asked for."""
        process = create_diffusion("ddim10", learn_sigma=False)
        x, y = torch.randn(2, 3, 4, device=DEVICE), torch.tensor([1, 2], device=DEVICE)

        def model(x, t, y):
            return x.sin() * (1 + y.view(-1, 1, 1)) + t.view(-1, 1, 1) / 1000

        run_step = partial(StepGraph("option", DEVICE), y=y, noise_fn=torch.zeros_like)
        loops = (
            process.ddim_sample_loop_progressive(model, x.shape, x, model_kwargs={"y": y}, **options)
            for options in ({}, {"run_step": run_step})
        )
        for plain, replayed in zip(*loops, strict=True):
            assert torch.equal(plain["sample"], replayed["sample"])
            assert torch.equal(plain["pred_xstart"], replayed["pred_xstart"])

    @pytest.fixture
    def both(self):
        """both(model, **options): the samples of a loop of 12 steps, as it is and by graphs."""

        def run(model, **options):
            process = create_diffusion("ddim12", learn_sigma=False)
            x, y = torch.randn(2, 3, 4, device=DEVICE), torch.tensor([1, 2], device=DEVICE)
            run_step = partial(StepGraph("option", DEVICE), y=y, noise_fn=torch.zeros_like)
            kwargs = {"y": y} | options
            return [
                process.ddim_sample_loop(model, x.shape, x, model_kwargs=kwargs, **graph)
                for graph in ({}, {"run_step": run_step})
            ]

        return run

    @staticmethod
    def network(x, t, y):
        return x.sin() * (1 + y.view(-1, 1, 1)) + t.view(-1, 1, 1) / 1000

    def by_timestep(self, choose):
        class Chooses:
            def at_timestep(self, t):
                return choose(t)

        return Chooses()

    def test_guidances_of_several_weights(self, both):
        """Equal ones share a graph, though each step has one of its own; others do not."""
        chosen = self.by_timestep(lambda t: ClassifierFreeGuidance(self.network, 1.0 + (t > 500), 3))
        plain, replayed = both(chosen)
        assert torch.equal(plain, replayed)
        if not GPU:
            assert len(StandIn.made) == 2

    def test_a_guidance_that_is_changed(self, both):
        guidance = ClassifierFreeGuidance(self.network, 1.0, 3)

        def choose(t):
            guidance.scale = 2.0 if t > 500 else 4.0
            return guidance

        assert torch.equal(*both(self.by_timestep(choose)))

    def test_a_model_of_its_own_for_every_step_is_refused(self, both):
        chosen = self.by_timestep(lambda t: lambda x, _, y: x * (1 + t / 1000))
        with pytest.raises(ConfigError, match="need graph 9.*give the same model and options to every step"):
            both(chosen)

    def test_other_options_of_the_sampler_have_their_graph(self):
        process = create_diffusion("ddim10", learn_sigma=False)
        x, y = torch.randn(2, 3, 4, device=DEVICE), torch.tensor([1, 2], device=DEVICE)
        run_step = partial(StepGraph("option", DEVICE), y=y, noise_fn=torch.zeros_like)
        for clip in (False, True):
            options = {"clip_denoised": clip, "model_kwargs": {"y": y}}
            plain, replayed = (
                process.ddim_sample_loop(self.network, x.shape, x, **options, **graph)
                for graph in ({}, {"run_step": run_step})
            )
            assert torch.equal(plain, replayed)

    def test_further_arguments_of_the_model_are_refused(self, both):
        with pytest.raises(ConfigError, match="option: model_kwargs has w, which a recorded step"):
            both(lambda x, t, y, w: x * w, w=torch.ones(1, device=DEVICE))
