"""The demo: learns scanned digits from nothing, draws 400, and lets a classifier that knows real digits judge them.

Of process sit it draws by the ODE and by the SDE, and both must pass.
"""

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ditfast import checkpoint
from ditfast.config import SAMPLER_OPTIONS, ConfigError, RunConfig, SampleConfig
from ditfast.data import Digits
from ditfast.distributed import pick_device
from ditfast.logs import log
from ditfast.sample import cycle_labels, draw, load_network, open_weights, write
from ditfast.train import train

COUNT, COLUMNS = 400, 20
REQUIRED, REQUIRED_WORST = 0.95, 0.85


@dataclass
class Judgement:
    """What the classifier read, and how far the samples are from the training images.

    Accuracies are shares of the samples read as the class they were drawn for; `classifier` is its own accuracy on
    held-out scans. Distances are medians of the Euclidean distance to the nearest training image, in grey levels of
    0..16 over 64 pixels; a copy would have distance 0.
    """

    accuracy: float
    per_class: list[float]
    classifier: float
    sample_distance: float
    heldout_distance: float

    @property
    def passed(self) -> bool:
        return self.accuracy >= REQUIRED and min(self.per_class) >= REQUIRED_WORST


def demo(config: RunConfig) -> bool:
    """Trains, samples, judges and writes everything under `config.out`. True if the samples meet the bar."""
    out = Path(config.out)
    if config.data.kind != "digits":
        raise ConfigError(f"the demo judges digits, not data.kind {config.data.kind!r}; use ditfast train and sample")
    fresh, started = checkpoint.latest(out) is None, time.perf_counter()
    train(config)
    trained = time.perf_counter()
    network = load_network(open_weights(out), pick_device(config.device), ema=config.sample.ema)
    labels = cycle_labels(COUNT, None, 10).sort().values
    drawn, judged = [], {}
    for run in _by_sampler(config):
        drawn.append(draw(network, run, labels, seed=config.seed))
        judged[run.sampler] = judge(drawn[-1], labels)
    sampled = time.perf_counter()
    # Beside each other: a row of the grid has COLUMNS samples of each sampler.
    side_by_side = torch.stack([x.unflatten(0, (-1, COLUMNS)) for x in drawn], dim=1).flatten(0, 2)
    asked = labels.unflatten(0, (-1, 1, COLUMNS)).expand(-1, len(drawn), -1).flatten()
    write(out, side_by_side, asked, columns=COLUMNS * len(drawn))
    loss_curve(out / "log.jsonl", out / "loss.png")
    (out / "report.md").write_text(report(config, judged, trained - started if fresh else None, sampled - trained))
    log.info("read %s", ", ".join(str(out / n) for n in ("report.md", "grid.png", "samples.npz", "loss.png")))
    return all(judgement.passed for judgement in judged.values())


def _by_sampler(config: RunConfig) -> list[RunConfig]:
    """The configurations to draw by: of process ddpm the configured sampler, of sit the ODE and the SDE."""
    if config.process == "ddpm":
        return [config]
    options = {name: dataclasses.replace(config.sample, sampler=name) for name in ("ode", "sde")}
    if config.sampler == "sde":  # whose own options the ODE has not
        own = [name for name, samplers in SAMPLER_OPTIONS.items() if samplers == ("sde",)]
        options["ode"] = dataclasses.replace(options["ode"], **{name: getattr(SampleConfig, name) for name in own})
    return [dataclasses.replace(config, sample=sample) for sample in options.values()]


def _arrays(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Grey levels 0..16 (N, 64) and labels of the scans."""
    dataset = Digits(split)
    items = [dataset[i] for i in range(len(dataset))]
    return _grey(torch.stack([x for x, _ in items])), np.array([y for _, y in items])


def _grey(x: Tensor) -> np.ndarray:
    return ((x.clamp(-1, 1) + 1) * 8).flatten(1).numpy()


def judge(samples: Tensor, labels: Tensor) -> Judgement:
    """Judges samples (N, 1, 8, 8) in [-1, 1] by a support vector machine fitted to the training scans."""
    from sklearn.svm import SVC

    images, truth = _arrays("train")
    heldout, heldout_truth = _arrays("heldout")
    classifier = SVC(gamma=0.001, C=10).fit(images, truth)
    drawn, asked = _grey(samples), labels.numpy()
    right = classifier.predict(drawn) == asked
    return Judgement(
        accuracy=float(right.mean()),
        per_class=[float(right[asked == k].mean()) for k in range(10)],
        classifier=float(classifier.score(heldout, heldout_truth)),
        sample_distance=_nearest(drawn, images),
        heldout_distance=_nearest(heldout, images),
    )


def _nearest(queries: np.ndarray, images: np.ndarray) -> float:
    distances = torch.cdist(torch.from_numpy(queries).float(), torch.from_numpy(images).float())
    return float(distances.min(dim=1).values.median())


def loss_curve(records: Path, path: Path) -> None:
    """Draws the logged loss over the steps as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [json.loads(line) for line in records.read_text().splitlines()]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for key, label in (
        ("loss", "loss"),
        ("mse", "prediction error"),
        ("vb", "variational bound"),
        ("cos", "direction"),
    ):
        if key in rows[0]:
            axes.plot([r["step"] for r in rows], [r[key] for r in rows], label=label)
    axes.set(xlabel="step", ylabel="mean over the logged window", yscale="log", title="Training on digits")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def report(config: RunConfig, judged: dict[str, Judgement], train_seconds: float | None, sample_seconds: float) -> str:
    took = "" if train_seconds is None else f" in {train_seconds:.0f} s"
    passed, options, first = all(j.passed for j in judged.values()), config.sample, next(iter(judged.values()))
    verdicts = "".join(_verdict(name, judgement) for name, judgement in judged.items())
    sides = ", by ODE on the left and by SDE on the right" if len(judged) > 1 else ""
    return f"""# Digits demo: {"passed" if passed else "FAILED"}

{verdicts}- Required: {REQUIRED:.0%} of all, {REQUIRED_WORST:.0%} of each class. The classifier reads
  {first.classifier:.1%} of held-out real digits.
- Trained {config.train.steps} steps of {config.train.batch_size}{took} (process {config.process},
  {config.train.precision}); sampled in {sample_seconds:.0f} s ({options.steps} steps, guidance
  {options.guidance_scale}).

grid.png: 40 samples of each digit{sides}. loss.png: the loss.
samples.npz: `arr_0` uint8 (N, H, W, C), `labels` (N,).
"""


def _verdict(sampler: str, judged: Judgement) -> str:
    per_class = " ".join(f"{k}: {share:.0%}" for k, share in enumerate(judged.per_class))
    return f"""- {sampler.upper()}: {judged.accuracy:.1%} of {COUNT} samples are read as their class.
  By class: {per_class}.
  Not copies: a sample is {judged.sample_distance:.1f} grey levels from its nearest training image (median), a held-out
  real digit {judged.heldout_distance:.1f}.
"""
