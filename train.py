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
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as activation_checkpoint
from torch.utils.data import DataLoader

from data import DATASETS, IdentitySampler, ImageDataset, augment, describe, load_dataset
from evaluate import evaluate, progress, summary
from losses import branch_losses, gather
from model import DROPS, PLACEMENTS, SONANet

# Between checkpoints; the first epoch of each start and the last are saved in any case.
CHECKPOINT_SECONDS = 300


def main() -> None:
    args, checkpoint = parse_args()
    device, rank, processes = start_process()
    output = Path(args.output)

    # data
    splits = load_dataset(args.dataset, args.data_dir)
    train, query, gallery = splits.values()
    identities = np.unique(train.ids).tolist()
    sampler = IdentitySampler(
        train.labels, args.ids_per_batch, args.images_per_id, args.seed, rank, processes
    )
    loader = DataLoader(
        ImageDataset(train.paths, train.labels, args.height, args.width),
        batch_sampler=sampler,
        num_workers=args.workers,
        persistent_workers=args.workers > 0,
        pin_memory=device.type == "cuda",
    )

    # network
    torch.manual_seed(args.seed)
    weights = None if checkpoint or args.weights == "none" else args.weights
    network = SONANet(len(identities), args.sona, args.drop, weights)
    network.to(device, memory_format=torch.channels_last)
    # Not in the paper: weight decay 5e-4, as an L2 term, on all parameters.
    optimizer = torch.optim.Adam(network.parameters(), weight_decay=5e-4, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=args.fp16)

    # resuming
    history = []  # a record for each epoch
    if checkpoint:
        if checkpoint["identities"] != identities:
            folder = Path(train.paths[0]).parent
            raise ValueError(f"{output} was trained on other identities than those in {folder}")
        history = checkpoint["history"]
        network.load_state_dict(checkpoint["network"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint["scaler"]:  # empty if the run was not in fp16
            scaler.load_state_dict(checkpoint["scaler"])

    model = Passes(network, args.images_per_pass, rank, args.fp16, args.recompute)
    if processes > 1:
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)

    print(describe(args.dataset, splits))
    print(f"{processes} x {device.type};", *(f"{key}={value}" for key, value in vars(args).items()))
    if args.resume and not checkpoint:
        print(f"no run in {output} yet: starting one")
    if checkpoint:
        print(f"resuming after {len(history)} epochs of {args.epochs}")
    print(f"\n{HEADER}")

    output.mkdir(parents=True, exist_ok=True)
    last_saved = -math.inf  # so that the first epoch of each start is saved
    for epoch in range(len(history), args.epochs):
        lr = learning_rate(epoch, args.epochs, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        sampler.set_epoch(epoch)
        start = time.perf_counter()
        record = {"epoch": epoch, "lr": lr}
        record |= train_epoch(model, loader, optimizer, scaler, args, epoch)
        seconds = time.perf_counter() - start
        images = len(sampler) * args.ids_per_batch * args.images_per_id
        record["images_per_second"] = images / seconds

        # never saved if not finite
        weights_finite = all(x.isfinite().all() for x in network.state_dict().values())
        if not (math.isfinite(record["loss"]) and weights_finite):
            raise FloatingPointError(
                f"epoch {epoch}: the loss is {record['loss']}, "
                f"weights are {'' if weights_finite else 'not '}finite; lower --lr"
            )

        # not in the paper: the last epoch is reported, not the best
        last = epoch + 1 == args.epochs
        if last or (args.eval_every > 0 and (epoch + 1) % args.eval_every == 0):
            ranking = evaluate(network, query, gallery, args.height, args.width, args.workers)
            record |= ranking.metrics()

        history.append(record)
        print(row(record, seconds * (args.epochs - epoch - 1)), flush=True)
        if rank == 0:
            lines = [json.dumps(record) + "\n" for record in history]
            (output / "log.jsonl").write_text("".join(lines))
            if last or time.perf_counter() - last_saved >= CHECKPOINT_SECONDS:
                state = {
                    "network": network.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "scaler": scaler.state_dict(),
                    "history": history,
                    "identities": identities,
                    "settings": vars(args),
                }
                save(state, output / "last.pt")
                last_saved = time.perf_counter()
    print(f"\nthe run is in {output}")

    if processes > 1:
        dist.barrier()  # a process that leaves while others still talk can end them with an error
        dist.destroy_process_group()


def train_epoch(
    model: nn.Module,
    loader: DataLoader,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    args: argparse.Namespace,
    epoch: int,
) -> dict[str, float]:
    """Trains for an epoch; returns the means of the parts of branch_losses over its steps."""
    device = next(model.parameters()).device
    model.train()
    logged = []  # the parts of each step, on the device: copying each would wait for it
    for step, (images, labels) in enumerate(loader):
        images = images.to(device, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        outputs = model(images, (args.seed, epoch, step))  # augmentation, then the network
        loss, parts = branch_losses(outputs, labels, args.margin)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)  # in fp16, not if gradients overflow
        scaler.update()
        logged.append(torch.stack([*parts.values()]))
        progress(f"step {step + 1} of {len(loader)}")
    means = gather(torch.stack(logged)).mean(0)  # over the steps of all processes
    return dict(zip(parts, means.tolist(), strict=True))  # parts has the same names at each step


class Passes(nn.Module):
    """Runs the network on a process's share of a batch, in passes of images_per_pass images.

    Not in the paper: passes, presumably as large as the share of each of the paper's GPUs. Batch
    norm treats each pass separately, and only the whole batch's first pass updates the running
    statistics, as DataParallel keeps the first GPU's. A pass's flips, cutouts and drop masks depend
    only on seed, epoch, step and its number in the whole batch, so that a step is the same on any
    number of processes that have at least images_per_pass images each. With recompute, only one
    pass's activations are in memory; the others' are recomputed in backward.

    forward: (B, 3, H, W) uint8 images and the step's random key, (seed, epoch, step) -> the outputs
    of SONANet for all of them. Raises ValueError if B is larger than images_per_pass and not a
    multiple of it.
    """

    def __init__(
        self,
        network: nn.Module,
        images_per_pass: int = 32,
        rank: int = 0,
        fp16: bool = False,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.network = network
        self.images_per_pass = images_per_pass
        self.rank = rank
        self.fp16 = fp16
        self.recompute = recompute
        self.norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]

    def forward(
        self, images: Tensor, rng_key: tuple[int, int, int]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        if len(images) > self.images_per_pass and len(images) % self.images_per_pass:
            raise ValueError(
                f"--images-per-pass {self.images_per_pass} must divide "
                f"a process's {len(images)} images"
            )
        passes = images.split(self.images_per_pass)
        outputs = [None] * len(passes)
        # The first pass keeps its activations, so it runs last: backward begins with it, and frees
        # them before it recomputes those of another pass.
        for i in reversed(range(len(passes))):
            number = self.rank * len(passes) + i  # in the whole batch
            arguments = passes[i], rng_key, number
            if self.recompute and i > 0:
                # A pass seeds itself, so no state of a generator needs to be kept.
                outputs[i] = activation_checkpoint(
                    self.run_pass, *arguments, use_reentrant=False, preserve_rng_state=False
                )
            else:
                outputs[i] = self.run_pass(*arguments)
        joined = {}
        for branch in outputs[0]:
            embeddings, logits = zip(*(output[branch] for output in outputs), strict=True)
            joined[branch] = torch.cat(embeddings), torch.cat(logits)
        return joined

    def run_pass(
        self, images: Tensor, rng_key: tuple[int, int, int], number: int
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """The network's outputs for pass `number` of the whole batch, counted from 0."""
        seeds = np.random.SeedSequence((*rng_key, number))  # hashes the four numbers
        torch.manual_seed(int(seeds.generate_state(1)[0]))
        # Only the whole batch's first pass updates running statistics; eval mode ignores the flag.
        for norm in self.norms:
            norm.track_running_stats = number == 0
        # Autocast per pass: one around all passes would share half-precision copies of the weights
        # and sum their gradients in half precision.
        with torch.autocast(images.device.type, torch.float16, enabled=self.fp16):
            return self.network(augment(images))


def learning_rate(epoch: int, epochs: int = 400, peak: float = 1e-3) -> float:
    """The warm-up and decay of Sec. 3.2 for an epoch, counted from 0.

    For 400 epochs: up by a tenth of the peak every 5 epochs, from a tenth at epoch 0 to the peak at
    45; a tenth of the peak from epoch 200, a hundredth from 300. Another number of epochs scales
    this schedule.
    """
    paper_epoch = epoch * 400 // epochs
    if paper_epoch < 50:
        return peak * (1 + paper_epoch // 5) / 10
    if paper_epoch < 200:
        return peak
    if paper_epoch < 300:
        return peak / 10
    return peak / 100


def save(state: dict, path: Path) -> None:
    """Writes a checkpoint; if the process is killed, path holds a complete one, old or new."""
    # The process number, because trainers that outlive a killed torchrun may be writing, too.
    scratch = path.with_name(f"{path.name}.{os.getpid()}")
    torch.save(state, scratch)
    os.replace(scratch, path)


def start_process() -> tuple[torch.device, int, int]:
    """This process's device and rank, and the number of processes. Only the first one prints."""
    rank = int(os.environ.get("RANK", 0))
    processes = int(os.environ.get("WORLD_SIZE", 1))
    gpu = torch.cuda.is_available()
    device = torch.device("cpu")
    if gpu:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    if processes > 1:
        # For the loaders' workers, as DistributedDataParallel's documentation asks.
        multiprocessing.set_start_method("spawn", force=True)
        dist.init_process_group("nccl" if gpu else "gloo", device_id=device if gpu else None)
    if rank > 0:
        sys.stdout = open(os.devnull, "w")
    return device, rank, processes


# ---------- Flags ---------------------------------------------------------------------------------

# What the bare `python train.py` runs instead of the paper's settings: minutes on a CPU.
TOY = dict(
    height=64, width=32, ids_per_batch=8, epochs=30, eval_every=10, weights="none", workers=0
)


def parse_args() -> tuple[argparse.Namespace, dict]:
    """The settings, and the checkpoint that --resume goes on from, or {}.

    Flags on the command line override the settings of a resumed run, and those of the toy.
    """
    toy = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in TOY.items())
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]",
        description=f"Train SONA-Net. The defaults are the paper's (Sec. 3.2); for the toy: {toy}.",
    )
    add = parser.add_argument
    add("--dataset", choices=DATASETS, default="toy", help="data set to train on [%(default)s]")
    add("--data-dir", default="datasets", help="folder that holds the data sets [%(default)s]")
    add("--height", type=int, default=384, help="image height in pixels [%(default)s]")
    add("--width", type=int, default=128, help="image width in pixels [%(default)s]")
    add("--workers", type=int, default=2, help="data-loader processes per GPU [%(default)s]")
    add("--sona", choices=PLACEMENTS, default="2", help="stages that SONA follows [%(default)s]")
    add(
        "--drop",
        choices=DROPS,
        default="dropblock+",
        help="local branch's drop layer [%(default)s]",
    )
    add(
        "--weights",
        default="imagenet",
        metavar="{imagenet,none,PATH}",
        help="initial weights; PATH: a file of ResNet-50 weights, or a run's last.pt to fine-tune "
        "[%(default)s]",
    )
    add(
        "--ids-per-batch",
        type=int,
        default=32,
        help="identities per batch, all processes together [%(default)s]",
    )
    add("--images-per-id", type=int, default=4, help="images per identity [%(default)s]")
    add(
        "--epochs",
        type=int,
        default=400,
        help="epochs; the learning-rate schedule scales with them [%(default)s]",
    )
    add(
        "--lr",
        type=float,
        default=1e-3,
        help="peak learning rate; lower it if the loss does not fall [%(default)s]",
    )
    add("--margin", type=float, help="hard triplet margin, e.g. 0.3 [soft margin]")
    add("--seed", type=int, default=0, help="random seed [%(default)s]")
    add(
        "--images-per-pass",
        type=int,
        default=32,
        help="images per pass, over which batch norm takes its statistics [%(default)s]",
    )
    add(
        "--recompute",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="recompute activations during backward: "
        "with four passes, a third of the memory, but a quarter more computation",
    )
    add(
        "--fp16",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="train in half precision: faster on GPUs with tensor cores, and less memory",
    )
    add(
        "--eval-every",
        type=int,
        default=50,
        help="evaluate after every N epochs; 0: only after the last [%(default)s]",
    )
    add("--output", help="folder of the run [runs/DATASET]")
    add("--resume", action="store_true", help="resume the run in --output; if none, start one")

    # Flags on the command line override the run's settings, these the toy's, and these the paper's.
    # Parsed once to find the run, and again with its settings as defaults.
    typed = parser.parse_args()
    output = typed.output or f"runs/{typed.dataset}"
    if typed.dataset == "toy":
        parser.set_defaults(**TOY)
    parser.set_defaults(output=output)
    last = Path(output, "last.pt")
    if not last.exists():
        return parser.parse_args(), {}
    if not typed.resume:
        parser.error(f"{output} holds a run; --resume resumes it, --output names another folder")
    checkpoint = torch.load(last, map_location="cpu", weights_only=True)
    parser.set_defaults(**{**checkpoint["settings"], "output": output})
    return parser.parse_args(), checkpoint


# ---------- The printed table ---------------------------------------------------------------------

HEADER = f"""\
{"global branch":>32}{"local branch":>22}
epoch    loss triplet  x-ent    acc triplet  x-ent    acc       lr  img/s  left"""


def row(record: dict, seconds_left: float) -> str:
    """An epoch's line of the table that training prints, and the metrics below it, if any.

    seconds_left are those of training, without evaluations.
    """
    text = f"{record['epoch']:>5}{record['loss']:>8.3f}"
    for branch in ("global", "local"):
        text += f"{record[f'{branch}_triplet']:>8.3f}{record[f'{branch}_cross_entropy']:>7.3f}"
        text += f"{record[f'{branch}_accuracy']:>7.1%}"
    minutes = seconds_left / 60
    left = f"{minutes:.1f}m" if minutes < 60 else f"{minutes / 60:.1f}h"
    text += f"{record['lr']:>9.1e}{record['images_per_second']:>7.0f}{left:>6}"
    if "mean_ap" in record:
        text += f"\n{'':>13}{summary(record)}"
    return text


if __name__ == "__main__":
    main()
