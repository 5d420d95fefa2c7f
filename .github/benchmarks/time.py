"""Sec. 3.5: the time of a forward pass with the SONA modules and without, of one image and of 32, 384 x 128.

From the repository's folder: PYTHONPATH=. python .github/benchmarks/time.py
"""

import time  # Python's own, as built-in modules come first

import numpy as np
import torch

from model import SONANet

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
torch.backends.cudnn.benchmark = True
variants = [
    SONANet(751, sona).to(device, memory_format=torch.channels_last).eval()
    for sona in ("2", "none")
]
wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
for batch in (1, 32):
    images = torch.randn(batch, 3, 384, 128, device=device).to(memory_format=torch.channels_last)
    times = []
    for _ in range(3 + 10):  # three to warm up; both in turn, as a machine's speed drifts
        for network in variants:
            wait()
            start = time.perf_counter()
            with torch.inference_mode():
                network(images)
            wait()
            times.append(1000 * (time.perf_counter() - start))
    times = np.reshape(times, (-1, 2))[3:]
    (with_sona, without), deviations = np.median(times, 0), times.std(0)
    print(
        f"{batch:>2} images: {with_sona:.2f} +- {deviations[0]:.2f} ms with SONA, {without:.2f} +- {deviations[1]:.2f} "
        f"without; ratio {with_sona / without:.3f}"
    )
