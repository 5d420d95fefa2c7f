"""The time of a forward pass with SONA and without (Sec. 3.5), of one image and of 32, 384 x 128.

From the repository's folder; on a GPU if there is one, in float32:

    PYTHONPATH=. python .github/benchmarks/time.py
"""

import time  # Python's own, because built-in modules come first

import numpy as np
import torch

from model import SONANet

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
torch.backends.cudnn.benchmark = True


def wait():
    if device.type == "cuda":
        torch.cuda.synchronize()


variants = []
for sona in ("2", "none"):
    network = SONANet(751, sona).eval()
    variants.append(network.to(device, memory_format=torch.channels_last))
for batch in (1, 32):
    images = torch.randn(batch, 3, 384, 128, device=device).to(memory_format=torch.channels_last)
    times = []
    for _ in range(3 + 10):  # three to warm up; both in turn, because a machine's speed drifts
        for network in variants:
            wait()
            start = time.perf_counter()
            with torch.inference_mode():
                network(images)
            wait()
            times.append(1000 * (time.perf_counter() - start))
    times = np.reshape(times, (-1, 2))[3:]
    with_sona, without = np.median(times, 0)
    deviations = times.std(0)
    print(f"{batch:>2} images: {with_sona:.2f} +- {deviations[0]:.2f} ms with SONA, ", end="")
    print(f"{without:.2f} +- {deviations[1]:.2f} without; ratio {with_sona / without:.3f}")
