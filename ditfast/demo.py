"""The demo: learns scanned digits from nothing, draws 400, and lets a classifier that knows real digits judge them."""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ditfast import checkpoint
from ditfast.config import ConfigError, RunConfig
from ditfast.data import Digits
from ditfast.distributed import pick_device
from ditfast.logs import log
from ditfast.sample import cycle_labels, draw, load_network, open_weights, write
from ditfast.train import train

COUNT = 400
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
    samples = draw(network, config, labels, seed=config.seed)
    sampled = time.perf_counter()
    write(out, samples, labels)
    judgement = judge(samples, labels)
    loss_curve(out / "log.jsonl", out / "loss.png")
    (out / "report.md").write_text(report(config, judgement, trained - started if fresh else None, sampled - trained))
    log.info("read %s", ", ".join(str(out / n) for n in ("report.md", "grid.png", "samples.npz", "loss.png")))
    return judgement.passed


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
    for key, label in (("loss", "loss"), ("mse", "prediction error"), ("vb", "variational bound")):
        if key in rows[0]:
            axes.plot([r["step"] for r in rows], [r[key] for r in rows], label=label)
    axes.set(xlabel="step", ylabel="mean over the logged window", yscale="log", title="Training on digits")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def report(config: RunConfig, judged: Judgement, train_seconds: float | None, sample_seconds: float) -> str:
    took = "" if train_seconds is None else f" in {train_seconds:.0f} s"
    per_class = " ".join(f"{k}: {share:.0%}" for k, share in enumerate(judged.per_class))
    return f"""# Digits demo: {"passed" if judged.passed else "FAILED"}

- {judged.accuracy:.1%} of {COUNT} samples are read as their class (required: {REQUIRED:.0%}); the classifier reads
  {judged.classifier:.1%} of held-out real digits.
- By class: {per_class} (required: {REQUIRED_WORST:.0%} each).
- Not copies: a sample is {judged.sample_distance:.1f} grey levels from its nearest training image (median), a held-out
  real digit {judged.heldout_distance:.1f}.
- Trained {config.train.steps} steps of {config.train.batch_size}{took} ({config.train.precision});
  sampled in {sample_seconds:.0f} s ({config.sample.sampler.upper()}, {config.sample.steps} steps, guidance
  {config.sample.guidance_scale}).

grid.png: 40 samples of each digit. loss.png: the loss. samples.npz: `arr_0` uint8 (N, H, W, C), `labels` (N,).
"""
