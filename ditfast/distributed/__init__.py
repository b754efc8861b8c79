"""Processes of a run: started by torchrun (or alone), their ranks, devices and reductions."""

from ditfast.distributed.world import World, pick_device

__all__ = ["World", "pick_device"]
