"""The options of `ditfast plan`, and from them to a job, a cluster and the report."""

import argparse
from pathlib import Path

import torch

from ditfast.build import build_model
from ditfast.config import PRECISIONS, ConfigError, checked_precision, load_config
from ditfast.hardware import Ceilings, datasheet, gpu, measured
from ditfast.layers import policy_of_block
from ditfast.plan import Cluster, Job, published_config
from ditfast.plan.against import as_json, compare, print_comparisons, save_comparisons
from ditfast.plan.report import make_plan, print_plan, save_plan


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(
        prog="ditfast plan", allow_abbrev=False,
        description="Predict step time, memory and communication of a training, and propose how to spread it over GPUs "
        "and what to recompute. Nothing is run; no GPU is needed.",
    )  # fmt: skip
    made.add_argument("--model", help="a preset of ditfast train: DiT-XL/2, DiT-XL/2@512, digits, ...")
    made.add_argument("--config", help="in its place a YAML file of a run; either tells batch, precision and EMAs too")
    made.add_argument("--image-size", type=int, help="of --model in pixels")
    made.add_argument("--gpu", help="h100, a100-40gb, ...; by default the one here")
    made.add_argument("--gpus", type=int, help="how many, in all nodes; 1 by default, or --nodes times --gpus-per-node")
    made.add_argument("--gpus-per-node", type=int, default=8)
    made.add_argument("--nodes", type=int)
    made.add_argument(
        "--network", type=float, help="GB/s of each GPU to other nodes, by default of the vendor's server"
    )
    made.add_argument("--batch-size", type=int, help="of all GPUs; by default the preset's or the file's")
    made.add_argument("--precision", help="bf16, bf16-fast, ...; by default the preset's or the file's")
    made.add_argument("--policy", help="recompute: none, ops, mlp, block, block:k; by default the fastest that fits")
    made.add_argument("--ceilings", help="datasheet, or a file of python -m bench limits; by default what was measured "
                      "on such a GPU here, else the datasheet")  # fmt: skip
    made.add_argument("--against", type=Path, nargs="+", default=[], metavar="FILE",
                      help="results of python -m bench model --json FILE: prints the model's error")  # fmt: skip
    made.add_argument("--json", type=Path, metavar="FILE", help="writes the plan, the comparisons, there as well")
    return made


def run(options: argparse.Namespace) -> int:
    """Prints the plan; 0, or 1 where no layout fits. ConfigError for options that cannot be."""
    if options.json is not None and options.json.is_dir():
        raise ConfigError(f"--json {options.json} is a folder, expected a file's name")
    compared = [compare(path) for path in options.against]
    rows, passed_over = (
        [row for found, _ in compared for row in found],
        [line for _, lines in compared for line in lines],
    )
    planned = options.model is not None or options.config is not None
    if not planned and not options.against:
        raise ConfigError("what to plan for? give --model, such as --model DiT-XL/2, or --config FILE")
    status = 0
    if planned:
        job, name, precision = _job(options)
        plan = make_plan(job, _cluster(options), options.policy)
        print_plan(plan, name, precision)
        if options.json is not None:
            save_plan(plan, options.json, name, precision, as_json(rows))
        status = int(plan.proposed is None)
    elif options.json is not None:
        save_comparisons(rows, options.json)
    if options.against:
        print_comparisons(rows, passed_over)
    if options.json is not None:
        print(options.json)
    return status


def _job(options: argparse.Namespace) -> tuple[Job, str, str]:
    """(job, what to call the model, name of the precision)."""
    if options.model is not None and options.config is not None:
        raise ConfigError("--model and --config both name a model; give one of them")
    if options.policy is not None:
        try:
            policy_of_block(options.policy, 0)
        except ValueError as error:
            raise ConfigError(f"--policy: {error}") from error
    if options.config is not None:
        if options.image_size is not None:
            raise ConfigError("--image-size is of use only with --model; set model.input_size in the file of --config")
        config, name = load_config(options.config), str(options.config)
    else:
        config, name = published_config(options.model, options.image_size), options.model
        if options.image_size is not None:
            name = f"{name.partition('@')[0]}@{options.image_size}".removesuffix("@256")
    with torch.device("meta"):
        model = build_model(config.model)
    batch = config.train.batch_size if options.batch_size is None else options.batch_size
    precision = checked_precision(options.precision or config.train.precision)
    emas = len(config.optim.ema_rates)
    return Job(model, PRECISIONS[precision], batch, config.train.accumulate, emas), name, precision


def _cluster(options: argparse.Namespace) -> Cluster:
    name, gpus = options.gpu, options.gpus
    if name is None:
        if not torch.cuda.is_available():
            raise ConfigError("there is no GPU here to plan for; name one, such as --gpu h100")
        name = torch.cuda.get_device_name()
    if options.nodes is not None:
        if options.nodes < 1:
            raise ConfigError(f"--nodes must be positive, got {options.nodes}")
        if gpus not in (None, options.nodes * options.gpus_per_node):
            raise ConfigError(
                f"--gpus {gpus} contradicts --nodes {options.nodes} with {options.gpus_per_node} in each; give one"
            )
        gpus = options.nodes * options.gpus_per_node
    ceilings = _ceilings(options.ceilings, name)
    return Cluster(gpu(name), 1 if gpus is None else gpus, options.gpus_per_node, ceilings, options.network)


def _ceilings(asked: str | None, name: str) -> Ceilings:
    """Those asked for; by default measured ones of such a GPU where there are any."""
    found = datasheet(name)
    if asked == "datasheet":
        return found
    kept = measured(name, None if asked is None else Path(asked), torch.__version__ if asked is None else None)
    if kept is None and asked is not None:
        raise ConfigError(f"{asked} has no measured ceilings of {name}; --ceilings is datasheet, or a file that has")
    return found if kept is None else kept
