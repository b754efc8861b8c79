"""The group of processes that share a run."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device for "auto", "cpu", "cuda" or "cuda:N"; "auto" and "cuda" take the process's own GPU.

    Raises ValueError for any other name, and for a GPU that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{local_rank}"
    kind, _, index = name.partition(":")
    if name != "cpu" and (kind != "cuda" or not index.isdecimal()):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device {name!r} was asked for, but this PyTorch ({torch.__version__}) sees no CUDA device; "
            "use device=cpu, or install a CUDA build of PyTorch and check `nvidia-smi`"
        )
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} was asked for, but there are {torch.cuda.device_count()} CUDA devices")
    return device


def is_main_process() -> bool:
    """Whether this is the first of torchrun's processes, or the only one; known before they have joined."""
    return int(os.environ.get("RANK", 0)) == 0


@dataclass(frozen=True)
class World:
    """Rank and number of processes, and this process's device. Data parallel ranks are all there are."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    @contextmanager
    def join(cls, device: str) -> Iterator["World"]:
        """Joins the group that torchrun's environment describes (NCCL on CUDA, gloo on CPU); alone without one."""
        size = int(os.environ.get("WORLD_SIZE", 1))
        if size > 1 and device.startswith("cuda:"):
            raise ValueError(f"device {device!r} is one GPU for {size} processes; use device=cuda")
        picked = pick_device(device, int(os.environ.get("LOCAL_RANK", 0)))
        if picked.type == "cuda":
            torch.cuda.set_device(picked)
        if size == 1:
            yield cls(0, 1, picked)
            return
        joined_here = not dist.is_initialized()
        if joined_here and picked.type == "cuda":
            dist.init_process_group("nccl", device_id=picked)
        elif joined_here:
            dist.init_process_group("gloo")
        # Left as it is on an error: the others may wait in a collective, and leaving the group could wait for them.
        yield cls(dist.get_rank(), size, picked)
        if joined_here:
            dist.barrier()
            dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over all processes in place; returns it."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> Tensor:
        """Whether any process raised its flag, as a number on the CPU; a collective that does not wait for a GPU.

        On a GPU the number is there after the next synchronization of the current stream.
        """
        flags = torch.tensor(float(flag))
        if self.size == 1:
            return flags
        return self.sum_(flags.to(self.device, non_blocking=True)).to("cpu", non_blocking=True)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def rows(self, global_batch: int) -> slice:
        """This process's contiguous rows of a global batch."""
        local = global_batch // self.size
        return slice(self.rank * local, (self.rank + 1) * local)
