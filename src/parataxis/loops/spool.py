"""Where the states of a long loop are kept: in memory up to a bound, behind it in temporary files.

Recording, solving and replaying keep some ten states a step, but a round looks at those of its window only. What a file
holds is mapped into memory: its tensors are tensors like any other, and their pages are given back when a few megabytes
of them have been touched. So memory is bounded by the window, not by the number of steps.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Spool", "looked_at"]

IN_MEMORY = 8 << 20  # bytes of a call that are kept in memory before a file is begun
SMALLEST = 16 << 10  # bytes of a tensor that goes to a file
CHUNK = 32 << 20  # bytes of a file; it goes when all of its tensors have gone
TOUCHED = 4 << 20  # bytes whose pages may be in memory before they are given back
CAN_MAP = hasattr(mmap, "MADV_DONTNEED") and hasattr(os, "posix_fallocate")  # Linux


class _Mapped:
    """The files of all spools, and how much of them has been touched since their pages were given back."""

    def __init__(self) -> None:
        self.chunks: list[weakref.ref[mmap.mmap]] = []
        self.touched = 0

    def touch(self, size: int) -> None:
        self.touched += size
        if self.touched < TOUCHED or not self.chunks:
            return
        self.touched = 0
        open_chunks = [chunk for reference in self.chunks if (chunk := reference()) is not None]
        self.chunks = [weakref.ref(chunk) for chunk in open_chunks]
        for chunk in open_chunks:
            chunk.madvise(mmap.MADV_DONTNEED)  # the file keeps what was written


_MAPPED = _Mapped()


def looked_at(tensor: Tensor) -> None:
    """Note that a tensor which may be kept in a file has been read: a pass over all steps reads many of them."""
    _MAPPED.touch(tensor.numel() * tensor.element_size())


class Spool:
    """Keeps tensors of the CPU; those of other devices stay where they are.

    Args:
        in_memory: Bytes that are kept in memory before a file is begun.
    """

    def __init__(self, in_memory: int = IN_MEMORY) -> None:
        self._left = in_memory
        self._chunk: mmap.mmap | None = None
        self._first = 0  # free byte of the chunk
        self._maps = CAN_MAP

    def __repr__(self) -> str:
        """Return whether it has begun a file."""
        return f"Spool({'in memory' if self._chunk is None else 'in files'})"

    def keep(self, tensor: Tensor) -> Tensor:
        """Return a tensor with this content: the same one, or a copy in a file."""
        room = self._room(tensor.shape, tensor)
        return tensor if room is None else room.copy_(tensor)

    def copy(self, tensor: Tensor) -> Tensor:
        """Return a copy."""
        tensor = tensor.detach()
        room = self._room(tensor.shape, tensor)
        return tensor.clone() if room is None else room.copy_(tensor)

    def stack(self, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
        """Return tensors of one shape as one tensor."""
        shape = list(tensors[0].shape)
        shape.insert(dim, len(tensors))
        stacked = self._room(torch.Size(shape), tensors[0])
        if stacked is None:
            return torch.stack(list(tensors), dim)
        for i, tensor in enumerate(tensors):
            stacked.select(dim, i).copy_(tensor)
            looked_at(tensor)
        return stacked

    def _room(self, shape: torch.Size, like: Tensor) -> Tensor | None:
        """Return room in a file for a tensor of this shape; None if it belongs in memory."""
        size = shape.numel() * like.element_size()
        if not self._maps or like.device.type != "cpu" or like.layout != torch.strided or size < SMALLEST:
            return None
        if size <= self._left:
            self._left -= size
            return None
        if self._chunk is None or self._first + size > len(self._chunk):
            self._begin_chunk(max(CHUNK, size))
        if self._chunk is None:
            return None
        first, self._first = self._first, -(-(self._first + size) // mmap.PAGESIZE) * mmap.PAGESIZE
        _MAPPED.touch(size)
        return torch.frombuffer(self._chunk, dtype=like.dtype, count=shape.numel(), offset=first).view(shape)

    def _begin_chunk(self, size: int) -> None:
        """Begin a file, unless there is no room for it, now or later."""
        size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        try:
            with tempfile.TemporaryFile() as file:  # the mapping outlives it
                os.posix_fallocate(file.fileno(), 0, size)  # writing to a full disk would end the process
                self._chunk, self._first = mmap.mmap(file.fileno(), size), 0
        except OSError:
            self._chunk, self._maps = None, False
            return
        _MAPPED.chunks.append(weakref.ref(self._chunk))
