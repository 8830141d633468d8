"""What a process has used of memory at its worst, by its own high-water mark."""

import resource
import sys

import torch

GIB = 2**30


def peak_gib() -> float:
    """The most memory this process has held, in GiB: allocated on the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    kib_or_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib_or_bytes * (1 if sys.platform == "darwin" else 1024) / GIB
