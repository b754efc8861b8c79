"""Which storages are alive: what a forward leaves behind for its backward, to the byte."""

from collections.abc import Collection
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Storages(TorchDispatchMode):
    """Weak references to the storage of every result inside, whoever made it.

    Hooks on saved tensors would see nothing of what a checkpoint keeps.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.seen[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return results

    def alive(self, without: Collection[int] = ()) -> int:
        """Bytes of those that are alive now, but for storages of these `_cdata`."""
        return sum(n for key, (weak, n) in self.seen.items() if key not in without and not weak.expired())
