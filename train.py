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
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from data import (
    DATASETS,
    DataError,
    IdentitySampler,
    ImageDataset,
    augment,
    describe,
    load_dataset,
    load_tensors,
    replacing,
    run_program,
)
from evaluate import (
    PRECISIONS,
    default_precision,
    evaluate,
    memory_format,
    progress,
    summary,
)
from losses import branch_losses, gather
from model import DROPS, PLACEMENTS, SONANet

# What the bare `python train.py` runs instead of the paper's settings: minutes on a CPU.
TOY = dict(
    height=64, width=32, ids_per_batch=8, epochs=30, eval_every=10, weights="none", workers=0
)
CHECKPOINT_SECONDS = 300  # the least time between two checkpoints, but for those of the end


def main():
    args, resumed = parse_args()
    device, rank, processes = start_process()
    args.precision = args.precision or default_precision(device)
    output = Path(args.output)
    history = resumed.get("history", [])  # a record for each epoch
    epochs = range(len(history), args.epochs)
    if args.resume and not resumed:
        print(f"no run in {args.output} yet: starting one")
    elif resumed:
        print(
            f"resuming {args.output} at epoch {len(history)} of {args.epochs}"
            if epochs
            else f"{args.output} is finished"
        )

    # data
    splits = load_dataset(args.dataset, args.data_dir)
    print(describe(args.dataset, splits))
    train, query, gallery = splits.values()
    identities = np.unique(train.ids).tolist()
    check_data(splits, identities, resumed, device)
    size = args.height, args.width
    dataset = ImageDataset(train.paths, train.labels, *size)
    sampler = IdentitySampler(
        train.labels, args.ids_per_batch, args.images_per_id, args.seed, rank, processes
    )
    options = dict(num_workers=args.workers, pin_memory=device.type == "cuda")
    batches = iter(DataLoader(dataset, batch_sampler=batches_of(sampler, epochs), **options))

    # network
    torch.manual_seed(args.seed)
    weights = None if resumed or args.weights == "none" else args.weights
    if weights not in (None, "imagenet"):  # loaded here, so that a damaged file is a DataError
        weights = load_tensors(weights)
    network = SONANet(len(identities), args.sona, args.drop, weights)
    del weights  # a run's last.pt has 0.4 GB
    network.to(device, memory_format=memory_format(device, args.precision))
    # Not in the paper: weight decay 5e-4, as an L2 term, on all parameters.
    optimizer = torch.optim.Adam(network.parameters(), args.lr, weight_decay=5e-4, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    if resumed:
        network.load_state_dict(resumed["network"])
        optimizer.load_state_dict(resumed["optimizer"])
        if resumed["scaler"]:  # empty unless the run was in fp16
            scaler.load_state_dict(resumed["scaler"])
        resumed.clear()  # frees 0.4 GB
    compiled = torch.compile(network) if args.compile else network
    model = Passes(compiled, args.images_per_pass, rank, args.precision, args.recompute)
    if processes > 1:
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    print(f"SONA {args.sona}, drop {args.drop}; {processes} x {device.type}, {args.precision}\n")

    def save_run():
        """last.pt is the run; log.jsonl is for --curves and people, args.json for people."""
        state = {
            "network": network.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "history": history,
            "identities": identities,
            "settings": vars(args),
        }
        if rank == 0:
            save(state, output / "last.pt")
            with replacing(output / "log.jsonl") as scratch:
                scratch.write_text("".join(json.dumps(record) + "\n" for record in history))
            with replacing(output / "args.json") as scratch:
                scratch.write_text(json.dumps(vars(args), indent=2))

    # training loop; its last round only evaluates
    print(f"{'global branch':>32}{'local branch':>22}")
    print(f"epoch    loss{' triplet  x-ent    acc' * 2}       lr  img/s  left")
    saved = -math.inf  # so that the first epoch after each start is saved
    for epoch in range(len(history), args.epochs + 1):
        # evaluate what is trained so far; not in the paper: the last is reported, not the best
        last = epoch == args.epochs
        if last or args.eval_every and epoch % args.eval_every == 0:
            record = history[-1] if history else {}  # the last epoch's takes the metrics, too
            if "mean_ap" not in record:
                record |= evaluate(network, query, gallery, *size, args.workers).metrics()
                if last:
                    save_run()
            title = "trained" if last else "" if history else "untrained"
            print(f"{title:<13}{summary(record)}", flush=True)
        if last:
            break

        # train for an epoch
        start = time.perf_counter()
        lr = learning_rate(epoch, args.epochs, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        means = train_epoch(model, batches, len(sampler), optimizer, scaler, args, epoch)

        # log, check and save it
        seconds = time.perf_counter() - start
        images = len(sampler) * args.ids_per_batch * args.images_per_id
        record = {"epoch": epoch, "lr": lr, **means, "images_per_second": images / seconds}
        history.append(record)
        print(row(record, seconds * (args.epochs - epoch - 1)), flush=True)
        if not math.isfinite(record["loss"]):
            raise FloatingPointError(f"the loss of epoch {epoch} is {record['loss']}; lower --lr")
        if not all(x.isfinite().all() for x in network.state_dict().values()):
            raise FloatingPointError(f"epoch {epoch} left weights of nan or inf; lower --lr")
        if time.perf_counter() - saved >= CHECKPOINT_SECONDS or len(history) == args.epochs:
            save_run()
            saved = time.perf_counter()
    print(f"\nthe run is in {output}")

    if dist.is_initialized():
        # Destroying the group holds the GIL, which gloo's threads may need: wait for them.
        dist.barrier()
        del model  # DDP, too, holds the group, and would otherwise destroy it last
        dist.destroy_process_group()


def train_epoch(model, batches, steps, optimizer, scaler, args, epoch):
    """Trains for an epoch; returns the means of the parts of branch_losses over its steps."""
    device = next(model.parameters()).device
    sums = {}  # on the device, so that no step waits for a copy
    model.train()
    torch.backends.cudnn.benchmark = True  # training's shapes are fixed, evaluation's vary
    for step in range(steps):
        images, labels = (tensor.to(device, non_blocking=True) for tensor in next(batches))

        # augmentation and forward, pass by pass
        outputs = model(images, (args.seed, epoch, step))

        # gradients of the four losses
        loss, parts = branch_losses(outputs, labels, args.margin)
        optimizer.zero_grad()
        scaler.scale(loss).backward()

        # a step of Adam; fp16 skips one whose gradients overflow
        scaler.step(optimizer)
        scaler.update()

        # sums for the log
        for name, part in parts.items():
            sums[name] = sums.get(name, 0) + part
        progress(f"step {step + 1} of {steps}")
    torch.backends.cudnn.benchmark = False
    # (1, parts) on each process -> (processes, parts) -> (parts,)
    means = gather(torch.stack([*sums.values()])[None]).mean(0) / steps
    return dict(zip(sums, means.tolist(), strict=True))


def parse_args():
    """The settings (typed flags override a resumed run's) and the checkpoint to resume, or {}."""
    toy = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in TOY.items())
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]",
        description=f"Train SONA-Net. The defaults are the paper's (Sec. 3.2); for the toy: {toy}.",
    )
    add = parser.add_argument
    add("--dataset", choices=DATASETS, help="data set to train on [toy, drawn on first use]")
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
        type=at_least(1),
        default=32,
        help="identities per batch, summed over all processes [%(default)s]",
    )
    add("--images-per-id", type=at_least(2), default=4, help="images per identity [%(default)s]")
    add(
        "--epochs",
        type=at_least(1),
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
    add("--seed", type=at_least(0), default=0, help="random seed [%(default)s]")
    add("--output", help="folder of the run [runs/DATASET]")
    add("--resume", action="store_true", help="resume the run in --output; if none, start one")
    add(
        "--eval-every",
        type=at_least(0),
        default=50,
        help="evaluate every N epochs; 0: only after the last [%(default)s]",
    )
    add(
        "--images-per-pass",
        type=at_least(2),
        default=32,
        help="images per forward pass, over which batch norm takes its statistics [%(default)s]",
    )
    add(
        "--recompute",
        action=argparse.BooleanOptionalAction,
        help="recompute activations during backward: "
        "with four passes, a third of the memory for a quarter more work",
    )
    add(
        "--precision",
        choices=PRECISIONS,
        help="precision of training [fp16 on GPUs of compute capability 7.0 or more, else float32]",
    )
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="torch.compile the network: may be faster after a minute; draws other drop masks",
    )

    # Parsed twice, because the data set and the run decide the defaults.
    typed = parser.parse_args()
    if typed.output == "":
        parser.error("--output is empty: is a variable not set?")
    dataset = typed.dataset or "toy"
    output = typed.output or f"runs/{dataset}"
    if dataset == "toy":
        parser.set_defaults(**TOY)
    parser.set_defaults(dataset=dataset, output=output)
    last = Path(output, "last.pt")
    if not last.exists():
        return parser.parse_args(), {}
    if not typed.resume:
        parser.error(f"{output} holds a run; --resume resumes it, --output names another folder")
    resumed = load_tensors(last, "network", "history", "identities", "settings")
    parser.set_defaults(**resumed["settings"] | {"output": output})
    return parser.parse_args(), resumed


def at_least(minimum):
    """An argparse type: integers of `minimum` or more."""

    def integer(text):
        if int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text} is less than {minimum}")
        return int(text)

    return integer


def start_process():
    """This process's device and rank, and the number of processes. Only the first one prints."""
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    gpu = torch.cuda.is_available()
    device = torch.device(f"cuda:{local_rank}" if gpu else "cpu")
    if gpu:
        torch.cuda.set_device(device)
    if "WORLD_SIZE" in os.environ and "RANK" not in os.environ:
        raise DataError("WORLD_SIZE is set but RANK is not: start several processes with torchrun")
    if "RANK" in os.environ:
        # gloo and NCCL do not survive a fork. Spawned readers import the scripts anew, at each
        # evaluation, too: who edits them meanwhile trains from a copy.
        multiprocessing.set_start_method("spawn", force=True)
        dist.init_process_group("nccl" if gpu else "gloo", device_id=device if gpu else None)
    if rank > 0:
        sys.stdout = open(os.devnull, "w")
    return device, rank, int(os.environ.get("WORLD_SIZE", 1))


def check_data(splits, identities, resumed, device):
    """Raises DataError if a run cannot go on with the data.

    Its training identities must be those of the run that is resumed, and all processes must have
    found the same files and resume at the same epoch.
    """
    expected = resumed.get("identities", identities)
    if identities != expected:
        folder = str(Path(splits["train"].paths[0]).parent)
        example = min({*identities} ^ {*expected})
        raise DataError(f"the run has other identities than {folder!r}, for example {example}")
    content = [len(resumed.get("history", []))]
    for paths, ids, cams in splits.values():
        content += [*map(os.path.basename, paths), *ids.tolist(), *cams.tolist()]
    checksum = torch.tensor([zlib.crc32(repr(content).encode())], device=device)
    if (gather(checksum) != checksum).any():
        raise DataError("the processes found different files: --data-dir or --output differs")


def batches_of(sampler, epochs):
    """The batches of all epochs as one stream, so that the loader reads ahead across epochs."""
    for epoch in epochs:
        sampler.set_epoch(epoch)
        yield from sampler


def learning_rate(epoch, epochs=400, peak=1e-3):
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

    def __init__(self, network, images_per_pass, rank=0, precision="float32", recompute=False):
        super().__init__()
        self.network = network
        self.images_per_pass = images_per_pass
        self.rank = rank
        self.dtype = PRECISIONS[precision]
        self.recompute = recompute
        batch_norm = nn.modules.batchnorm._BatchNorm
        self.norms = [module for module in network.modules() if isinstance(module, batch_norm)]

    def forward(self, images, rng_key):
        if len(images) % min(self.images_per_pass, len(images)):
            raise ValueError(
                f"--images-per-pass {self.images_per_pass} must divide a process's {len(images)}"
            )
        passes = images.split(self.images_per_pass)
        outputs = [None] * len(passes)
        # The first pass runs last, while its activations are still in memory for backward.
        for i in reversed(range(len(passes))):
            arguments = passes[i], rng_key, self.rank * len(passes) + i
            if self.recompute and i > 0:
                # A pass seeds itself, so no state of a generator needs to be kept.
                outputs[i] = checkpoint(
                    self.run_pass, *arguments, use_reentrant=False, preserve_rng_state=False
                )
            else:
                outputs[i] = self.run_pass(*arguments)
        joined = {}
        for branch in outputs[0]:
            embeddings, logits = zip(*(output[branch] for output in outputs), strict=True)
            joined[branch] = torch.cat(embeddings), torch.cat(logits)
        return joined

    def run_pass(self, images, rng_key, number):
        torch.manual_seed(int(np.random.SeedSequence((*rng_key, number)).generate_state(1)[0]))
        for norm in self.norms:
            norm.track_running_stats = number == 0  # in the whole batch's first pass
        # Autocast per pass: one around all passes would share half-precision copies of the weights
        # and sum their gradients in half precision.
        with torch.autocast(images.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.network(augment(images))


def row(record, seconds_left):
    """An epoch's line of the table that training prints."""
    text = f"{record['epoch']:>5}{record['loss']:>8.3f}"
    for branch in ("global", "local"):
        text += f"{record[f'{branch}_triplet']:>8.3f}{record[f'{branch}_cross_entropy']:>7.3f}"
        text += f"{record[f'{branch}_accuracy']:>7.1%}"
    hours = seconds_left / 3600
    left = f"{hours:.1f}h" if hours >= 1 else f"{60 * hours:.1f}m"
    return text + f"{record['lr']:>9.1e}{record['images_per_second']:>7.0f}{left:>6}"


def save(state, path):
    """Writes a checkpoint; if the process is killed, path holds a complete one, old or new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as scratch:
        torch.save(state, scratch)


if __name__ == "__main__":
    run_program(main)
