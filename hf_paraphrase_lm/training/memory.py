"""Memory of a training on a CPU."""

import ctypes
import os
import platform

# Parameters of glibc's mallopt(3).
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
LARGEST = 2**31 - 1
# What a user sets about these thresholds stands.
VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_")


def keep_freed_memory() -> bool:
    """Lets this process keep the memory of large freed tensors for the next ones. For training on a CPU.

    By default glibc gives every block of more than 32 MB back to Linux as soon as it is freed, and the next update gets
    it anew, a page at a time. MARGE with eight groups in a batch learned 1.55 times as many tokens a second with this,
    in 1.18 times the memory (examples/benchmarks/RESULTS.md); small batches have no such blocks.

    Returns:
        Whether the process does so from now on: not where the C library is another one than glibc, nor where an
        environment variable such as `MALLOC_MMAP_THRESHOLD_` or `GLIBC_TUNABLES` says how much it is to keep.
    """
    is_set = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or any(name in os.environ for name in VARIABLES)
    if is_set or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # It returns 1 for what it has accepted. A trim threshold of -1 is the largest one.
    return bool(mallopt(MMAP_THRESHOLD, LARGEST) and mallopt(TRIM_THRESHOLD, -1))
