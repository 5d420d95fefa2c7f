"""The peak memory of SONA's forward and backward pass on one image.

From the repository's folder: PYTHONPATH=. python .github/benchmarks/sona_memory.py 48 16      and 96 32, 192 64
"""

import sys

import torch

from model import SONA


def peak():  # MB
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024


sona, (height, width) = SONA(512), map(int, sys.argv[1:])
sona(torch.randn(1, 512, 16, 8, requires_grad=True)).sum().backward()
x = torch.randn(1, 512, height, width, requires_grad=True)
before = peak()
sona(x).sum().backward()
print(f"{height} x {width}: {peak() - before:.0f} MB")
