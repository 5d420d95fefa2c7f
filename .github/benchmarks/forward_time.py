"""The time of a forward pass with SONA and without (Sec. 3.5), of one image and of 32, 384 x 128.

From the repository's folder; on a GPU if there is one, in float32:

    PYTHONPATH=. python .github/benchmarks/forward_time.py

It prints the mean and the standard deviation of ten runs, as the paper does.
"""

import time

import numpy as np
import torch

from model import SONANet


def main(height: int = 384, width: int = 128, batches: tuple[int, ...] = (1, 32)) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True
    networks = [SONANet(751, sona).eval() for sona in ("2", "none")]
    for network in networks:
        network.to(device, memory_format=torch.channels_last)
    for batch in batches:
        images = torch.randn(batch, 3, height, width, device=device)
        images = images.to(memory_format=torch.channels_last)
        times = []  # in turn, because a machine's speed drifts; the first three warm up
        for _ in range(3 + 10):
            times.append([milliseconds(network, images) for network in networks])
        (with_sona, without), deviations = np.mean(times[3:], 0), np.std(times[3:], 0)
        print(f"{batch:>2} images: {with_sona:.2f} +- {deviations[0]:.2f} ms with SONA, ", end="")
        print(f"{without:.2f} +- {deviations[1]:.2f} without; ratio {with_sona / without:.3f}")


@torch.inference_mode()
def milliseconds(network: torch.nn.Module, images: torch.Tensor) -> float:
    wait()
    start = time.perf_counter()
    network(images)
    wait()
    return 1000 * (time.perf_counter() - start)


def wait() -> None:
    """Until the GPU, if there is one, has done its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
