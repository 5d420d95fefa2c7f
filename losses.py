# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors of SONA-Net in plain PyTorch
"""The losses of SONA-Net (Xia et al., ICCV 2019): triplet loss and cross-entropy (Sec. 2.1).

Usage:
    loss, parts = branch_losses(model(images), labels)
    loss.backward()
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def batch_hard_triplet_loss(
    embeddings: Tensor, labels: Tensor, margin: float | None = None
) -> Tensor:
    """Triplet loss on each anchor's farthest positive and nearest negative (Sec. 2.1).

    embeddings (B, D) floats, labels (B,) integers; returns a scalar in float32 or wider, even under
    autocast (Hermans et al. 2017, Eq. 5).

    margin None is the soft margin, the mean of softplus(d_ap - d_an); a number is a hard one, the
    mean of relu(margin + d_ap - d_an). Not in the paper: the soft margin, on raw embeddings under
    Euclidean distance.

    An anchor without another image of its identity is its own positive, at distance 0. In a batch
    of one identity the loss is 0, because there is no triplet. Raises ValueError if the shapes do
    not match.
    """
    if embeddings.ndim != 2 or labels.shape != embeddings.shape[:1]:
        raise ValueError(f"expected (B, D) and (B,), not {embeddings.shape} and {labels.shape}")
    if embeddings.dtype in (torch.float16, torch.bfloat16):
        embeddings = embeddings.float()  # cdist does not take half precision
    # From differences: |a|^2 - 2ab + |b|^2 loses precision far from the origin.
    distances = torch.cdist(embeddings, embeddings, compute_mode="donot_use_mm_for_euclid_dist")
    same_identity = labels[:, None] == labels  # (B, B)
    hardest_positive = distances.masked_fill(~same_identity, -torch.inf).amax(1)
    hardest_negative = distances.masked_fill(same_identity, torch.inf).amin(1)
    gap = hardest_positive - hardest_negative
    loss = F.softplus(gap) if margin is None else F.relu(gap + margin)  # (B,)
    return loss.mean()


def branch_losses(
    outputs: dict[str, tuple[Tensor, Tensor]],
    labels: Tensor,
    margin: float | None = None,
    smoothing: float = 0.1,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of both losses over both branches (for backward), and its parts (for logging).

    outputs are the network's {branch: (embedding (B, D), logits (B, classes))}, labels (B,). The
    parts are detached scalars: the loss, and each branch's triplet loss, cross-entropy and accuracy
    (the share of images classified correctly). Not in the paper: smoothing 0.1 (Szegedy et al.
    2016), weight 1 for each of the four losses, and under DistributedDataParallel triplets mined
    over the whole batch, as with DataParallel. Cross-entropies and accuracies are then of this
    process's images; their mean over processes is the whole batch's.
    """
    all_labels = gather(labels)
    terms = {}
    accuracies = {}
    for branch, (embedding, logits) in outputs.items():
        terms[f"{branch}_triplet"] = batch_hard_triplet_loss(gather(embedding), all_labels, margin)
        terms[f"{branch}_cross_entropy"] = F.cross_entropy(
            logits.float(), labels, label_smoothing=smoothing
        )
        accuracies[f"{branch}_accuracy"] = (logits.argmax(1) == labels).float().mean()
    loss = sum(terms.values())
    parts = {"loss": loss, **terms, **accuracies}
    return loss, {name: part.detach() for name, part in parts.items()}


def gather(x: Tensor) -> Tensor:
    """Concatenates the x of all processes, in the order of ranks: (B, ...) -> (processes * B, ...).

    Returns x itself without torch.distributed. Gradients flow only into this process's own x,
    times the number of processes, so that DDP's mean over processes is the full gradient.
    """
    if not dist.is_initialized():
        return x
    processes = dist.get_world_size()
    slots = [torch.empty_like(x) for _ in range(processes)]
    dist.all_gather(slots, x.detach())
    own = x.detach() + processes * (x - x.detach())  # the value of x, its gradient times processes
    slots[dist.get_rank()] = own
    return torch.cat(slots)
