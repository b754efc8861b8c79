"""Layouts: what is proposed for DiT-XL/2 and for long sequences, what is refused and why, communication by hand."""

import dataclasses

import pytest

from ditfast.config import PRECISIONS, ConfigError
from ditfast.hardware import Ceilings, datasheet, gpu
from ditfast.layers import DiT
from ditfast.plan import Cluster, Job, Layout, published_model, weigh
from ditfast.plan.layout import FACTORS
from ditfast.plan.report import make_plan


@pytest.fixture(scope="module")
def xl() -> DiT:
    return published_model("DiT-XL/2")


def cluster(gpus: int, name: str = "h100", per_node: int = 8, **options) -> Cluster:
    return Cluster(gpu(name), gpus, per_node, datasheet(name), **options)


def job(model: DiT, batch_size: int = 256, precision: str = "bf16-fast", **options) -> Job:
    return Job(model, PRECISIONS[precision], batch_size, **options)


@pytest.mark.parametrize("gpus", [8, 64])
@pytest.mark.parametrize("precision", ["bf16", "bf16-fast"])
def test_for_xl_2_data_parallelism_with_sharded_optimizer_is_proposed(xl, gpus, precision):
    """performance.md, parallel; and plain data parallelism is what runs today."""
    plan = make_plan(job(xl, precision=precision), cluster(gpus))
    assert plan.proposed.layout == Layout(gpus, "optimizer") and plan.today.layout == Layout(gpus)
    assert plan.proposed.policy == "none" and plan.today.layout.runs and not plan.proposed.layout.runs
    assert plan.verdict(plan.proposed) == "proposed" and "runs today" in plan.verdict(plan.today)


def test_on_one_gpu_there_is_one_layout_and_it_runs(xl):
    plan = make_plan(job(xl), cluster(1, "h200"))
    assert [str(each.layout) for each in plan.candidates] == ["data 1"]
    assert plan.proposed is plan.today and plan.verdict(plan.today) == "proposed"
    assert plan.mfu(plan.today) == pytest.approx(plan.images_per_s(plan.today) * 711.7e9 / 989e12, rel=1e-3)


@pytest.mark.parametrize(
    "name, images, policy",
    [("h200", 256, "none"), ("h100", 256, "none"), ("h100", 300, "ops"), ("l40s", 256, "mlp"), ("4090", 256, "block")],
)
def test_the_least_recompute_that_fits_is_taken(xl, name, images, policy):
    """At batch 256 they need 74.8, 62.1, 45.2 and 19.8 GB."""
    found = weigh(job(xl, images), cluster(1, name), Layout(1))
    assert found.fits and found.policy == policy and found.memory.total <= gpu(name).memory * 1e9


def test_what_does_not_fit_says_how_much_it_needs(xl):
    found = weigh(job(xl), cluster(1, "l4"), Layout(1), ("none",))
    assert found.why == "needs 76.3 GB of 24"
    assert weigh(job(xl, 4096), cluster(1, "l4"), Layout(1)).why.endswith("of 24 even with recompute block")
    plan = make_plan(job(xl), cluster(1, "l4"), "none")
    assert plan.proposed is None and plan.today is None


@pytest.mark.parametrize("layout, options, why", [
    (Layout(1, tensor=3), {}, "16 heads cannot be split by 3"),
    (Layout(512), {}, "256 images at a time cannot be split by 512"),
    (Layout(8), {"accumulate": 64}, "4 images at a time cannot be split by 8"),
    (Layout(1, sequence=8), {"model": "DiT-S/8"}, "6 heads cannot be split by 8"),
])  # fmt: skip
def test_impossible_shapes_are_refused_with_the_reason(xl, layout, options, why):
    model = published_model(options.pop("model")) if "model" in options else xl
    assert weigh(job(model, **options), cluster(8), layout).why == why


def test_long_sequences_on_more_gpus_than_images_are_split_along_the_sequence():
    plan = make_plan(job(published_model("DiT-XL/2", 1024)), cluster(512))
    assert plan.proposed.layout.sequence > 1 and plan.today is None
    assert "cannot be split by 512" in plan.candidates[0].why


def test_short_sequences_are_split_otherwise_even_if_it_takes_longer(xl):
    """Below 4,096 tokens sequence parallelism is for where nothing else fits; 252 images do not go into 8."""
    plan = make_plan(job(xl, 252), cluster(8))
    assert plan.proposed.layout == Layout(4, "optimizer", tensor=2)
    faster = [each for each in plan.candidates if each.fits and each.time.total < 0.95 * plan.proposed.time.total]
    assert faster and all(each.layout.sequence > 1 for each in faster)
    assert plan.verdict(faster[0]) == "256 tokens: sequence parallelism pays from about 4096"


def test_data_parallel_communication_by_hand(xl):
    """Gradients of 675 M bf16 weights, twice 7/8 of them over NVLink; two nodes: an eighth of half over the network."""
    found = weigh(job(xl, 2048), cluster(8), Layout(8))
    size = 2 * 674_834_000 * 2
    assert found.communicated == pytest.approx(size * 7 / 8, rel=1e-3)
    seconds = size * 7 / 8 / (450e9 * FACTORS["link"].value)
    assert found.time.communication + found.hidden == pytest.approx(1e3 * seconds, rel=1e-3)
    assert found.time.communication == pytest.approx(1e2 * seconds, rel=1e-2), "a tenth, all else being beside work"
    two = weigh(job(xl, 2048), cluster(16), Layout(16))
    assert two.communicated == pytest.approx(size * 7 / 8 + size / 8 / 2, rel=1e-3)
    slow = weigh(job(xl, 2048), cluster(16, network=1.0), Layout(16))
    crossing = 1e3 * size / 8 / 2 / (1e9 * FACTORS["network"].value)
    assert slow.time.communication + slow.hidden == pytest.approx(crossing, rel=1e-3)


@pytest.mark.parametrize("name, gpus, link", [
    ("h100 pcie", 2, 300), ("h100 pcie", 4, 64), ("a100 pcie", 8, 32), ("h200 nvl", 4, 450), ("h200 nvl", 8, 64),
])  # fmt: skip
def test_a_bridge_joins_so_many_and_the_others_go_by_their_slots(xl, name, gpus, link):
    found = weigh(job(xl), cluster(gpus, name), Layout(gpus))
    seconds = found.communicated / (1e9 * link * FACTORS["link"].value)
    assert found.time.communication + found.hidden == pytest.approx(1e3 * seconds)


def test_tensor_parallel_pairs_have_the_bridge_and_their_gradients_the_slot(xl):
    """Of 8, each pair splits the stream over its bridge, and 4 GPUs of other pairs half of the gradients."""
    found = weigh(job(xl, 64), cluster(8, "h100 pcie"), Layout(4, "optimizer", tensor=2), ("none",))
    stream = 4 * 16 * 256 * 1152 * 2 * 2 * 28 / 2
    gradients = 2 * 674_834_000 * 2 / 2 * 3 / 4
    assert found.communicated == pytest.approx(stream + gradients, rel=1e-3)
    seconds = (stream / 300e9 + gradients / 64e9) / FACTORS["link"].value + 8 * 28 * FACTORS["latency"].value
    assert found.time.communication + found.hidden == pytest.approx(1e3 * seconds, rel=1e-3)


@pytest.mark.parametrize("layout, crossings", [
    (Layout(8, "optimizer"), 2), (Layout(8, "full"), 3),
])  # fmt: skip
def test_sharding_moves_weights_and_gradients(xl, layout, crossings):
    found = weigh(job(xl), cluster(8), layout)
    assert found.communicated == pytest.approx(crossings * 674_834_000 * 2 * 7 / 8, rel=1e-3)


@pytest.mark.parametrize("layout, each", [(Layout(1, tensor=8), 4.0), (Layout(1, sequence=8), 0.5)])
def test_tensor_and_sequence_parallel_communication_by_hand(xl, layout, each):
    """Of the stream (N, D): two sums a block and direction; q, k, v and o, of an eighth of the tokens."""
    found = weigh(job(xl, 64), cluster(8), layout, ("ops",))
    stream = 64 * 256 * 1152 * 2
    activations = each * stream * 7 / 8 * 2 * 28
    gradients = 0 if layout.tensor > 1 else 2 * 674_834_000 * 2 * 7 / 8
    assert found.communicated == pytest.approx(activations + gradients, rel=1e-3)
    waited = 1e3 * (activations / (450e9 * FACTORS["link"].value) + 8 * 28 * FACTORS["latency"].value)
    assert found.time.communication >= waited * 0.999
    # Computed again whole, blocks communicate again, in half as many ways more.
    whole, half = (weigh(job(xl, 64), cluster(8), layout, (policy,)) for policy in ("block", "block:2"))
    assert whole.communicated - gradients == pytest.approx(1.5 * activations, rel=1e-3)
    assert half.communicated - gradients == pytest.approx(1.25 * activations, rel=1e-3)


def test_the_reduction_hides_behind_the_last_backward_and_not_behind_the_update(xl):
    """Of a slow network all that is beside it is hidden, two thirds of a chunk's forward and backward."""
    for accumulate in (1, 4):
        found = weigh(job(xl, accumulate=accumulate), cluster(64, network=1.0), Layout(64), ("none",))
        chunk = (found.time.total - found.time.communication - found.time.optimizer) / accumulate
        assert found.hidden == pytest.approx(chunk * 2 / 3)
    sharded = weigh(job(xl, accumulate=4), cluster(64, network=1.0), Layout(64, "optimizer"), ("none",))
    chunk = (sharded.time.total - sharded.time.communication - sharded.time.optimizer) / 4
    assert sharded.hidden == pytest.approx(chunk), "the gradients beside the last backward, weights the first forward"
    full = weigh(job(xl, accumulate=4), cluster(64, network=1.0), Layout(64, "full"), ("none",))
    assert full.hidden == pytest.approx(full.time.total - full.time.communication - full.time.optimizer)


def test_accumulation_needs_less_memory_and_communicates_once(xl):
    once, four = (weigh(job(xl, accumulate=n), cluster(8), Layout(8), ("none",)) for n in (1, 4))
    assert four.memory.activations == once.memory.activations / 4
    assert four.communicated == once.communicated
    assert four.time.optimizer == once.time.optimizer and four.time.attention == pytest.approx(once.time.attention)


@pytest.mark.parametrize("options, message", [
    ({"gpus": 0}, "--gpus must be positive, got 0"), ({"per_node": 0}, "--gpus-per-node must be positive"),
    ({"gpus": 12}, "--gpus 12 must be a multiple of --gpus-per-node 8"),
    ({"gpus": 16, "name": "l40s"}, "L40S names no network; give --network"),
    ({"gpus": 16, "network": 0.0}, "must be positive GB/s, got 0|--network"),
])  # fmt: skip
def test_a_cluster_that_cannot_be_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        cluster(**{"gpus": 8} | options)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"accumulate": 0}])
def test_a_job_that_cannot_be_is_refused(xl, options):
    with pytest.raises(ConfigError, match="must be positive, got 0"):
        job(xl, **options)


def test_measured_ceilings_change_the_time_as_they_should(xl):
    measured = Ceilings(4300, {"bf16": 790}, "measured", "NVIDIA H200")
    slow = dataclasses.replace(measured, copy_gbps=430)
    fast, slower = (
        weigh(job(xl), Cluster(gpu("h200"), 1, 8, ceilings), Layout(1), ("none",)).time for ceilings in (measured, slow)
    )
    assert slower.elementwise == pytest.approx(10 * fast.elementwise) and slower.attention == fast.attention
