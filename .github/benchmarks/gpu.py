"""What a user with a GPU asks, measured on one in about five minutes.

From the repository's folder, on an otherwise idle GPU:

    PYTHONPATH=. python .github/benchmarks/gpu.py                              # trains on the toy
    PYTHONPATH=. python .github/benchmarks/gpu.py --dataset cuhk03 --data-dir DIR

    step        a training step's time and peak memory: float32, --fp16, each with --recompute, of
                128 images (one GPU) and of 32 (each of four)
    forward     a forward pass with SONA and without (Sec. 3.5)
    train       a short training at 384 x 128, in float32 and with --fp16
    evaluation  images a second of the trained networks' evaluation, and their mAP

--tiny tries the script itself on a CPU: a tiny network and tiny images.
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
from pathlib import Path

import forward_time
import numpy as np
import torch
from forward_time import wait
from torchvision.models.resnet import Bottleneck, ResNet

import data
import evaluate
import model
import train
from losses import branch_losses

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda:0" if GPU else "cpu")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dataset", choices=data.DATASETS, default="toy", help="[%(default)s]")
    parser.add_argument("--data-dir", default="datasets", help="[%(default)s]")
    parser.add_argument("--epochs", type=int, default=6, help="of each training [%(default)s]")
    parser.add_argument("--workers", type=int, default=8, help="[%(default)s]")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    size = 384, 128
    images_per_pass = 32
    steps = 12
    if args.tiny:  # four blocks instead of sixteen
        size = 32, 16
        images_per_pass = 4
        steps = 2
        args.epochs = args.workers = 1
        model.resnet50 = lambda **flags: ResNet(Bottleneck, [1, 1, 1, 1], **flags)
    name = torch.cuda.get_device_name() if GPU else "a CPU"
    print(f"{name}, PyTorch {torch.__version__}\n")
    precisions = (False, True) if GPU else (False,)  # CPUs have no fast fp16

    print("step")
    for fp16 in precisions:
        measure_step(steps, 1, images_per_pass, *size, fp16, recompute=False)
        measure_step(steps, 4, images_per_pass, *size, fp16, recompute=False)
        measure_step(steps, 4, images_per_pass, *size, fp16, recompute=True)

    print("\nforward")
    forward_time.main(*size)

    splits = data.load_dataset(args.dataset, args.data_dir)
    for fp16 in precisions:
        print(f"\ntrain and evaluation{', --fp16' * fp16}")
        with tempfile.TemporaryDirectory() as run:
            train_run(Path(run), args, images_per_pass, *size, fp16)
            measure_evaluation(Path(run), splits, args.workers)


def measure_step(
    steps: int,
    passes: int,
    images_per_pass: int,
    height: int,
    width: int,
    fp16: bool,
    recompute: bool,
) -> None:
    """Prints a step's median time, and the peak memory that PyTorch allocated."""
    images = passes * images_per_pass
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    network = model.SONANet(767).to(DEVICE, memory_format=torch.channels_last).train()
    optimizer = torch.optim.Adam(network.parameters(), 1e-4, weight_decay=5e-4, fused=True)
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=fp16)
    runner = train.Passes(network, images_per_pass, 0, fp16, recompute)
    batch = torch.randint(256, (images, 3, height, width), dtype=torch.uint8, device=DEVICE)
    labels = torch.arange(images, device=DEVICE) // 4
    seconds = []
    for step in range(steps):
        if GPU and step == steps // 3:  # without what the search for algorithms needed
            torch.cuda.reset_peak_memory_stats()
        wait()
        start = time.perf_counter()
        loss, _ = branch_losses(runner(batch, (0, 0, step)), labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        wait()
        seconds.append(time.perf_counter() - start)
    median = np.median(seconds[steps // 3 :])
    flags = f"{'--fp16 ' * fp16}{'--recompute' * recompute}"
    memory = f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB" if GPU else ""
    print(f"{images:>4} images {flags:<20}{1000 * median:8.1f} ms ", end="")
    print(f"{images / median:6.0f} images/s  {memory}", flush=True)


def train_run(
    run: Path, args: argparse.Namespace, images_per_pass: int, height: int, width: int, fp16: bool
) -> None:
    """Trains a run with train.py and prints its first and last epoch."""
    sys.argv = ["train.py", "--dataset", args.dataset, "--data-dir", args.data_dir]
    sys.argv += ["--output", run, "--epochs", args.epochs, "--height", height, "--width", width]
    sys.argv += ["--workers", args.workers, "--weights", "none", "--eval-every", 0]
    sys.argv += ["--ids-per-batch", images_per_pass, "--images-per-pass", images_per_pass]
    sys.argv += ["--fp16" if fp16 else "--no-fp16"]
    sys.argv = [str(argument) for argument in sys.argv]
    with contextlib.redirect_stdout(io.StringIO()):
        train.main()
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for record in (records[0], records[-1]):
        print(f"epoch {record['epoch']:>3}: loss {record['loss']:.3f}, ", end="")
        print(f"{record['images_per_second']:.0f} images/s, loading included", flush=True)


def measure_evaluation(run: Path, splits: dict[str, data.Split], workers: int) -> None:
    """Prints the speed of extracting a run's embeddings, and its metrics."""
    network, settings = evaluate.load_run(run, DEVICE)
    _, query, gallery = splits.values()
    size = settings["height"], settings["width"]
    start = time.perf_counter()
    features = evaluate.extract_splits(network, query, gallery, *size, workers)
    seconds = time.perf_counter() - start
    images = len(query.paths) + len(gallery.paths)
    ranking = evaluate.evaluate_ranking(*features, query.ids, gallery.ids, query.cams, gallery.cams)
    print(f"evaluation: {images / seconds:.0f} images/s, {evaluate.summary(ranking.metrics())}")


if __name__ == "__main__":
    main()
