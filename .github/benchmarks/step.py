"""A training step of 128 images of 96 x 32: its time by precision, and the share outside of network and Adam.

From the repository's folder: PYTHONPATH=. python .github/benchmarks/step.py
"""

import time

import torch

from data import augment
from losses import branch_losses
from model import SONANet

network = SONANet(767).to(memory_format=torch.channels_last).train()
optimizer = torch.optim.Adam(network.parameters(), weight_decay=5e-4, fused=True)
raw, labels = torch.randint(256, (128, 3, 96, 32), dtype=torch.uint8), torch.arange(32).repeat_interleave(4)
for half in (False, True) * 3:
    t = [time.perf_counter()]
    images = augment(raw)
    t.append(time.perf_counter())
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        outputs = network(images)
    t.append(time.perf_counter())
    cut = {branch: [x.detach().requires_grad_() for x in pair] for branch, pair in outputs.items()}
    branch_losses(cut, labels)[0].backward()
    t.append(time.perf_counter())
    gradients = [x.grad for pair in cut.values() for x in pair]
    torch.autograd.backward([x for pair in outputs.values() for x in pair], gradients)
    optimizer.step()
    optimizer.zero_grad()
    t.append(time.perf_counter())
    step, ours = t[4] - t[0], t[1] - t[0] + t[3] - t[2]
    print("bf16" if half else "float32", f"step {step:.2f} s, outside network and Adam {ours / step:.2%}")
