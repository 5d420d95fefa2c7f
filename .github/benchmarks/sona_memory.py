"""The peak memory of SONA's forward and backward pass on one image.

From the repository's folder, with the height and width of the map:

    PYTHONPATH=. python .github/benchmarks/sona_memory.py 48 16    # and 96 32, 192 64
"""

import sys
from pathlib import Path

import torch

from model import SONA


def peak():
    """This process's peak memory in MiB (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


height, width = map(int, sys.argv[1:])
sona = SONA(512)
sona(torch.randn(1, 512, 16, 8, requires_grad=True)).sum().backward()  # what PyTorch keeps itself
x = torch.randn(1, 512, height, width, requires_grad=True)
before = peak()
sona(x).sum().backward()
print(f"{height} x {width}: {peak() - before:.0f} MiB")
