"""torch's meta device, which has shapes and no values, as if it were a GPU whose memory is counted."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

BLOCK = 512  # bytes that CUDA's allocator rounds up to
aten = torch.ops.aten


def rounded(size: int) -> int:
    """Bytes that the allocator takes for so many."""
    return -(-size // BLOCK) * BLOCK


class GPU:
    """What a GPU does and the meta device does not: fused attention, and autocast to `dtype` (None: none).

    A function mode would be off in a backward pass, where checkpointed blocks run again.
    """

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype, self.copies = dtype, None

    def __enter__(self) -> None:
        self.own = {name: getattr(functional, name) for name in ("linear", "conv2d", "scaled_dot_product_attention")}
        functional.linear = lambda *given: self.own["linear"](*map(self._lowered, given))
        functional.conv2d = lambda x, weight, bias, *how: self.own["conv2d"](
            *map(self._lowered, (x, weight, bias)), *how
        )
        functional.scaled_dot_product_attention = self._attention

    def __exit__(self, *error) -> None:
        for name, function in self.own.items():
            setattr(functional, name, function)

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """Inside, 16-bit copies of trained weights are kept; a checkpointed backward pass makes them anew."""
        self.copies = {}
        try:
            yield
        finally:
            self.copies = None

    def _attention(self, *given: Tensor, **_) -> Tensor:
        query, key, value = map(self._lowered, given[:3])
        if query.dtype != torch.float32 and query.shape[-1] <= 256:
            return aten._scaled_dot_product_flash_attention(query, key, value)[0]
        return aten._scaled_dot_product_efficient_attention(query, key, value, None, torch.is_grad_enabled())[0]

    def _lowered(self, one: Tensor | None) -> Tensor | None:
        if self.dtype is None or one is None or one.dtype != torch.float32:
            return one
        if self.copies is None or not (one.is_leaf and one.requires_grad and torch.is_grad_enabled()):
            return one.to(self.dtype)
        if one not in self.copies:
            self.copies[one] = one.to(self.dtype)
        return self.copies[one]


class Living(TorchDispatchMode):
    """Bytes of a device's storages that are alive among those made inside, as a GPU's allocator would hold them."""

    def __init__(self, device: str = "meta") -> None:
        super().__init__()
        self.device = device
        self.bytes = self.peak = 0
        self.seen: set[int] = set()

    def peak_of(self, work: Callable[[], object]) -> int:
        """The most bytes that are alive while it works."""
        gc.collect()
        self.peak = self.bytes
        work()
        return self.peak

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is aten._local_scalar_dense.default and args[0].is_meta:
            return True  # of a check whose tensor has no value here
        result = func(*args, **(kwargs or {}))
        for one in tree_iter(result):
            if isinstance(one, Tensor) and one.device.type == self.device:
                self._see(one.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, rounded(storage.nbytes())
        if key not in self.seen:
            self.seen.add(key)
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.bytes -= size
