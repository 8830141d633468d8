"""Freed memory is kept for the next tensors while training, and given back afterwards."""

import resource
import sys

import psutil
import pytest
import torch

from gptoss_ft.training.memory import keeping_freed_memory

NUMBERS = 64 * 2**20  # 256 MiB of fp32: above every threshold that the C library chooses by itself
PAGES = 4 * NUMBERS // 4096

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc is on Linux")


def faults(count):
    """Page faults of filling `count` tensors, one after the other.

    Each is 1 MiB smaller than the one before, so that something small in the gap that one left does not matter.
    """
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for i in range(count):
        torch.empty(NUMBERS - i * 2**18).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_a_tensor_takes_the_pages_of_the_one_before():
    if faults(6) < 5 * PAGES:
        pytest.skip("another allocator, or huge pages, keep tensors from being mapped anew")
    resident = psutil.Process().memory_info().rss
    with keeping_freed_memory():
        assert faults(6) < 1.5 * PAGES
        assert psutil.Process().memory_info().rss > resident + 3 * NUMBERS
    assert psutil.Process().memory_info().rss < resident + NUMBERS
    assert faults(6) > 5 * PAGES
