"""Where a process has the memory of a large tensor, as glibc tells; each case in a process of its own."""

import os
import platform
import subprocess
import sys

import pytest

from hf_paraphrase_lm import keep_freed_memory

# Prints how many MB a tensor of 100 MB adds to the heap and to blocks beside it, and how many its end takes from both.
MEASURE = """
import ctypes, torch
from hf_paraphrase_lm import keep_freed_memory

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd a b c d e".split()]

mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Info

def megabytes():
    info = mallinfo2()
    return torch.tensor([info.arena, info.hblkhd]) // 1_000_000

def measure():
    before = megabytes()
    tensor = torch.ones(25_000_000)
    during = megabytes()
    del tensor
    return (during - before).tolist() + (during - megabytes()).tolist()

print(keep_freed_memory(), *measure())
"""
pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="says how glibc allocates")


def measure(**variables: str) -> tuple[bool, list[float]]:
    words = subprocess.check_output([sys.executable, "-c", MEASURE], text=True, env=os.environ | variables).split()
    return words[0] == "True", [int(word) for word in words[1:]]


def test_freed_memory_is_kept():
    keeps, (heap, beside, heap_freed, beside_freed) = measure()
    assert keeps and 90 < heap < 120 and heap_freed == 0
    assert beside == beside_freed == 0


@pytest.mark.parametrize(
    "variable", [{"MALLOC_MMAP_THRESHOLD_": "1000000"}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=1000000"}]
)
def test_what_the_user_sets_stands(variable):
    keeps, (_, beside, _, beside_freed) = measure(**variable)
    assert not keeps and min(beside, beside_freed) > 90


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert keep_freed_memory() is False
