"""`ditfast plan`: the candidates in a table, what the proposed one's step and memory consist of, and as JSON."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ditfast.files import replacing
from ditfast.hardware import rate_name
from ditfast.layers import training_flops
from ditfast.plan.layout import FACTORS as LAYOUT_FACTORS
from ditfast.plan.layout import Candidate, Cluster, Job, Layout, choose, layouts, weigh
from ditfast.plan.memory import POLICIES
from ditfast.plan.step import FACTORS as STEP_FACTORS
from ditfast.plan.text import aligned, wrapped


@dataclass(frozen=True)
class Plan:
    """All layouts weighed; `proposed` is the one to take, `today` the best that ditfast can run, None: none fits.

    policies: those that were allowed.
    """

    job: Job
    cluster: Cluster
    candidates: list[Candidate]
    proposed: Candidate | None
    today: Candidate | None
    policies: tuple[str, ...] = POLICIES

    def images_per_s(self, candidate: Candidate) -> float:
        assert candidate.time is not None
        return 1e3 * self.job.batch_size / candidate.time.total

    def mfu(self, candidate: Candidate) -> float | None:
        """Of the datasheet's dense peak, work done again not counted; None where it has none of this dtype."""
        peak = getattr(self.cluster.gpu, rate_name(self.job.precision))
        done = self.images_per_s(candidate) * training_flops(self.job.model) / self.cluster.gpus
        return None if peak is None else done / (1e12 * peak)

    def verdict(self, candidate: Candidate) -> str:
        """What is said of a candidate, in a few words."""
        if not candidate.fits:
            return candidate.why
        if candidate is self.proposed:
            return "proposed"
        assert candidate.time and self.proposed and self.proposed.time
        slower = candidate.time.total / self.proposed.time.total - 1
        if slower < -LAYOUT_FACTORS["same"].value:
            said = f"{self.job.tokens} tokens: sequence parallelism pays from about {LAYOUT_FACTORS['sequence'].value}"
        elif slower < 0.001:
            said = "hardly faster, less simple"
        else:
            said = f"{slower:.0%} slower"
        return said + (", proposed of what runs today" if candidate is self.today else "")


def make_plan(job: Job, cluster: Cluster, policy: str | None = None) -> Plan:
    """Weighs every layout under one policy, or under all and takes each layout's fastest that fits."""
    policies = POLICIES if policy is None else (policy,)
    candidates = [weigh(job, cluster, layout, policies) for layout in layouts(cluster)]
    running = [each for each in candidates if each.layout.runs]
    return Plan(job, cluster, candidates, choose(job, candidates), choose(job, running), policies)


def remedies(plan: Plan) -> list[str]:
    """Options under each of which plain data parallelism fits: a policy, and of some nearby batches and numbers of
    GPUs the nearest.
    """
    job, cluster = plan.job, plan.cluster
    unit = cluster.gpus * job.accumulate
    chunks = job.batch_size // unit
    batches = {unit * n for n in (chunks + 1, *(chunks >> i for i in range(chunks.bit_length())))}
    most = 1024 * cluster.gpus if cluster.between_nodes else cluster.per_node
    counts = {n for i in range(1, 11) for n in (cluster.gpus << i, cluster.gpus >> i) if 0 < n <= most}
    counts = {n for n in counts if n <= cluster.per_node or n % cluster.per_node == 0}
    anyhow = weigh(job, cluster, Layout(cluster.gpus))
    found = [f"--policy {anyhow.policy}"] if anyhow.fits else []
    for trials in (
        [(f"--batch-size {n}", replace(job, batch_size=n), cluster) for n in _by_ratio(batches, job.batch_size)],
        [(f"--gpus {n}", job, replace(cluster, gpus=n)) for n in _by_ratio(counts, cluster.gpus)],
    ):
        found += next(([o] for o, j, c in trials if weigh(j, c, Layout(c.gpus), plan.policies).fits), [])
    return found


def _by_ratio(counts: set[int], wanted: int) -> list[int]:
    return sorted(counts, key=lambda n: max(n, wanted) / min(n, wanted))


def print_plan(plan: Plan, name: str, precision: str) -> None:
    """The tables."""
    job, cluster = plan.job, plan.cluster
    nodes = f" in {cluster.nodes} nodes of {cluster.per_node}" if cluster.nodes > 1 else ""
    told = (
        f"{name}, {job.tokens} tokens an image, {precision}, global batch {job.batch_size}, on {cluster.gpus} x "
        f"{cluster.gpu.name}{nodes}; {training_flops(job.model) / 1e9:.1f} GFLOP an image and training step"
    )
    print(wrapped(told))
    head = ("", "data", "tensor", "seq", "sharded", "recompute", "GB", "ms", "comm", "img/s", "MFU", "")
    print(aligned([head, *(_line(plan, each) for each in plan.candidates)], left=(4, 5)))
    print(
        "* is in ditfast, the others are not yet. GB: of a GPU; ms: of a step; comm: ms\n"
        "of communication among them that nothing hides; seq: sequence parallel."
    )
    for title, candidate in {"proposed": plan.proposed, "runs today": plan.today}.items():
        if candidate is None:
            reason = plan.candidates[0].why
            fitting = " or ".join(remedies(plan)) or "none that is near: take another GPU or model"
            print(wrapped(f"{title}: no layout ({reason}); what fits: {fitting}"))
        elif title == "proposed" or candidate is not plan.proposed:
            _print_parts(title, candidate)
    print(_basis(plan))


def _line(plan: Plan, each: Candidate) -> tuple[str, ...]:
    """A candidate's row, in which a reason against it takes the place of its figures."""
    layout, shard = each.layout, "" if each.layout.shard == "none" else each.layout.shard
    split = ("" if n == 1 else str(n) for n in (layout.tensor, layout.sequence))
    named = ("*" if layout.runs else "", str(layout.data), *split, shard, *filter(None, [each.policy]))
    if each.time is None or each.memory is None or not each.fits:
        return *named, each.why.removesuffix(f" even with recompute {each.policy}")
    mfu = plan.mfu(each)
    return (
        *named, _tenths(each.memory.total / 1e9), _tenths(each.time.total), _tenths(each.time.communication),
        _rate(plan.images_per_s(each)), "" if mfu is None else f"{mfu:.1%}", _beside(plan, each),
    )  # fmt: skip


def _beside(plan: Plan, each: Candidate) -> str:
    """How fast a candidate that fits is, beside the proposed one."""
    if each is plan.proposed:
        return "proposed"
    assert each.time and plan.proposed and plan.proposed.time
    percent = round(100 * (each.time.total / plan.proposed.time.total - 1))
    return f"{abs(percent)}% {'slower' if percent > 0 else 'faster'}" if percent else "as fast"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value < 0.1 else f"{value:.1f}"


def _tenths(value: float) -> str:
    return f"{value:.1f}" if value < 1e3 else f"{value:.0f}" if value < 1e9 else f"{value:.3g}"


def _print_parts(title: str, candidate: Candidate) -> None:
    """Of what time and memory of a candidate consist."""
    time, memory = candidate.time, candidate.memory
    assert time is not None and memory is not None
    print(f"{title}: {candidate.layout}, recompute {candidate.policy}")
    for label, unit, parts in (
        ("step", "ms", asdict(time)),
        ("memory", "GB", {name: size / 1e9 for name, size in asdict(memory).items()}),
    ):
        values = (_tenths(value) for value in (*parts.values(), sum(parts.values())))
        names = (name.replace("communication", "comm") for name in parts)
        print(aligned([(label, *names, "all", ""), (unit, *values, "")], left=(0,)))
    sent = (
        f"each GPU sends {candidate.communicated / 1e9:.2f} GB a step, for {candidate.hidden:.1f} ms beside other work"
    )
    print(wrapped(f"{sent} and {_tenths(time.communication)} ms that nothing hides"))


def _basis(plan: Plan) -> str:
    """What the figures rest on."""
    ceilings, cluster = plan.cluster.ceilings, plan.cluster
    rate = ceilings.gemm_tflops[rate_name(plan.job.precision)]
    link = cluster.gpu.link_among(min(cluster.gpus, cluster.per_node))
    network = f", {cluster.between_nodes:g} GB/s to other nodes" if cluster.nodes > 1 else ""
    factors = STEP_FACTORS | LAYOUT_FACTORS
    if ceilings.source == "measured":
        factors = {name: factor for name, factor in factors.items() if "datasheet" not in name}
    text = (
        f"Computed from shapes and {ceilings.source} ceilings of {ceilings.machine}: {rate:g} TFLOP/s, copy "
        f"{ceilings.copy_gbps:g} GB/s; {link:g} GB/s to its node{network}. Nothing was run. Not in it: the "
        "host's time, which a small batch waits for, and loading data. Assumed:"
    )
    reasons = (f"{name} {factor.value:g}: {factor.reason}" for name, factor in factors.items())
    return "\n".join([wrapped(text), *(wrapped(reason, indent=2) for reason in reasons)])


def save_plan(plan: Plan, path: Path, name: str, precision: str, against: list[dict[str, Any]]) -> None:
    """The plan as JSON: every candidate with its parts, and the comparisons with what was measured."""
    tree = {
        "model": name,
        "precision": precision,
        "batch_size": plan.job.batch_size,
        "tokens": plan.job.tokens,
        "training_flops_per_image": training_flops(plan.job.model),
        "gpus": plan.cluster.gpus,
        "gpus_per_node": plan.cluster.per_node,
        "gpu": asdict(plan.cluster.gpu),
        "ceilings": asdict(plan.cluster.ceilings),
        "factors": {name: asdict(factor) for name, factor in (STEP_FACTORS | LAYOUT_FACTORS).items()},
        "candidates": [_tree(plan, each) for each in plan.candidates],
        "proposed": plan.proposed and str(plan.proposed.layout),
        "runs_today": plan.today and str(plan.today.layout),
        "against": against,
    }
    with replacing(path) as file:
        file.write((json.dumps(tree, indent=1) + "\n").encode())


def _tree(plan: Plan, candidate: Candidate) -> Mapping[str, Any]:
    time, memory = candidate.time, candidate.memory
    found = asdict(candidate) | {"layout": asdict(candidate.layout) | {"runs_today": candidate.layout.runs}}
    found["verdict"] = plan.verdict(candidate)
    if time is not None and memory is not None:
        found["step_ms"], found["memory_bytes"] = time.total, memory.total
        found["images_per_s"], found["mfu"] = plan.images_per_s(candidate), plan.mfu(candidate)
    return found
