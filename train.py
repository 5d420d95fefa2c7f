# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors of SONA-Net in plain PyTorch
"""Train SONA-Net (Xia et al., ICCV 2019).

Usage:
    python train.py                                                    # the toy, on any machine
    torchrun --nproc_per_node=4 train.py --dataset cuhk03              # the paper's run (Sec. 3.2)
    python train.py --dataset cuhk03 --recompute                       # the same run on one GPU
    python train.py --dataset market1501 --sona 2+3 --output runs/m23  # a variant
    python train.py --dataset cuhk03 --resume                          # resume where it stopped
"""

import argparse
import json
import math
import multiprocessing
import os
import sys
import time
from argparse import BooleanOptionalAction
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from data import DATASETS, DataError, IdentitySampler, ImageDataset, augment, describe, load_dataset
from evaluate import PRECISIONS, default_precision, evaluate, memory_format, summary
from losses import branch_losses, gather
from model import DROPS, PLACEMENTS, SONANet

# What the bare `python train.py` runs instead of the paper's settings: minutes on a CPU.
TOY = dict(
    height=64, width=32, ids_per_batch=8, epochs=30, eval_every=10, weights="none", workers=0
)
CHECKPOINT_SECONDS = 300  # the least time between two checkpoints


def main() -> None:
    args, resumed = parse_args()
    device, rank, processes = start_process()
    args.precision = args.precision or default_precision(device)
    output = Path(args.output)
    history = resumed["history"] if resumed else []  # a record for each epoch
    started = gather(torch.tensor([len(history)], device=device))
    assert (started == len(history)).all(), f"{output} is not the same folder for all processes"

    # data
    splits = load_dataset(args.dataset, args.data_dir)
    train = splits["train"]
    dataset = ImageDataset(train.paths, train.labels, args.height, args.width)
    sampler = IdentitySampler(
        train.labels, args.ids_per_batch, args.images_per_id, args.seed, rank, processes
    )
    epochs = range(len(history), args.epochs)
    loader = DataLoader(
        dataset,
        batch_sampler=batches_of(sampler, epochs),
        num_workers=args.workers,
        pin_memory=device.type == "cuda",
    )
    print(describe(args.dataset, splits))

    # network
    torch.manual_seed(args.seed)
    weights = None if resumed or args.weights == "none" else args.weights
    network = SONANet(len(train.labels.unique()), args.sona, args.drop, weights)
    network.to(device, memory_format=memory_format(device, args.precision))
    # Not in the paper: weight decay 5e-4, as an L2 term, on all parameters.
    optimizer = torch.optim.Adam(network.parameters(), args.lr, weight_decay=5e-4, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    if resumed:
        network.load_state_dict(resumed["network"])
        optimizer.load_state_dict(resumed["optimizer"])
        if resumed["scaler"]:  # empty unless the run was in fp16
            scaler.load_state_dict(resumed["scaler"])
        del resumed  # 0.4 GB
    compiled = torch.compile(network) if args.compile else network
    model = Passes(compiled, args.images_per_pass, rank, args.precision, args.recompute)
    if processes > 1:
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    print(f"SONA {args.sona}, drop {args.drop}; {processes} x {device.type}, {args.precision}\n")

    # evaluation and the run's folder
    test = splits["query"], splits["gallery"], args.height, args.width, args.workers
    if rank == 0:
        output.mkdir(parents=True, exist_ok=True)
        (output / "args.json").write_text(json.dumps(vars(args), indent=2))
    if args.eval_every and not history:
        print(f"untrained    {summary(evaluate(network, *test).metrics())}\n")

    # training loop
    print(f"{'global branch':>32}{'local branch':>22}")
    print(f"epoch    loss{' triplet  x-ent    acc' * 2}       lr  img/s  left")
    batches = iter(loader)
    saved = time.perf_counter()
    for epoch in epochs:
        start = time.perf_counter()
        sums = {}
        model.train()
        torch.backends.cudnn.benchmark = True  # training's shapes are fixed, evaluation's vary
        lr = learning_rate(epoch, args.epochs, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr

        for step in range(len(sampler)):
            images, labels = (tensor.to(device, non_blocking=True) for tensor in next(batches))

            # augmentation and forward, pass by pass
            outputs = model(images, (args.seed, epoch, step))

            # gradients of the four losses
            loss, parts = branch_losses(outputs, labels, args.margin)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

            # sums for the log, on the device, so that no step waits for a copy
            for name, part in parts.items():
                sums[name] = sums.get(name, 0) + part
            if sys.stdout.isatty():
                print(f"\r  step {step + 1} of {len(sampler)}", end="\r", flush=True)
        torch.backends.cudnn.benchmark = False

        # once per epoch: log, evaluate, save
        means = gather(torch.stack([*sums.values()])[None]).mean(0) / len(sampler)
        record = {"epoch": epoch, "lr": lr, **dict(zip(sums, means.tolist(), strict=True))}
        if not math.isfinite(record["loss"]):
            raise FloatingPointError(f"the loss of epoch {epoch} is {record['loss']}; lower --lr")
        seconds = time.perf_counter() - start
        record["images_per_second"] = (
            len(sampler) * args.ids_per_batch * args.images_per_id / seconds
        )
        print(row(record, seconds * (args.epochs - epoch - 1)), flush=True)
        last = epoch + 1 == args.epochs  # not in the paper: the last is reported, not the best
        if last or args.eval_every and (epoch + 1) % args.eval_every == 0:
            record |= evaluate(network, *test).metrics()
            print(f"{'trained' if last else '':<13}{summary(record)}", flush=True)
        history.append(record)
        if rank == 0:
            lines = [json.dumps(record) + "\n" for record in history]
            (output / "log.jsonl").write_text("".join(lines))
            if last or time.perf_counter() - saved >= CHECKPOINT_SECONDS:
                state = {
                    "network": network.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "scaler": scaler.state_dict(),
                    "history": history,
                    "settings": vars(args),
                }
                save(state, output / "last.pt")
                saved = time.perf_counter()
    print(f"\nthe run is in {output}")

    if dist.is_initialized():
        dist.barrier()  # gloo's threads may need the GIL to free tensors, and the destroyer holds it
        del model  # DDP, too, holds the group, and would otherwise destroy it last
        dist.destroy_process_group()


def parse_args() -> tuple[argparse.Namespace, dict | None]:
    """The settings (typed flags override a resumed run's) and the checkpoint to resume, if any."""
    toy = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in TOY.items())
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]",
        description=f"Train SONA-Net. The defaults are the paper's (Sec. 3.2); for the toy: {toy}.",
    )
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=DATASETS, help="data set to train on [toy, drawn on first use]")
    add("--data-dir", default="datasets", help="folder that holds the data sets [%(default)s]")
    add("--height", type=int, default=384, help="image height in pixels [%(default)s]")
    add("--width", type=int, default=128, help="image width in pixels [%(default)s]")
    add("--workers", type=int, default=2, help="data-loader processes per GPU [%(default)s]")
    add = parser.add_argument_group("network").add_argument
    add("--sona", choices=PLACEMENTS, default="2", help="stages that SONA follows [%(default)s]")
    add(
        "--drop",
        choices=DROPS,
        default="dropblock+",
        help="drop layer of the local branch [%(default)s]",
    )
    add(
        "--weights",
        default="imagenet",
        metavar="{imagenet,none,PATH}",
        help="initial weights of the backbone [%(default)s]",
    )
    add = parser.add_argument_group("training").add_argument
    add(
        "--ids-per-batch",
        type=int,
        default=32,
        help="identities per batch, summed over all processes [%(default)s]",
    )
    add("--images-per-id", type=int, default=4, help="images per identity [%(default)s]")
    add("--epochs", type=int, default=400, help="the schedule scales with them [%(default)s]")
    add(
        "--lr",
        type=float,
        default=1e-3,
        help="peak learning rate; lower it for small batches [%(default)s]",
    )
    add("--margin", type=float, help="hard triplet margin, e.g. 0.3 [soft margin]")
    add(
        "--seed",
        type=int,
        default=0,
        help="random seed; the paper reports means of four runs [%(default)s]",
    )
    add = parser.add_argument_group("device").add_argument
    add(
        "--images-per-pass",
        type=int,
        default=32,
        help="images per forward pass, over which batch norm takes its statistics [%(default)s]",
    )
    add(
        "--recompute",
        action=BooleanOptionalAction,
        help="recompute activations in the backward pass: "
        "with four passes, a third of the memory for a quarter more work",
    )
    add(
        "--precision",
        choices=PRECISIONS,
        help="[fp16 on GPUs of compute capability 7.0 or more, else float32]",
    )
    add(
        "--compile",
        action=BooleanOptionalAction,
        help="torch.compile the network: faster after the first minute; draws other drop masks",
    )
    add = parser.add_argument_group("run").add_argument
    add("--output", help="folder of the run [runs/DATASET]")
    add(
        "--resume",
        action="store_true",
        help="resume the run in --output, or start it if there is none",
    )
    add(
        "--eval-every",
        type=int,
        default=50,
        help="evaluate every N epochs; 0: only after the last [%(default)s]",
    )

    typed = parser.parse_args()
    dataset = typed.dataset or "toy"
    output = typed.output or f"runs/{dataset}"
    if dataset == "toy":
        parser.set_defaults(**TOY)
    parser.set_defaults(dataset=dataset, output=output)
    last = Path(output, "last.pt")
    if not last.exists():
        return parser.parse_args(), None
    if not typed.resume:
        parser.error(f"{output} holds a run; --resume resumes it, --output names another folder")
    resumed = torch.load(last, map_location="cpu", weights_only=True)
    parser.set_defaults(**resumed["settings"] | {"output": output})
    return parser.parse_args(), resumed


def start_process() -> tuple[torch.device, int, int]:
    """This process's device and rank, and the number of processes. Only the first one prints."""
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    gpu = torch.cuda.is_available()
    device = torch.device(f"cuda:{local_rank}" if gpu else "cpu")
    if gpu:
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        # gloo and NCCL do not survive a fork.
        multiprocessing.set_start_method("spawn", force=True)
        dist.init_process_group("nccl" if gpu else "gloo", device_id=device if gpu else None)
    if rank > 0:
        sys.stdout = open(os.devnull, "w")
    return device, rank, int(os.environ.get("WORLD_SIZE", 1))


def batches_of(sampler: IdentitySampler, epochs: range) -> Iterator[list[int]]:
    """The batches of all epochs as one stream, so that the loader reads ahead across epochs."""
    for epoch in epochs:
        sampler.set_epoch(epoch)
        yield from sampler


def learning_rate(epoch: int, epochs: int = 400, peak: float = 1e-3) -> float:
    """The warm-up and decay of Sec. 3.2 for an epoch, counted from 0.

    For 400 epochs: up by a tenth of the peak every 5 epochs, from a tenth at epoch 0 to the peak at
    45; a tenth of the peak from epoch 200, a hundredth from 300. Other numbers of epochs scale
    this.
    """
    paper_epoch = epoch * 400 // epochs
    if paper_epoch < 50:
        return peak * (1 + paper_epoch // 5) / 10
    if paper_epoch < 200:
        return peak
    if paper_epoch < 300:
        return peak / 10
    return peak / 100


class Passes(nn.Module):
    """Runs the network on a process's share of a batch, in passes of images_per_pass images.

    Not in the paper: passes, which are as large as the share of each of its GPUs. Batch norm treats
    each pass separately, and only the whole batch's first pass updates the running statistics, as
    DataParallel keeps the first GPU's. A pass's flips, cutouts and drop masks depend only on seed,
    epoch, step and its number in the whole batch, so that a step is the same on any number of
    processes. With recompute, only one pass's activations are in memory; the others' are recomputed
    in backward.

    forward: (B, 3, H, W) uint8 images and the step's random key, (seed, epoch, step) -> the outputs
    of SONANet for all of them. Raises ValueError if B is larger than images_per_pass and not a
    multiple of it.
    """

    def __init__(
        self,
        network: nn.Module,
        images_per_pass: int,
        rank: int = 0,
        precision: str = "float32",
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.network = network
        self.images_per_pass = images_per_pass
        self.rank = rank
        self.dtype = PRECISIONS[precision]
        self.recompute = recompute
        self.norms = [
            module
            for module in network.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
        ]

    def forward(
        self, images: Tensor, rng_key: tuple[int, int, int]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        if len(images) % min(self.images_per_pass, len(images)):
            raise ValueError(
                f"--images-per-pass {self.images_per_pass} must divide "
                f"a process's {len(images)} images"
            )
        passes = images.split(self.images_per_pass)
        outputs = {}
        # The first pass runs last, while its activations are still in memory for backward.
        for i in reversed(range(len(passes))):
            pass_key = (*rng_key, self.rank * len(passes) + i)
            if self.recompute and i > 0:
                # A pass seeds itself, so the generators' states need not be kept for recomputing.
                outputs[i] = checkpoint(
                    self.run_pass,
                    passes[i],
                    pass_key,
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            else:
                outputs[i] = self.run_pass(passes[i], pass_key)
        joined = {}
        for branch in outputs[0]:
            embeddings, logits = zip(*(outputs[i][branch] for i in sorted(outputs)), strict=True)
            joined[branch] = torch.cat(embeddings), torch.cat(logits)
        return joined

    def run_pass(
        self, images: Tensor, rng_key: tuple[int, ...]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        torch.manual_seed(int(np.random.SeedSequence(rng_key).generate_state(1)[0]))
        for norm in self.norms:
            norm.track_running_stats = rng_key[-1] == 0  # in the whole batch's first pass
        # Autocast per pass: one around all passes would share half-precision copies of the weights
        # and sum their gradients in half precision.
        with torch.autocast(images.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.network(augment(images))


def row(record: dict[str, float], seconds_left: float) -> str:
    """An epoch's line of the table that training prints."""
    text = f"{record['epoch']:>5}{record['loss']:>8.3f}"
    for branch in ("global", "local"):
        text += f"{record[f'{branch}_triplet']:>8.3f}{record[f'{branch}_cross_entropy']:>7.3f}"
        text += f"{record[f'{branch}_accuracy']:>7.1%}"
    hours = seconds_left / 3600
    left = f"{hours:.1f}h" if hours >= 1 else f"{60 * hours:.1f}m"
    return text + f"{record['lr']:>9.1e}{record['images_per_second']:>7.0f}{left:>6}"


def save(state: dict, path: Path) -> None:
    """Write a checkpoint; path always holds a complete one, the old or the new."""
    scratch = path.with_name(f"{path.name}.{os.getpid()}")
    torch.save(state, scratch)
    scratch.replace(path)


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        sys.exit(f"error: {error}")
