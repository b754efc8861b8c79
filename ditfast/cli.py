"""The `ditfast` command; one thin function per sub-command."""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ditfast.config import RunConfig, SampleConfig

USAGE = """usage: ditfast COMMAND [options]

  train    train a model, or continue a run     ditfast train --preset digits --out runs/digits
  sample   draw images from a run or a file     ditfast sample runs/digits --count 100
  export   write a run's weights to one file    ditfast export runs/digits digits.pt
  demo     train, sample and judge digits       ditfast demo, or ditfast demo --process sit
  plan     time, memory, layout of a training   ditfast plan --model DiT-XL/2 --gpus 64 --gpu h100
  doctor   versions, devices, backends; memory  ditfast doctor, or ditfast doctor --model SiT-XL/2

`ditfast COMMAND --help` lists the options; `ditfast train --print_config` all of a run's, with their values.
"""


def _train(arguments: list[str]) -> int:
    from ditfast.config import parse_config
    from ditfast.logs import setup_logging
    from ditfast.train import train

    description = (
        "Train a model, or continue the run in --out. The defaults below are those of --preset, digits where it is not "
        "given; `--preset DiT-XL/2 --help` shows that one's."
    )
    config = parse_config(arguments, "digits", prog="ditfast train", description=description)
    setup_logging()
    train(config)
    return 0


def _demo(arguments: list[str]) -> int:
    from ditfast.config import parse_config
    from ditfast.demo import demo
    from ditfast.logs import setup_logging

    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--process")
    sit = peek.parse_known_args(arguments)[0].process == "sit"
    preset, out = ("digits-sit", "runs/demo-sit") if sit else ("digits", "runs/demo")
    config = parse_config([f"--out={out}", *arguments], preset, prog="ditfast demo")
    setup_logging()
    passed = demo(config)
    print((Path(config.out) / "report.md").read_text())
    return 0 if passed else 1


def _sample(arguments: list[str]) -> int:
    from ditfast import kernels
    from ditfast import sample as sampling
    from ditfast.config import ConfigError, SampleConfig, keys, parse_sample
    from ditfast.distributed import pick_device
    from ditfast.logs import log, setup_logging

    pre = argparse.ArgumentParser(
        prog="ditfast sample", allow_abbrev=False,
        description="Draw samples: grid.png and samples.npz, or of latents, which a VAE has to decode, latents.npy and "
        "a preview of them.",
    )  # fmt: skip
    pre.add_argument(
        "weights",
        help="a run's directory, one of its step-... directories, or a .pt, .pth or .safetensors file with the weights "
        "of a DiT, SiT, LightningDiT or LargeDiT, official or exported",
    )
    pre.add_argument("--count", type=int, default=64, help="how many samples, 64 by default")
    pre.add_argument("--classes", type=_integers, help="comma-separated labels to go round; all by default")
    pre.add_argument("--out", type=Path, default=Path("samples"), help="directory to write to, samples by default")
    pre.add_argument("--seed", type=int, default=0, help="0 by default")
    pre.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    pre.add_argument("--tuned", help="a file of measured kernel configs, of `python -m ditfast.kernels tune`")
    pre.add_argument("--precision", help="fp32, bf16, ...; the run's own by default")
    pre.add_argument("--config", help="for a file of no published size: the config.yaml of its run")
    pre.add_argument("--process", choices=("ddpm", "sit"), help="for a file that looks like a DiT's: sit for a SiT's")
    pre.add_argument("--sample_eps", type=float, help="of a sit: how far from the path's ends; the run's by default")
    pre.add_argument("--unconditional", help="weights of a second network that guides the first (two-network guidance)")
    pre.epilog = "Options of the sampler, by default the run's, described by `ditfast train --help` as --sample.NAME: "
    pre.epilog += ", ".join(f"--{key}" for key in keys(SampleConfig))
    options, rest = pre.parse_known_args(arguments)
    if options.count < 1:
        raise ConfigError(f"--count must be positive, got {options.count}")
    setup_logging()
    device = pick_device(options.device)
    if options.tuned:
        kernels.use_tuned(options.tuned)
    weights = sampling.open_weights(options.weights, options.config, options.process)
    config = _as_drawn(weights.config, parse_sample(rest, weights.config.sample), options.sample_eps)
    network = sampling.load_network(weights, device, options.precision, config.sample.ema)
    uncond = None
    if options.unconditional:
        is_run = Path(options.unconditional).is_dir()
        other = sampling.open_weights(options.unconditional, process=None if is_run else config.process)
        if other.config.process != config.process:
            raise ConfigError(f"--unconditional is of process {other.config.process}, the first of {config.process}")
        uncond = sampling.load_network(other, device, options.precision)
    labels = sampling.cycle_labels(options.count, options.classes, network.num_classes)
    started = time.perf_counter()
    samples = sampling.draw(
        network, config, labels, seed=options.seed, unconditional=uncond,
        on_batch=lambda n: log.info("%d of %d samples, %.1f s", n, options.count, time.perf_counter() - started),
    )  # fmt: skip
    for path in sampling.write(options.out, samples, labels):
        print(path)
    return 0


def _as_drawn(run: "RunConfig", given: "SampleConfig", sample_eps: float | None) -> "RunConfig":
    """A run's configuration with a command line's options of sampling."""
    from ditfast.logs import log

    former, eps = run.sample, run.transport.sample_eps if sample_eps is None else sample_eps
    if given.guidance_channels != former.guidance_channels and given.guidance_scale == former.guidance_scale != 1:
        log.warning("guidance_scale %g is for other channels: these want their own scale", given.guidance_scale)
    return dataclasses.replace(run, sample=given, transport=dataclasses.replace(run.transport, sample_eps=eps))


def _export(arguments: list[str]) -> int:
    from ditfast import convert
    from ditfast.config import ConfigError
    from ditfast.distributed import pick_device
    from ditfast.layers import Architecture
    from ditfast.sample import load_network, open_weights

    options = argparse.ArgumentParser(
        prog="ditfast export",
        description="Write a run's weights to one file, fp32: those of a DiT, SiT or LightningDiT by the names and in "
        "the order of the official code, those of a LargeDiT by ditfast's names, of which ditfast.paddle makes "
        "PaddleMIX's. `ditfast sample` reads them back. Other blocks and norms have no such format and are refused.",
    )
    options.add_argument("weights", help="a run's directory or one of its step-... directories")
    options.add_argument("file", type=Path, help="the file to write, .pt, .pth or .safetensors")
    options.add_argument("--ema", type=float, help="EMA rate; the first by default, 0 for the raw weights")
    given = options.parse_args(arguments)
    weights = open_weights(given.weights)
    model = weights.config.model
    if model.block != "adaln_zero":
        raise ConfigError(f"the official DiT has no block {model.block!r}, only adaln_zero is exported")
    of_dit = Architecture(
        model.patch_size, model.hidden_size, model.depth, model.num_heads, mlp_ratio=model.mlp_ratio,
        returns_sigma=model.returns_sigma,
    )  # fmt: skip
    if model.mlp != "swiglu" and model.architecture != of_dit:
        raise ConfigError("model has norms, positions or heads that the official DiT has not, so it is not exported")
    network = load_network(weights, pick_device("cpu"), "fp32", given.ema)
    convert.export_official(given.file, network.model.state_dict())
    print(f"{given.file} (weights alone; the diffusion and the sampler stay in {given.weights}/config.yaml)")
    return 0


def _doctor(arguments: list[str]) -> int:
    from ditfast.config import ConfigError
    from ditfast.doctor import doctor, memory

    options = argparse.ArgumentParser(
        prog="ditfast doctor",
        description="Report versions, devices and backends; with --model the memory that training it takes, alone.",
    )
    options.add_argument("--model", help="a preset, DiT-XL/2@512, ...: memory under every --train.recompute policy")
    options.add_argument("--batch-size", type=int, help="of one GPU, 256 by default")
    options.add_argument("--image-size", type=int, help="in pixels, the model's by default")
    options.add_argument("--precision", help="bf16 by default, bf16-fast, ...")
    given = vars(options.parse_args(arguments))
    model, sizes = given.pop("model"), {name: value for name, value in given.items() if value is not None}
    if model is None:
        if sizes:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in sizes)
            raise ConfigError(f"{names}: of use only with --model, such as --model DiT-XL/2")
        return doctor()
    memory(model, **sizes)
    return 0


def _plan(arguments: list[str]) -> int:
    from ditfast.plan.command import parser, run

    return run(parser().parse_args(arguments))


def _integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected comma-separated integers such as 207,360, got {text!r}") from None


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": _train, "sample": _sample, "export": _export, "demo": _demo, "plan": _plan,
    "doctor": _doctor,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Runs a command line; 0 if it did its job, 1 if not, 2 for bad input, 130 after a clean stop by Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from ditfast import __version__

        print(__version__)
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        from ditfast.config import nearest

        print(f"ditfast: unknown command {name!r}{nearest(name, COMMANDS)}\n\n{USAGE}", file=sys.stderr)
        return 2
    try:
        return _run(name, rest)
    except KeyboardInterrupt:
        print("ditfast: interrupted; what was saved before is whole", file=sys.stderr)
        return 130


def _run(name: str, rest: list[str]) -> int:
    """A sub-command, its errors as one line."""
    from ditfast.checkpoint import CheckpointError
    from ditfast.stopping import Interrupted
    from ditfast.train import TrainingError

    try:
        return COMMANDS[name](rest)
    except Interrupted as stop:
        print(f"ditfast: {stop}", file=sys.stderr)
        return 130
    except (ValueError, OSError, CheckpointError, TrainingError) as error:
        print(f"ditfast: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1


if __name__ == "__main__":
    sys.exit(main())
