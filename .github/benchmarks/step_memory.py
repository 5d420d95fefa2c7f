r"""The peak memory of a training step, on a CPU: a check of README's memory estimate.

From the repository's folder, with the number of images in the batch:

    PYTHONPATH=. python .github/benchmarks/step_memory.py 32 --height 256
    PYTHONPATH=. python .github/benchmarks/step_memory.py 32 --height 256 \
        --recompute --images-per-pass 8
"""

import argparse
from pathlib import Path

import torch

from losses import branch_losses
from model import SONANet
from train import Passes


def peak():
    """This process's peak memory in GiB (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


parser = argparse.ArgumentParser()
parser.add_argument("images", type=int)
parser.add_argument("--height", type=int, default=384)
parser.add_argument("--width", type=int, default=128)
parser.add_argument("--images-per-pass", type=int, default=32)
parser.add_argument("--recompute", action="store_true")
args = parser.parse_args()

torch.manual_seed(0)
before = peak()
network = SONANet(767).to(memory_format=torch.channels_last).train()
optimizer = torch.optim.Adam(network.parameters(), fused=True)
model = Passes(network, args.images_per_pass, recompute=args.recompute)
images = torch.randint(256, (args.images, 3, args.height, args.width), dtype=torch.uint8)
labels = torch.arange(args.images) // 4
for step in range(2):  # Adam's state is there from the second on
    loss, _ = branch_losses(model(images, (0, 0, step)), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"{peak() - before:.1f} GiB above the {before:.1f} of PyTorch itself")
