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
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from data import DATASETS, DataError, IdentitySampler, ImageDataset, augment, describe, load_dataset
from evaluate import evaluate, summary
from losses import branch_losses, gather
from model import DROPS, PLACEMENTS, SONANet

# What the bare `python train.py` runs instead of the paper's settings: minutes on a CPU.
TOY = dict(height=64, width=32, ids_per_batch=8, epochs=30, eval_every=10, weights="none", workers=0)
PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CHECKPOINT_SECONDS = 300  # between two checkpoints, at least


def parse_args() -> tuple[argparse.Namespace, dict | None]:
    """The settings (a flag wins over a resumed run's setting) and the checkpoint to resume."""
    toy = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in TOY.items())
    parser = argparse.ArgumentParser(
        usage="%(prog)s [flags; --help lists them]",
        description=f"Train SONA-Net. Defaults follow Sec. 3.2; the toy overrides a few: {toy}.",
    )
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=DATASETS, help="what to train on [the toy, drawn on first use]")
    add("--data-dir", default="datasets", help="folder of the data sets [%(default)s]")
    add("--height", type=int, default=384, help="pixels; fewer are faster [%(default)s]")
    add("--width", type=int, default=128, help="pixels [%(default)s]")
    add("--workers", type=int, default=2, help="processes that read images, per GPU [%(default)s]")
    add = parser.add_argument_group("network").add_argument
    add("--sona", choices=PLACEMENTS, default="2", help="the stages that SONA follows [%(default)s]")
    add("--drop", choices=DROPS, default="dropblock+", help="the drop layer [%(default)s]")
    add("--weights", default="imagenet", metavar="{imagenet,none,PATH}", help="initial weights [%(default)s]")
    add = parser.add_argument_group("training").add_argument
    add("--ids-per-batch", type=int, default=32, help="across all processes [%(default)s]")
    add("--images-per-id", type=int, default=4, help="images of each identity [%(default)s]")
    add("--epochs", type=int, default=400, help="the schedule scales with it [%(default)s]")
    add("--lr", type=float, default=1e-3, help="peak; reduce it for small batches [%(default)s]")
    add("--margin", type=float, help="hard triplet margin, e.g. 0.3 [soft margin]")
    add("--seed", type=int, default=0, help="the paper averages over four runs [%(default)s]")
    add = parser.add_argument_group("device").add_argument
    add("--images-per-pass", type=int, default=32, help="images batch norm sees at a time [%(default)s]")
    add("--recompute", action=BooleanOptionalAction, help="of four passes: a third of the memory, a quarter more work")
    add("--precision", choices=PRECISIONS, help="[float32 on a CPU, a GPU's fastest]")
    add("--compile", action=BooleanOptionalAction, help="faster after the first minute; other drop masks")
    add = parser.add_argument_group("run").add_argument
    add("--output", help="the run's folder [runs/DATASET]")
    add("--resume", action="store_true", help="resume the folder's run, or start one if none")
    add("--eval-every", type=int, default=50, help="in epochs; 0: only at the end [%(default)s]")

    typed = parser.parse_known_args()[0]
    dataset = typed.dataset or "toy"
    output = typed.output or f"runs/{dataset}"
    parser.set_defaults(**TOY if dataset == "toy" else {}, dataset=dataset, output=output)
    if not Path(output, "last.pt").exists():
        return parser.parse_args(), None
    if not typed.resume:
        parser.error(f"{output} holds a run; --resume resumes it, --output names another folder")
    state = torch.load(Path(output, "last.pt"), map_location="cpu", weights_only=True)
    parser.set_defaults(**state["settings"] | {"output": output})
    return parser.parse_args(), state


def start_process() -> tuple[torch.device, int, int]:
    """This process's device and rank, and the number of processes. Only the first one prints."""
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    gpu = torch.cuda.is_available()
    device = torch.device(f"cuda:{local_rank}" if gpu else "cpu")
    if gpu:
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        multiprocessing.set_start_method("spawn", force=True)  # gloo and NCCL do not survive a fork
        dist.init_process_group("nccl" if gpu else "gloo", device_id=device if gpu else None)
    if rank > 0:
        sys.stdout = open(os.devnull, "w")
    return device, rank, int(os.environ.get("WORLD_SIZE", 1))


def default_precision(device: torch.device) -> str:
    """A GPU's fastest, by its compute capability. Not in the paper, whose GPUs had float32."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    return "bf16" if capability >= (8, 0) else "fp16" if capability >= (7, 0) else "float32"


def learning_rate(epoch: int, epochs: int = 400, peak: float = 1e-3) -> float:
    """The warm-up and decay of Sec. 3.2 for an epoch, counted from 0.

    For 400 epochs: a tenth of the peak, and a tenth more every 5 epochs until 50; the peak until 200,
    a tenth of it until 300 and a hundredth until the end. Other numbers of epochs scale this schedule.
    """
    of_400 = epoch * 400 // epochs
    if of_400 < 50:
        return peak * (1 + of_400 // 5) / 10
    if of_400 < 200:
        return peak
    return peak / 10 if of_400 < 300 else peak / 100


def adam(network: nn.Module, lr: float) -> torch.optim.Adam:
    """Sec. 3.2. Not in the paper: weight decay 5e-4, as an L2 term, but none on theta (README says why)."""
    theta = [parameter for name, parameter in network.named_parameters() if ".theta." in name]
    others = [parameter for name, parameter in network.named_parameters() if ".theta." not in name]
    groups = [{"params": others}, {"params": theta, "weight_decay": 0}]
    return torch.optim.Adam(groups, lr, weight_decay=5e-4, fused=True)


class Passes(nn.Module):
    """The network on a process's share of a batch, in small passes, as on each of the paper's GPUs.

    Not in the paper: batch norm treats each pass separately, and only the whole batch's first
    pass updates the running statistics, as DataParallel keeps the first GPU's. A pass's flips, cutouts and
    drop masks depend only on seed, epoch, step and its number in the whole batch, so that a step is
    the same on any number of processes. With recompute, only one pass's activations are in memory;
    the others' are recomputed in backward.

    forward: (B, 3, H, W) uint8 images and (seed, epoch, step) -> the outputs of SONANet for all of them.
    Raises ValueError if B is larger than images_per_pass and not a multiple of it.
    """

    def __init__(self, network, images_per_pass: int, rank=0, precision="float32", recompute=False):
        super().__init__()
        self.network, self.images_per_pass, self.rank = network, images_per_pass, rank
        self.dtype, self.recompute = PRECISIONS[precision], recompute
        self.norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]

    def forward(self, images: Tensor, moment: tuple[int, int, int]) -> dict[str, tuple[Tensor, Tensor]]:
        if len(images) % min(self.images_per_pass, len(images)):
            raise ValueError(f"--images-per-pass {self.images_per_pass} must divide a process's {len(images)} images")
        passes = images.split(self.images_per_pass)
        outputs = [{}] * len(passes)
        recomputed = partial(checkpoint, self.run_pass, use_reentrant=False, preserve_rng_state=False)
        for i in reversed(range(len(passes))):  # the first runs last, so that backward finds it in memory
            run_pass = recomputed if self.recompute and i > 0 else self.run_pass
            outputs[i] = run_pass(passes[i], (*moment, self.rank * len(passes) + i))
        return {
            branch: tuple(map(torch.cat, zip(*(output[branch] for output in outputs), strict=True)))
            for branch in outputs[0]
        }

    def run_pass(self, images: Tensor, moment: tuple[int, ...]) -> dict[str, tuple[Tensor, Tensor]]:
        torch.manual_seed(int(np.random.SeedSequence(moment).generate_state(1)[0]))
        for norm in self.norms:
            norm.track_running_stats = moment[-1] == 0  # in the whole batch's first pass
        # Autocast for each pass: around all it would sum the gradients of bf16 weights in bf16.
        with torch.autocast(images.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.network(augment(images))


def main() -> None:
    args, state = parse_args()
    device, rank, processes = start_process()
    args.precision = args.precision or default_precision(device)
    output, history = Path(args.output), state["history"] if state else []  # a record for each epoch
    begun = gather(torch.tensor([len(history)], device=device))
    assert (begun == len(history)).all(), f"{output} is not the same folder for all processes"

    # data
    splits = load_dataset(args.dataset, args.data_dir)
    labels = splits["train"].labels
    sampler = IdentitySampler(labels, args.ids_per_batch, args.images_per_id, args.seed, rank, processes)
    labels = labels.to(device)
    epochs = range(len(history), args.epochs)
    # Of all epochs to come, so that the loader reads on from one into the next.
    batches = (batch for epoch in epochs for batch in sampler.set_epoch(epoch))
    dataset = ImageDataset(splits["train"].paths, args.height, args.width)
    options = dict(num_workers=args.workers, pin_memory=device.type == "cuda")
    loader = iter(DataLoader(dataset, batch_sampler=batches, **options))

    # network
    torch.manual_seed(args.seed)
    weights = None if state or args.weights == "none" else args.weights
    network = SONANet(int(labels.max()) + 1, args.sona, args.drop, weights)
    network.to(device, memory_format=torch.channels_last)
    optimizer = adam(network, args.lr)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    stateful = {"network": network, "optimizer": optimizer, "scaler": scaler}
    for name, part in stateful.items() if state else ():
        part.load_state_dict(state[name] or part.state_dict())  # a scaler that was off has none
    compiled = torch.compile(network) if args.compile else network
    model = Passes(compiled, args.images_per_pass, rank, args.precision, args.recompute)
    if processes > 1:
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    test = splits["query"], splits["gallery"], args.height, args.width, args.workers
    print(describe(args.dataset, splits))
    print(f"SONA {args.sona}, drop {args.drop}; {processes} x {device.type}, {args.precision}\n")
    if rank == 0:
        output.mkdir(parents=True, exist_ok=True)
        (output / "args.json").write_text(json.dumps(vars(args), indent=2))
    if args.eval_every and not history:
        print(f"untrained    {summary(evaluate(network, *test)[1].figures())}\n")

    # training loop
    print(f"{'global branch':>32}{'local branch':>22}")
    print(f"epoch    loss{' triplet  x-ent    acc' * 2}       lr  img/s  left")
    saved = time.perf_counter()
    for epoch in epochs:
        start, sums = time.perf_counter(), {}
        model.train()
        torch.backends.cudnn.benchmark = True  # the shapes of training are fixed
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(epoch, args.epochs, args.lr)
        for step in range(len(sampler)):
            images, indices = (tensor.to(device, non_blocking=True) for tensor in next(loader))
            outputs = model(images, (args.seed, epoch, step))  # augment and forward, pass by pass
            loss, parts = branch_losses(outputs, labels[indices], args.margin)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            for name, part in parts.items():  # on the device: nothing waits for it in the epoch
                sums[name] = sums.get(name, 0) + part
            if sys.stdout.isatty():
                print(f"\r  step {step + 1} of {len(sampler)}", end="\r", flush=True)
        torch.backends.cudnn.benchmark = False  # those of evaluation are not

        means = gather(torch.stack([*sums.values()])[None]).mean(0) / len(sampler)
        record = {"epoch": epoch, "lr": group["lr"], **dict(zip(sums, means.tolist(), strict=True))}
        if not math.isfinite(record["loss"]):
            raise FloatingPointError(f"the loss of epoch {epoch} is {record['loss']}; lower --lr")
        seconds = time.perf_counter() - start
        record["images_per_second"] = len(sampler) * args.ids_per_batch * args.images_per_id / seconds
        print(row(record, seconds * (args.epochs - epoch - 1)), flush=True)
        last = epoch + 1 == args.epochs  # not in the paper: it is reported, not the best one
        if last or args.eval_every and (epoch + 1) % args.eval_every == 0:
            record |= evaluate(network, *test)[1].figures()
            print(f"{'trained' if last else '':<13}{summary(record)}", flush=True)
        history.append(record)
        if rank == 0:
            (output / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in history))
            if last or time.perf_counter() - saved >= CHECKPOINT_SECONDS:
                states = {name: part.state_dict() for name, part in stateful.items()}
                save(states | {"history": history, "settings": vars(args)}, output / "last.pt")
                saved = time.perf_counter()
    print(f"\nthe run is in {output}")
    if dist.is_initialized():
        dist.barrier()  # gloo's threads may need the GIL to free tensors; destroying the group holds it
        del model  # DDP owns the group, too, and would be the last to destroy it
        dist.destroy_process_group()


def row(record: dict[str, float], seconds_left: float) -> str:
    """An epoch's line of the table that training prints."""
    text = f"{record['epoch']:>5}{record['loss']:>8.3f}"
    for branch in ("global", "local"):
        text += f"{record[f'{branch}_triplet']:>8.3f}{record[f'{branch}_cross_entropy']:>7.3f}"
        text += f"{record[f'{branch}_accuracy']:>7.1%}"
    left = f"{seconds_left / 3600:.1f}h" if seconds_left >= 3600 else f"{seconds_left / 60:.1f}m"
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
