# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors of SONA-Net in plain PyTorch
"""The paper's equations and this repository's guarantees, as tests: `pytest test_model.py`.

Part one is the paper, in the order of the files: the network, the losses, the data, the schedule
and the training step, the ranking. Part two is a run: in one process or several, killed and
resumed, evaluated, drawn, told what is wrong.
"""

import contextlib
import gc
import inspect
import io
import json
import math
import os
import pickle
import random
import re
import runpy
import shutil
import socket
import struct
import subprocess
import sys
import time
from copy import deepcopy
from functools import partial
from itertools import product
from pathlib import Path
from unittest import mock

# Bit-exact promises hold on a CPU only. Some builds of OpenBLAS hang when a process with running
# threads forks.
os.environ.update(CUDA_VISIBLE_DEVICES="", OPENBLAS_NUM_THREADS="1")

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.models import ResNet50_Weights, resnet50

import data
import evaluate
import losses
import model
import train
from data import (
    DATASETS,
    FOLDERS,
    DataError,
    IdentitySampler,
    ImageDataset,
    augment,
    cutout,
    load_dataset,
    normalize,
)
from evaluate import evaluate_ranking, extract_features
from losses import batch_hard_triplet_loss, branch_losses
from model import DROPS, PLACEMENTS, SONA, BatchDropBlock, DropBlockPlus, SONANet
from train import Passes, learning_rate

HERE = Path(__file__).parent
torch.set_num_threads(1)  # another number of threads rounds sums differently
forks = pytest.mark.skipif(
    sys.platform != "linux", reason="forks this process, which is safe on Linux alone"
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ========== Part one: the paper ==================================================================


# ---------- SONA (Sec. 2.2) -----------------------------------------------------------------------
@pytest.fixture
def sona():
    """A SONA block whose parameters are all random."""
    sona = SONA(16)
    for parameter in sona.parameters():
        nn.init.normal_(parameter, std=0.5)
    return sona.double().eval()


def attention_by_the_paper(sona, x):
    """softmax(Sigma / sqrt(c/r)) of Eq. 1 and 2, with I_bar written out."""
    theta = sona.theta(x).flatten(2).transpose(1, 2)  # (B, hw, c/r)
    d = theta.shape[2]
    i_bar = (torch.eye(d, dtype=x.dtype) - torch.ones(d, d, dtype=x.dtype) / d) / d
    sigma = theta @ i_bar @ theta.transpose(1, 2)
    return torch.softmax(sigma / math.sqrt(d), dim=2)


def sona_by_the_paper(sona, x):
    z = attention_by_the_paper(sona, x) @ sona.g(x).flatten(2).transpose(1, 2)
    return x + sona.p(z.transpose(1, 2).reshape(len(x), -1, *x.shape[2:]))


def test_sona_matches_equations_1_to_3(sona):
    x = 3 * torch.randn(2, 16, 6, 4, dtype=torch.float64, requires_grad=True)
    papers, inputs, weights = (
        sona_by_the_paper(sona, x),
        [x, *sona.parameters()],
        torch.randn_like(x),
    )
    gradients = torch.autograd.grad((papers * weights).sum(), inputs)
    for ours in (sona(x), sona(x.contiguous(memory_format=torch.channels_last))):
        torch.testing.assert_close(ours, papers)
        torch.testing.assert_close(torch.autograd.grad((ours * weights).sum(), inputs), gradients)
    assert (papers - x).abs().max() > 0.1


def test_attention_is_the_softmax_of_equation_2(sona):
    x = 3 * torch.randn(2, 16, 6, 4, dtype=torch.float64)
    torch.testing.assert_close(sona.attention(x), attention_by_the_paper(sona, x))
    torch.testing.assert_close(sona.attention(x).sum(2), torch.ones(2, 24, dtype=torch.float64))


def test_sona_has_the_papers_layers():
    sona = SONA(32, reduction=4)
    convolution, norm, activation = sona.theta
    assert convolution.weight.shape == sona.g.weight.shape == (8, 32, 1, 1)
    assert sona.p.weight.shape == (32, 8, 1, 1)
    assert isinstance(norm, nn.BatchNorm2d)
    assert isinstance(activation, nn.LeakyReLU)
    assert activation.negative_slope == 0.01


def test_sona_starts_as_the_identity():
    x = torch.randn(2, 32, 6, 4)
    assert torch.equal(SONA(32)(x), x)


def test_sona_never_holds_the_attention_matrix():
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            results = function(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in tree_leaves(results) if isinstance(x, torch.Tensor))
            return results

    block, x = SONA(16), torch.randn(1, 16, 48, 16, requires_grad=True)
    with Sizes():
        block(x).sum().backward()
    assert x.numel() <= max(sizes) < 768 * 768 / 4


# ---------- Drop layers (Sec. 2.1, 3.4) -----------------------------------------------------------
def test_dropblock_plus_drops_blocks_and_rescales_the_rest():
    x = torch.ones(2000, 3, 48, 16)
    y = DropBlockPlus()(x)
    assert torch.equal(DropBlockPlus().eval()(x), x)
    assert torch.equal(y[:, 0], y[:, 2])  # one mask for all channels
    kept = y[:, 0] > 0  # (B, 48, 16)
    assert len({mask.numpy().tobytes() for mask in kept}) > 1000  # but not for all images
    assert y.mean().item() == pytest.approx(1)  # the mean of the masks is 1,
    assert len(y.unique()) == 2  # with one factor for all images: 0 where dropped, it where kept
    # Every dropped position lies in a 5 x 8 block that is dropped whole.
    blocks = F.avg_pool2d((~kept).float()[:, None], (5, 8), stride=1) == 1
    covered = F.max_pool2d(F.pad(blocks.float(), (7, 7, 4, 4)), (5, 8), stride=1)[:, 0] > 0
    assert torch.equal(covered, ~kept)
    # Seeds by DropBlock's Eq. 1; a position is kept if no block covers it.
    seed_rate = 0.1 / 40 * (48 * 16) / (44 * 9)
    covering = torch.ones(1, 1, 44, 9)
    covering = F.avg_pool2d(F.pad(covering, (7, 7, 4, 4)), (5, 8), stride=1, divisor_override=1)[
        0, 0
    ]
    dropped_share = 1 - (1 - seed_rate) ** covering
    assert abs((~kept).float().mean() - dropped_share.mean()) < 0.005
    assert 0.08 < dropped_share.mean() < 0.1


def test_dropblock_plus_cuts_its_block_to_a_smaller_map():
    y = DropBlockPlus(drop_rate=0.5)(torch.ones(200, 1, 8, 4))
    assert (y == 0).any() and (y > 0).any() and y.isfinite().all()
    assert ((y == 0).all(3) == (y == 0).any(3)).all()  # whole rows of 4, as 8 do not fit


def test_batch_drop_block_drops_one_rectangle():
    starts = set()
    for _ in range(50):
        y = BatchDropBlock(height_ratio=1 / 3, width_ratio=0.5)(torch.ones(3, 2, 48, 16))
        assert torch.equal(y, y[:1, :1].expand_as(y))
        rows, columns = (
            (y[0, 0] == 0).any(1).nonzero().flatten(),
            (y[0, 0] == 0).any(0).nonzero().flatten(),
        )
        assert (
            (len(rows), len(columns))
            == (rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1)
            == (16, 8)
        )
        assert y.max() == 1 and (y == 0).sum() == 3 * 2 * 16 * 8
        starts.add((int(rows[0]), int(columns[0])))
    assert len(starts) > 25
    assert torch.equal(BatchDropBlock(1 / 3, 1).eval()(y), y)


# ---------- The network (Sec. 2.1, 3.3, 3.4) ------------------------------------------------------
SONAS = ["none", "2", "3", "2+3", "4-global", "4-local", "4-both"]


def seen(network, images, *names):
    """The inputs and outputs of a network's modules in a forward pass."""
    found, modules = {}, dict(network.named_modules())
    for name in names:
        modules[name].register_forward_hook(
            lambda _, x, y, name=name: found.update({name: (x[0], y)})
        )
    with torch.no_grad():
        network(images)
    return [found[name] for name in names]


@pytest.mark.parametrize("sona", SONAS)
def test_placements_of_sona(sona):
    network, images = SONANet(10, sona), torch.randn(2, 3, 64, 32)
    outputs = network(images)
    shapes = {branch: [tuple(tensor.shape) for tensor in pair] for branch, pair in outputs.items()}
    assert shapes == {"global": [(2, 512), (2, 10)], "local": [(2, 1024), (2, 10)]}
    assert all(
        (embedding >= 0).all() for embedding, _ in outputs.values()
    )  # reduced by conv, BN and ReLU
    # theta: conv without bias, BN; g and p: conv with bias
    channels = {"none": [], "2": [512], "3": [1024], "2+3": [512, 1024]}.get(
        sona, [2048] * (1 + (sona == "4-both"))
    )
    expected = 23_508_032 + sum(
        3 * c * c // 2 + 2 * c + c // 2 for c in channels
    )  # ResNet-50 without fc, SONA
    expected += 2 * 2048 * 512 + 9 * 512 * 512 + 2 * (512 + 512 + 2048)  # bottleneck
    expected += (
        2048 * 512 + 2 * 512 + 2048 * 1024 + 2 * 1024 + 10 * (512 + 1 + 1024 + 1)
    )  # reductions, classifiers
    assert sum(parameter.numel() for parameter in network.parameters()) == expected
    with torch.no_grad():
        before = network.eval()(images)
        for module in network.modules():
            if isinstance(module, SONA):
                nn.init.normal_(module.p.weight)
        changed = (network(images) != before).any(0)
    assert changed.shape == (1536,)
    in_trunk = sona in ("2", "3", "2+3")
    assert changed[:512].any() == (in_trunk or sona in ("4-global", "4-both"))
    assert changed[512:].any() == (in_trunk or sona in ("4-local", "4-both"))
    for stage, shape in (("2", (2, 512, 8, 4)), ("3", (2, 1024, 8, 4))):
        ((x, y),) = seen(network, images, f"stage{stage}_sona")
        assert x.shape == y.shape == shape
        assert torch.equal(x, y) == (stage not in sona.split("+"))


def test_branches_average_and_take_the_maximum():
    network, names = (
        SONANet(10, "4-both").eval(),
        ("global_sona", "global_reduction", "drop", "local_reduction"),
    )
    for module in (network.global_sona, network.local_sona):
        nn.init.normal_(module.p.weight)
    images = torch.randn(2, 3, 64, 32)
    (_, x), (average, first), (_, y), (maximum, second) = seen(network, images, *names)
    torch.testing.assert_close(average, x.mean((2, 3), keepdim=True))
    assert torch.equal(maximum, y.amax((2, 3), keepdim=True))
    assert torch.equal(network(images), torch.cat([first, second], 1))
    chain = seen(network, images, "stage4", "local_sona", "local_bottleneck", "drop")
    assert all(torch.equal(x, y) for (_, y), (x, _) in zip(chain, chain[1:], strict=False))
    outputs = seen(
        network, torch.randn(1, 3, 384, 128), "stage2", "stage3", "stage4", "local_bottleneck"
    )
    assert [tuple(y.shape) for _, y in outputs] == [
        (1, c, 48, 16) for c in (512, 1024, 2048, 2048)
    ]  # stride 8


def test_drop_layers_act_in_training_only():
    images, dropblock = torch.randn(2, 3, 64, 32), ("drop_rate", "block_height", "block_width")
    for drop, kind, names, numbers in (
        ("none", nn.Identity, (), ()),
        ("dropblock", DropBlockPlus, dropblock, (0.1, 7, 7)),
        ("dropblock+", DropBlockPlus, dropblock, (0.1, 5, 8)),
        ("bfe", BatchDropBlock, ("height_ratio", "width_ratio"), (1 / 3, 1)),
    ):
        network = SONANet(10, "none", drop)
        assert type(network.drop) is kind
        assert tuple(getattr(network.drop, name) for name in names) == numbers
        network.drop.drop_rate = 0.9
        for training in (False, True):
            ((x, y),) = seen(network.train(training), images, "drop")
            assert torch.equal(x, y) == (drop == "none" or not training)


def test_stages_3_and_4_are_dilated():
    network = SONANet(10)
    for stage, dilations in ((network.stage3, [1] + 5 * [2]), (network.stage4, [2, 4, 4])):
        assert [block.conv2.dilation[0] for block in stage] == dilations
        assert {block.conv2.stride for block in stage} == {(1, 1)}
    assert network.local_bottleneck.conv2.dilation == (1, 1)
    assert network.local_bottleneck.conv2.stride == (1, 1)


def test_classifiers_start_undecided():
    network = SONANet(767)
    for _, logits in network(torch.randn(4, 3, 64, 32)).values():
        assert abs(F.cross_entropy(logits, torch.arange(4)) - math.log(767)) < 0.05
    for classifier in (network.global_classifier, network.local_classifier):
        assert classifier.weight.std().item() == pytest.approx(0.001, rel=0.02)
        assert not classifier.bias.any()


def test_residual_branches_start_at_zero_without_weights():
    assert all(block.bn3.weight.abs().max() == 0 for block in SONANet(10).stage3)


@pytest.mark.parametrize("variant", [{"sona": "mine"}, {"drop": "mine"}])
def test_unknown_variants_are_refused(variant):
    with pytest.raises(KeyError, match="mine"):
        SONANet(10, **variant)


def test_imagenet_weights_and_files(tmp_path, monkeypatch):
    torch.manual_seed(1)
    state = resnet50().state_dict()
    asked = []
    torch.save(state, tmp_path / "resnet50.pth")
    torch.save(
        {name: x for name, x in state.items() if not name.startswith("fc.")},
        tmp_path / "headless.pth",
    )

    def get_state_dict(self, **options):
        asked.append((self.name, options))
        return state

    monkeypatch.setattr(ResNet50_Weights, "get_state_dict", get_state_dict)
    for weights in ("imagenet", str(tmp_path / "resnet50.pth"), str(tmp_path / "headless.pth")):
        ours = SONANet(10, weights=weights).state_dict()
        assert torch.equal(ours["stem.0.weight"], state["conv1.weight"])
        for name in (
            "1.0.bn1.running_mean",
            "2.1.conv2.weight",
            "3.5.bn3.bias",
            "4.2.bn3.running_var",
        ):
            assert torch.equal(ours[f"stage{name}"], state[f"layer{name}"])
    assert asked == [("IMAGENET1K_V1", {"check_hash": True, "weights_only": True})]


def test_fine_tuning_takes_a_run_without_its_classifiers(tmp_path):
    trained = SONANet(5, "3")
    nn.init.normal_(trained.stage3_sona.p.weight)
    torch.save({"network": trained.state_dict(), "settings": {}}, tmp_path / "last.pt")
    ours = SONANet(7, "3", weights=str(tmp_path / "last.pt"))
    assert len(ours.global_classifier.weight) == 7
    for name, tensor in trained.state_dict().items():
        assert "classifier" in name or torch.equal(ours.state_dict()[name], tensor)
    with pytest.raises(RuntimeError, match="Missing.*stage2_sona"):
        SONANet(7, "2", weights=str(tmp_path / "last.pt"))


def test_weights_and_checkpoints_are_not_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    file = tmp_path / "last.pt"
    torch.save({"conv1.weight": Evil()}, file)
    for load in (
        lambda: SONANet(10, weights=str(file)),
        lambda: evaluate.load_run(tmp_path),
        lambda: launch(train, "--output", tmp_path, "--resume"),
    ):
        with pytest.raises((DataError, pickle.UnpicklingError)):
            load()
    assert not (tmp_path / "executed").exists()


def test_activations_follow_the_layout_of_the_parameters():
    images = normalize(torch.zeros(2, 3, 64, 32, dtype=torch.uint8))
    for layout in (torch.channels_last, torch.contiguous_format):
        network = SONANet(4).to(memory_format=layout)
        ((_, x), (_, y)) = seen(network, images, "stage1", "local_bottleneck")
        assert x.is_contiguous(memory_format=layout)
        assert y.is_contiguous(memory_format=layout)


# ---------- Losses (Sec. 2.1) ---------------------------------------------------------------------
def triplet_by_brute_force(embeddings, labels, margin):
    terms = []
    for a, anchor in enumerate(embeddings):
        distances = [
            (anchor - other).square().sum().sqrt() if i != a else None
            for i, other in enumerate(embeddings)
        ]
        positive = max(d for i, d in enumerate(distances) if labels[i] == labels[a] and i != a)
        negative = min(d for i, d in enumerate(distances) if labels[i] != labels[a])
        gap = positive - negative
        terms.append(torch.log(1 + gap.exp()) if margin is None else (gap + margin).clamp(min=0))
    return torch.stack(terms).mean()


@pytest.mark.parametrize("margin", [None, 0.3, 2.0])
def test_triplet_loss_matches_brute_force(margin):
    labels = torch.tensor([0, 1, 2, 3] * 3)
    apart = torch.tensor([0, 0, 9, 18])[
        labels, None
    ]  # two identities that lie among each other, two that do not
    embeddings = (torch.randn(12, 5, dtype=torch.float64) + apart).requires_grad_()
    ours, theirs = (
        f(embeddings, labels, margin) for f in (batch_hard_triplet_loss, triplet_by_brute_force)
    )
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        *(torch.autograd.grad(loss, embeddings)[0] for loss in (ours, theirs))
    )


def test_triplet_loss_without_distances_positives_or_negatives():
    four_of_two, alone = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1])
    for embeddings, labels, margin, expected in (
        (torch.ones(4, 5), four_of_two, None, math.log(2)),
        (torch.ones(4, 5), four_of_two, 0.3, 0.3),
        (torch.tensor([[0.0], [3.0]]), alone, None, math.log(1 + math.exp(-3))),  # its own positive
        (torch.tensor([[0.0], [3.0]]), alone * 0, None, 0),
    ):
        loss = batch_hard_triplet_loss(embeddings.requires_grad_(), labels, margin)
        loss.backward()
        assert loss.item() == pytest.approx(expected)
        assert embeddings.grad.isfinite().all()
    with pytest.raises(
        ValueError, match=r"expected \(B, D\) and \(B,\), not .*\[4, 5\].* and .*\[2\]"
    ):
        batch_hard_triplet_loss(torch.ones(4, 5), alone)


def quarters(*shape):
    """Multiples of 1/4, which bfloat16 and float32 hold exactly."""
    return torch.randint(-8, 8, shape) / 4


def test_triplet_loss_is_exact_far_from_the_origin():
    labels = torch.tensor([0, 1, 2, 3] * 3)
    near = quarters(12, 5)
    expected = batch_hard_triplet_loss(near, labels)
    torch.testing.assert_close(batch_hard_triplet_loss(near + 4096, labels), expected)


def test_triplet_loss_is_in_float32_inside_autocast():
    labels = torch.tensor([0, 1, 2, 3] * 3)
    embeddings = quarters(12, 5)
    with torch.autocast("cpu", torch.bfloat16):
        loss = batch_hard_triplet_loss(embeddings.bfloat16(), labels)
    assert torch.equal(loss, batch_hard_triplet_loss(embeddings, labels))


def test_the_loss_is_the_sum_of_four():
    labels = torch.tensor([0, 1, 2] * 2)
    outputs = {
        branch: (torch.randn(6, d), torch.randn(6, 3))
        for branch, d in (("global", 512), ("local", 1024))
    }
    for margin in (None, 0.3):
        triplet = partial(triplet_by_brute_force, labels=labels, margin=margin)
        total, parts = branch_losses(outputs, labels, margin)
        for branch, (embedding, logits) in outputs.items():
            target = 0.9 * F.one_hot(labels) + 0.1 / 3  # label smoothing of 0.1 [36]
            cross_entropy = -(target * logits.log_softmax(1)).sum(1).mean()
            torch.testing.assert_close(parts[f"{branch}_cross_entropy"], cross_entropy)
            torch.testing.assert_close(
                parts[f"{branch}_triplet"], triplet(embedding), rtol=1e-4, atol=0
            )
            torch.testing.assert_close(
                parts[f"{branch}_accuracy"], (logits.argmax(1) == labels).float().mean()
            )
        four = [
            parts[f"{branch}_{loss}"]
            for branch in ("global", "local")
            for loss in ("triplet", "cross_entropy")
        ]
        torch.testing.assert_close(total, sum(four))
        torch.testing.assert_close(parts["loss"], sum(four))


# ---------- Data (Sec. 3.1, 3.2) ------------------------------------------------------------------
def touch(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


def test_the_counts_are_those_of_table_1():
    table_1 = {
        "market1501": {"train": (12936, 751), "query": (3368, 750), "gallery": (19732 - 3819, 750)},
        "cuhk03": {"train": (7368, 767), "query": (1400, 700), "gallery": (5328, 700)},
        "cuhk03-detected": {"train": (7365, 767), "query": (1400, 700), "gallery": (5332, 700)},
        "dukemtmc": {"train": (16522, 702), "query": (2228, 702), "gallery": (17661, 1110)},
    }
    assert {name: DATASETS[name].counts for name in table_1} == table_1


LAYOUTS = {  # where people have them
    "toy": ["toy"],
    "market1501": [
        "market1501", "Market-1501-v15.09.15", "market1501/Market-1501-v15.09.15", "Market-1501",
        "Market1501",
        "market_1501", "Market-1501/Market-1501-v15.09.15", "reid/market1501/Market-1501-v15.09.15",
    ],
    "dukemtmc": [
        "dukemtmc-reid", "DukeMTMC-reID", "dukemtmc-reid/DukeMTMC-reID", "dukemtmcreid",
        "DukeMTMC-reID/DukeMTMC-reID", "DukeMTMC", "duke_mtmc_reid",
    ],
    "cuhk03": [
        "cuhk03-np/labeled", "CUHK03-NP/labeled", "cuhk03/labeled", "CUHK03-NP/cuhk03-np/labeled",
        "cuhk03_np_labeled", "CUHK03_np/Labeled", "cuhk03-np-labeled", "cuhk03/cuhk03-np/labeled",
    ],
}  # fmt: skip
LAYOUTS["cuhk03-detected"] = [
    x.replace("label", "detect").replace("Label", "Detect") for x in LAYOUTS["cuhk03"]
]
LAYOUTS = [(name, layout) for name, layouts in LAYOUTS.items() for layout in layouts]


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_a_set_is_found_where_people_have_it(tmp_path, monkeypatch, name, layout):
    folder = tmp_path / layout
    for split in FOLDERS.values():
        touch(folder / split)
    touch(tmp_path / "__MACOSX" / layout)
    touch(tmp_path / "other")
    touch(folder.parent, "a file")
    above = [path for path in folder.parents if tmp_path in (path, *path.parents)]
    for data_dir in (folder, *above):  # the folder itself, or what holds it
        assert data.find_folder(name, data_dir).samefile(folder)
    monkeypatch.chdir(folder)
    assert data.find_folder(name, ".").samefile(folder)
    for other in DATASETS.keys() - {name}:
        for data_dir in (".", folder, *above):
            with pytest.raises(DataError, match=f"^{other}: found no folder named like"):
                data.find_folder(other, data_dir)


def test_what_is_not_the_set_is_not_taken(tmp_path):
    for i, (name, layout, data_dir) in enumerate((
        ("market1501", "market1501/dukemtmc-reid", "market1501"),  # of the set's name
        ("cuhk03", "cuhk03-labeled/detected", "."),
        ("cuhk03", "cuhk03-labeled/detected", "cuhk03-labeled"),
        ("dukemtmc", "Occluded-DukeMTMC-reID", "."),
        ("market1501", "__MACOSX/Market-1501-v15.09.15", "."),
        ("market1501", ".trash/market1501", "."),
        ("market1501", "market1501-masks/other", "."),
        ("market1501", "one/two/three/market1501", "."),  # too deep
        ("cuhk03-detected", "cuhk03-np/detected/bounding_box_train", "."),  # not whole
    )):  # fmt: skip
        for split in FOLDERS.values():
            touch(tmp_path / f"{i}" / layout / split)
        with pytest.raises(DataError, match=f"^{name}: found no folder") as error:
            data.find_folder(name, tmp_path / f"{i}" / data_dir)
        told = (
            f"named like '{DATASETS[name].words}'",
            *FOLDERS.values(),
            str(tmp_path / f"{i}" / data_dir),
        )
        assert all(words in str(error.value) for words in told)
        assert ("cuhk-03.mat is the raw release" in str(error.value)) == name.startswith("cuhk03")


def test_file_names_say_identity_and_camera(tmp_path):
    names = {
        "0002_c1s1_000451_03.jpg": (2, 1),  # Market-1501
        "0000_c6s4_002202_01.jpg": (0, 6),  # a distractor stays
        "-1_c3s2_000112_02.jpg": None,  # junk
        "0005_c8_f0046182.JPG": (5, 8),  # DukeMTMC-reID
        "1467_c2_10.png": (1467, 2),  # CUHK03-NP
        "0003_c12.bmp": (3, 12),
        "Thumbs.db": None,
        "._0002_c1s1_000451_03.jpg": None,
        "readme.txt": None,
    }
    touch(tmp_path, *names)
    split = data.read_split(tmp_path)
    found = {
        Path(p).name: (i, c) for p, i, c in zip(split.paths, split.ids, split.cams, strict=True)
    }
    assert found == {name: who for name, who in names.items() if who}
    assert split.labels.tolist() == np.searchsorted([0, 2, 3, 5, 1467], split.ids).tolist()


@pytest.mark.parametrize(
    "name",
    [
        "me.jpg",
        "0001.jpg",
        "0001_1.jpg",
        "_c1s1_0.jpg",
        "-2_c1_0.jpg",
        "0001_c1x.png",
        f"{2**64}_c1.jpg",
    ],
)
def test_a_name_that_does_not_parse_is_named(tmp_path, name):
    with pytest.raises(DataError, match=f"{name}': the name must be <identity>_c<camera>_"):
        data.read_split(touch(tmp_path, name))


def whole_set(*folders):
    for folder in folders:
        for split in FOLDERS.values():
            touch(folder / split)


def test_the_set_of_the_exact_name_is_taken_or_none_of_several(tmp_path):
    whole_set(tmp_path / "Market-1501-GAN", tmp_path / "Market-1501-old")
    with pytest.raises(DataError, match="found '.*GAN' and '.*old'; choose one with --data-dir"):
        data.find_folder("market1501", tmp_path)
    whole_set(tmp_path / "Market-1501")
    assert data.find_folder("market1501", tmp_path) == tmp_path / "Market-1501"


def test_the_sets_that_are_there_are_named(tmp_path):
    whole_set(tmp_path / "cuhk03-np/detected")
    with pytest.raises(DataError, match="cuhk03: .*; there is --dataset cuhk03-detected$"):
        data.find_folder("cuhk03", tmp_path)


def test_a_set_is_found_below_another(tmp_path):
    whole_set(tmp_path / "market1501", tmp_path / "market1501/cuhk03-np/labeled")
    assert data.find_folder("cuhk03", tmp_path) == tmp_path / "market1501/cuhk03-np/labeled"


def test_words_of_a_set_match_in_any_case_and_punctuation(tmp_path):
    whole_set(tmp_path / "my_MALL v2")
    with mock.patch.dict(DATASETS, {"my": data.Source("My-Mall")}):
        assert data.find_folder("my", tmp_path) == tmp_path / "my_MALL v2"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may enter")
def test_a_folder_that_may_not_be_entered_is_passed_over(tmp_path):
    whole_set(tmp_path / "market1501")
    touch(tmp_path / "closed").chmod(0)
    assert data.find_folder("market1501", tmp_path) == tmp_path / "market1501"


def test_identity_0_is_a_distractor_in_a_gallery(tmp_path):
    touch(tmp_path / "market1501/bounding_box_train", "0000_c1s1_1.jpg", "0001_c1s1_1.jpg")
    touch(
        tmp_path / "market1501/bounding_box_test",
        *(f"000{i}_c{c}s1_1.jpg" for i in (0, 1, 2) for c in (1, 2)),
    )
    for query, counts in (("0001_c1s1_1.jpg", "212"), ("0000_c1s1_1.jpg", "223")):
        touch(tmp_path / "market1501/query", query)
        splits = load_dataset("market1501", tmp_path)
        lines = data.describe("market1501", splits).splitlines()
        assert [line.split()[2] for line in lines[1:4]] == [*counts]
    assert splits["train"].labels.tolist() == [0, 1]
    assert lines[1].split() == "train 2 2 1 published: 12,936 and 751".split()
    assert lines[4] == f"from {tmp_path / 'market1501'}"


def test_images_of_any_mode_load_as_rgb(tmp_path):
    grey = (np.arange(64, dtype=np.uint8) * 4).reshape(8, 8)
    picture = Image.fromarray(np.stack([grey, grey.T, 255 - grey], 2))
    for name in ("RGB.bmp", "RGBA.webp", "CMYK.jpg", "L.png", "LA.png", "P.png"):
        mode = name.split(".")[0]
        picture.convert(mode).save(tmp_path / name, quality=95)
        loaded = data.read_image(tmp_path / name).permute(1, 2, 0).numpy().astype(int)
        expected = picture.convert("L").convert("RGB") if mode[0] == "L" else picture
        assert np.abs(loaded - np.asarray(expected)).mean() < (40 if mode == "P" else 12), (
            name
        )  # 256 colours


def test_transparent_pixels_are_white(tmp_path):
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[:2, :, 0] = pixels[:2, :, 3] = 255  # red and opaque above, hidden black below
    for name in ("RGBA.png", "RGBA.webp"):
        Image.fromarray(pixels).save(tmp_path / name, lossless=True)
        image = data.read_image(tmp_path / name)
        assert image[:, 0, 0].tolist() == [255, 0, 0]
        assert image[:, 3, 3].tolist() == [255, 255, 255]


def exif_of(*tags):
    """EXIF with (tag, type, count, value or offset) entries and the rational number 1/2."""
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    header = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(tags))
    return header + entries + struct.pack("<III", 0, 1, 2)


@pytest.mark.parametrize("description", [[], [(0x010E, 5, 1, 38)]])  # one Pillow cannot write
def test_a_photo_that_lies_on_its_side_is_turned(tmp_path, description):
    exif = exif_of(*description, (0x0112, 3, 1, 6))
    Image.fromarray(np.uint8([[0] * 8 + [255] * 8] * 8)).save(tmp_path / "phone.jpg", exif=exif)
    image = data.read_image(tmp_path / "phone.jpg")
    assert image.shape == (3, 16, 8)
    assert (image[:, :7] < 50).all()
    assert (image[:, 9:] > 200).all()


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    data.draw_pedestrian(1, 1, 1).save(tmp_path / "whole.jpg")
    (tmp_path / "torn.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:900])
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "script.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    Image.new("L", (9, 9)).save(tmp_path / "other.jpg", format="GIF")
    Image.fromarray(np.full((9, 9), 3000, np.uint16)).save(tmp_path / "16 bits.png")
    touch(tmp_path, "empty.bmp")
    touch(tmp_path / "folder.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    names = (
        "torn.jpg",
        "other.jpg",
        "16 bits.png",
        "text.png",
        "script.jpg",
        "empty.bmp",
        "folder.jpg",
        "pipe.jpg",
        "no\n.jpg",
    )
    for name in names:
        path = str(tmp_path / name)
        message = f"^cannot read the image {re.escape(repr(path))}: .*; replace or remove it$"
        with pytest.raises(DataError, match=message):
            ImageDataset([path], [0], 64, 32)[0]


def test_images_are_resized_as_pillow_does(tmp_path):
    picture = data.draw_pedestrian(1, 1, 1)
    picture.save(tmp_path / "a.png")
    for height, width in ((96, 48), (384, 128)):
        image, _ = ImageDataset([str(tmp_path / "a.png")], [0], height, width)[0]
        expected = picture.resize((width, height), Image.Resampling.BILINEAR)
        difference = image.permute(1, 2, 0).numpy().astype(int) - np.asarray(expected)
        assert np.abs(difference).max() <= 2


def test_normalisation_refuses_what_is_not_uint8_and_leaves_its_input():
    images = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    before = images.clone()
    normalize(images)
    augment(images)
    assert torch.equal(images, before)
    with pytest.raises(TypeError, match="uint8, 0 to 255, not torch.float32"):
        normalize(images / 255)


def test_images_are_resized_and_normalised(tmp_path):
    Image.new("RGB", (50, 90), (255, 0, 128)).save(tmp_path / "plain.png")
    image, label = ImageDataset([str(tmp_path / "plain.png")], [7], 384, 128)[0]
    assert (image.shape, image.dtype, label) == ((3, 384, 128), torch.uint8, 7)
    expected = torch.tensor([1 - 0.485, 0 - 0.456, 128 / 255 - 0.406]) / torch.tensor(
        [0.229, 0.224, 0.225]
    )
    normalised = normalize(image[None])
    torch.testing.assert_close(normalised[0], expected[:, None, None].expand(3, 384, 128))


@pytest.mark.parametrize(("height", "width", "side"), [(384, 128, 64), (96, 32, 16)])
def test_cutout_fills_one_square_of_half_the_images_with_0(height, width, side):
    images = cutout(torch.ones(400, 3, height, width))
    assert torch.equal(images[:, 0], images[:, 2])
    corners = set()
    for zero in images[:, 0] == 0:
        if zero.any():
            rows, columns = (
                zero.any(1).nonzero().flatten().tolist(),
                zero.any(0).nonzero().flatten().tolist(),
            )
            assert zero.sum() == side**2
            assert (
                len(rows)
                == len(columns)
                == rows[-1] - rows[0] + 1
                == columns[-1] - columns[0] + 1
                == side
            )
            corners.add((rows[0], columns[0]))
    assert 150 < (images == 0).flatten(1).any(1).sum() < 250
    assert len(corners) > 100 and {0, width - side} <= {column for _, column in corners}


def test_augmentation_flips_half_the_images_and_normalises():
    images = torch.randint(0, 256, (400, 3, 24, 8), dtype=torch.uint8)
    augmented = augment(images)
    kept = augmented != 0
    straight, mirrored = (
        ((augmented == normalize(x)) | ~kept).flatten(1).all(1) for x in (images, images.flip(3))
    )
    assert (straight | mirrored).all()
    assert kept.float().mean((1, 2, 3)).min() > 0.9
    assert 150 < mirrored.sum() < 250


LABELS = [label for label in range(10) for _ in range(2 + label % 4)]  # identities of 2 to 5 images


def test_sampler_takes_each_identity_once_an_epoch():
    sampler = IdentitySampler(LABELS, ids_per_batch=3, images_per_id=4)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 10 // 3
    people = []
    for batch in batches:
        groups = np.array(LABELS)[batch].reshape(3, 4)
        assert (groups == groups[:, :1]).all()
        people += groups[:, 0].tolist()
        for images in np.reshape(batch, (3, 4)):  # none twice where there are enough
            assert len(set(images)) == 4 or LABELS.count(LABELS[images[0]]) < 4
    assert len(set(people)) == 9


def test_sampler_depends_on_seed_and_epoch_and_is_shared():
    def batches(seed, epoch, **share):
        sampler = IdentitySampler(LABELS, 4, 2, seed=seed, **share)
        sampler.set_epoch(epoch)
        return list(sampler)

    whole = batches(1, 2)
    assert whole == batches(1, 2)
    assert whole not in (batches(1, 3), batches(2, 2))
    shares = zip(*(batches(1, 2, rank=rank, world_size=2) for rank in (0, 1)), strict=True)
    assert [first + second for first, second in shares] == whole
    with pytest.raises(DataError, match="4 identities are not divisible by 3 processes"):
        batches(1, 2, world_size=3)
    with pytest.raises(DataError, match="10 identities, but a batch needs 11"):
        IdentitySampler(LABELS, ids_per_batch=11)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """A folder with the toy, a small market1501 of 2 cameras x 2 images, and the same as cuhk03."""
    folder = tmp_path_factory.mktemp("datasets")
    for split, people, images in (
        ("train", range(1, 5), 2),
        ("query", (50, 51, 52), 1),
        ("gallery", (50, 51, 52), 2),
    ):
        for person, camera, image in product(people, (1, 2), range(images)):
            picture = data.draw_pedestrian(person, camera, image + 2 * (split == "query"))
            picture.save(
                touch(folder / "market1501" / FOLDERS[split])
                / f"{person:04d}_c{camera}s1_{image:06d}_00.jpg"
            )
    shutil.copytree(folder / "market1501", folder / "cuhk03-np/labeled")
    load_dataset("toy", folder)
    return folder


def test_the_toy_is_drawn_whole_and_the_same_each_time(datasets, tmp_path):
    toy = load_dataset("toy", datasets)
    assert "published" not in data.describe("toy", toy)
    assert not set(toy["train"].ids) & set(toy["query"].ids)
    assert sorted(path.name for path in datasets.iterdir()) == [
        "cuhk03-np",
        "market1501",
        "toy",
    ]  # no scratch
    for path, person, camera in list(zip(*toy["query"], strict=True))[::40]:
        data.draw_pedestrian(person, camera, 0).save(tmp_path / "again.png")
        assert (tmp_path / "again.png").read_bytes() == Path(path).read_bytes()


# ---------- The schedule and the training step (Sec. 3.2) -----------------------------------------
def test_the_learning_rate_is_the_papers():
    warm_up = [1e-4 * step for step in range(1, 11) for _ in range(5)]
    papers = warm_up + 150 * [1e-3] + 100 * [1e-4] + 100 * [1e-5]
    assert [learning_rate(epoch) for epoch in range(400)] == pytest.approx(papers, rel=1e-12)


def test_other_numbers_of_epochs_scale_the_schedule():
    scaled = [0.1, 0.3, 0.5, 0.7, 0.9] + 15 * [1] + 10 * [0.1] + 10 * [0.01]
    rates = [learning_rate(epoch, 40, 2) for epoch in range(40)]
    assert rates == pytest.approx([2 * rate for rate in scaled])
    papers = [learning_rate(epoch) for epoch in range(400)]
    assert [learning_rate(epoch, 800) for epoch in range(0, 800, 2)] == papers
    assert learning_rate(0, 1) == pytest.approx(1e-4)


def test_a_pass_has_its_own_random_numbers():
    network = nn.Sequential()  # returns the images as they come out of augmentation
    network.forward = lambda images: {"global": (images, torch.rand(1))}
    images = torch.randint(256, (8, 3, 24, 8), dtype=torch.uint8)

    def augmented(*rng_key, images=images, rank=0):
        return Passes(network, 2, rank)(images, rng_key)["global"]

    first = augmented(1, 2, 3)
    torch.rand(5)
    assert all(map(torch.equal, augmented(1, 2, 3), first))
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4), (2, 1, 3)):
        assert not any(map(torch.equal, augmented(*other), first))
    assert len(set(first[1].tolist())) == 4  # each pass of a step has its own numbers
    # Two processes of two passes each make the four passes of one process.
    halves = [augmented(1, 2, 3, images=images[4 * rank :][:4], rank=rank) for rank in (0, 1)]
    assert all(map(torch.equal, map(torch.cat, zip(*halves, strict=True)), first))
    with pytest.raises(ValueError, match="--images-per-pass 3 must divide a process's 8"):
        Passes(network, 3)(images, (1, 2, 3))


def test_batch_norm_treats_passes_apart():
    network = SONANet(4, drop="none")
    alone = deepcopy(network)
    images = torch.randint(256, (8, 3, 32, 16), dtype=torch.uint8)
    outputs = Passes(network, 4)(images, (0, 0, 0))
    for i in (0, 1):
        expected = Passes(alone, 4, rank=i)(images[4 * i :][:4], (0, 0, 0))
        for branch in ("global", "local"):
            torch.testing.assert_close(outputs[branch][0][4 * i :][:4], expected[branch][0])


def test_the_first_passs_statistics_are_kept():
    network = SONANet(4, drop="none")
    alone = deepcopy(network)
    images = torch.randint(256, (8, 3, 32, 16), dtype=torch.uint8)
    Passes(network, 4)(images, (0, 0, 0))
    Passes(alone, 4)(images[:4], (0, 0, 0))
    assert all(map(torch.equal, network.buffers(), alone.buffers()))
    assert network.stem[1].num_batches_tracked == 1
    Passes(alone, 4, rank=1)(images, (0, 0, 1))  # another process's passes change no statistics
    assert all(map(torch.equal, network.buffers(), alone.buffers()))


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_recomputed_gradients_are_the_same_bit_for_bit(precision):
    network, images = SONANet(4), torch.randint(256, (8, 3, 32, 16), dtype=torch.uint8)
    nn.init.normal_(network.stage2_sona.p.weight, std=0.1)
    results = []
    for recompute in (False, True):
        ours = deepcopy(network)
        outputs = Passes(ours, 2, precision=precision, recompute=recompute)(images, (0, 0, 0))
        assert {tensor.dtype for pair in outputs.values() for tensor in pair} == {torch.float32}
        loss = branch_losses(outputs, torch.arange(4).repeat_interleave(2))[0]
        loss.backward()
        results.append(
            [loss.detach(), *(parameter.grad for parameter in ours.parameters()), *ours.buffers()]
        )
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize(
    ("sona", "drop"), [("2+3", "dropblock+"), ("4-both", "bfe"), ("none", "none")]
)
def test_a_step_on_a_gpu_never_synchronises(sona, drop):
    """On tensors without data: fails if one is on the wrong device, or Python needs a value."""
    with FakeTensorMode():
        try:
            torch.zeros(1, device="cuda").uniform_()
        except RuntimeError as error:
            pytest.skip(
                f"this PyTorch needs a GPU's driver even for a device of shapes alone: {error}"
            )
        with torch.device("cuda"):
            network = SONANet(10, sona, drop)
        images = torch.zeros(8, 3, 64, 32, dtype=torch.uint8, device="cuda")
        labels = torch.zeros(8, dtype=torch.int64, device="cuda")
        with mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False):
            outputs = Passes(network, 4, precision="fp16")(images, (0, 0, 0))
            loss, parts = branch_losses(outputs, labels)
            with torch.autocast("cuda", torch.float16):
                embeddings = network.eval()(normalize(images))
        assert {part.device.type for part in (loss, *parts.values())} == {"cuda"}
        assert (embeddings.device.type, embeddings.dtype) == ("cuda", torch.float16)


CONTIGUOUS, CHANNELS_LAST = torch.contiguous_format, torch.channels_last


@pytest.mark.parametrize(
    ("capability", "precision", "layout_of_float32"),
    [
        ((9, 0), "fp16", CHANNELS_LAST),
        ((8, 0), "fp16", CHANNELS_LAST),
        ((7, 5), "fp16", CONTIGUOUS),
        ((7, 0), "fp16", CONTIGUOUS),
        ((6, 1), "float32", CONTIGUOUS),
    ],
)
def test_precision_and_layout_of_a_gpu(monkeypatch, capability, precision, layout_of_float32):
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert train.default_precision(gpu) == precision
    assert evaluate.memory_format(gpu, "float32") == layout_of_float32
    assert evaluate.memory_format(gpu, "fp16") == CHANNELS_LAST


def test_precision_and_layout_of_a_cpu():
    assert train.default_precision(torch.device("cpu")) == "float32"
    assert evaluate.memory_format(torch.device("cpu"), "float32") == CHANNELS_LAST


# ---------- Ranking (Sec. 3.3) --------------------------------------------------------------------
def rank_by_brute_force(
    query, gallery, query_ids, gallery_ids, query_cams, gallery_cams, max_rank=50
):
    """The protocol in float64, with a full and stable sort."""
    cmc, aps = [], []
    for q, i, c in zip(query.astype(float), query_ids, query_cams, strict=True):
        keep = (gallery_ids != -1) & ~((gallery_ids == i) & (gallery_cams == c))
        order = np.argsort(((gallery.astype(float) - q) ** 2).sum(1)[keep], kind="stable")
        hits = gallery_ids[keep][order] == i
        if not hits.any():
            aps.append(np.nan)
            continue
        aps.append(np.mean(np.arange(1, hits.sum() + 1) / (np.flatnonzero(hits) + 1)))
        cmc.append([hits[:k].any() for k in range(1, max_rank + 1)])
    return np.mean(cmc, 0), np.array(aps)


def random_ranking(queries, gallery, ids, dimensions=6, levels=4):
    """Quantised features, so that many distances tie; with junk (-1), distractors (0) and unmatched
    queries."""
    rng = np.random.default_rng(0)
    features = [
        rng.integers(0, levels, (n, dimensions)).astype(np.float32) for n in (queries, gallery)
    ]
    people = [rng.integers(1, ids + 1, queries), rng.integers(-1, ids - 1, gallery)]
    return [*features, *people, *(rng.integers(1, 4, n) for n in (queries, gallery))]


def test_ranking_matches_brute_force():
    arguments = random_ranking(queries=60, gallery=300, ids=15)
    arguments[2][:2] = -1, 0  # a query of junk has no match, one of identity 0 has
    ranking = evaluate_ranking(*arguments)
    cmc, aps = rank_by_brute_force(*arguments)
    assert np.isnan(aps).sum() > 3
    np.testing.assert_allclose(ranking.average_precisions, aps, rtol=1e-12)
    np.testing.assert_allclose(ranking.cmc, cmc, rtol=1e-12)
    assert ranking.mean_ap == pytest.approx(np.nanmean(aps))
    assert ranking.metrics() == {
        "mean_ap": ranking.mean_ap,
        "rank1": cmc[0],
        "rank5": cmc[4],
        "rank10": cmc[9],
    }


def test_ranking_in_several_slabs_is_the_same_ranking():
    query, gallery, query_ids, gallery_ids, query_cams, gallery_cams = random_ranking(
        1000, 10_000, 3000, 3, 1000
    )
    whole, *parts = (  # the whole takes more than one slab of 8 million distances
        evaluate_ranking(
            query[i], gallery, query_ids[i], gallery_ids, query_cams[i], gallery_cams
        ).average_precisions
        for i in (np.arange(1000), *np.array_split(np.arange(1000), 3))
    )
    np.testing.assert_array_equal(whole, np.concatenate(parts))


@pytest.mark.parametrize(("middle", "spread"), [(1000, 1.8), (3000, 1.8), (0.3, 1e-5)])
def test_ranking_is_exact_far_from_the_origin(middle, spread):
    rng = np.random.default_rng(0)
    people = [rng.integers(0, 40, n) for n in (100, 400)]
    faces = rng.normal(size=(40, 64))
    features = [middle + spread * (faces[ids] + rng.normal(size=(len(ids), 64))) for ids in people]
    features = [x.astype(np.float32) for x in features]
    features[1][0] = 0  # one image that failed
    cams = np.zeros(100, int), np.ones(400, int)
    ranking = evaluate_ranking(*features, *people, *cams)
    _, aps = rank_by_brute_force(*features, *people, *cams)
    assert ranking.mean_ap == pytest.approx(aps.mean(), abs=1e-4)


def test_ranking_takes_lists_and_tensors():
    arguments = random_ranking(20, 60, 5)
    expected = evaluate_ranking(*arguments).average_precisions
    for kind in (np.ndarray.tolist, torch.from_numpy):
        aps = evaluate_ranking(*map(kind, arguments)).average_precisions
        np.testing.assert_array_equal(aps, expected)


def test_metrics_need_ten_ranks():
    ranking = evaluate_ranking(*random_ranking(20, 60, 5), max_rank=5)
    with pytest.raises(IndexError):
        ranking.metrics()


ZEROS = np.zeros(20, int)
REFUSED = {  # what is changed, and what is said
    "no match": ("no query has a true match", dict(query_ids=np.full(4, 99))),
    "nan": ("nan, inf or numbers too large", dict(query_features=np.full((4, 6), np.nan))),
    "inf": ("nan, inf or numbers too large", dict(gallery_features=np.full((20, 6), np.inf))),
    "length": (r"have the shapes .*\(7,\)", dict(gallery_ids=ZEROS[:7])),
    "column": (r"have the shapes .*\(20, 1\)", dict(gallery_ids=ZEROS[:, None])),
    "row": (r"have the shapes .*\(1, 20\)", dict(gallery_cams=ZEROS[None])),
    "width": (r"have the shapes \[\(4, 1\), \(20, 6\)", dict(query_features=np.ones((4, 1)))),
    "no query": (
        r"have the shapes \[\(0, 6\)",
        dict(query_features=np.zeros((0, 6)), query_ids=ZEROS[:0], query_cams=ZEROS[:0]),
    ),
    "no gallery": (
        r"have the shapes .*\(0, 6\)",
        dict(gallery_features=np.zeros((0, 6)), gallery_ids=ZEROS[:0], gallery_cams=ZEROS[:0]),
    ),
    "floats": ("must be integers", dict(gallery_ids=ZEROS + 0.5)),
    "too large": ("must be integers", dict(gallery_ids=[2**63 + i for i in range(20)])),
    "strings": ("must be integers", dict(gallery_ids=["-1"] * 20)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_ranking_refuses_what_it_cannot_rank(case):
    message, changed = REFUSED[case]
    names = list(inspect.signature(evaluate_ranking).parameters)[:6]
    good = dict(zip(names, random_ranking(4, 20, 5), strict=True))
    with pytest.raises(ValueError, match=message):
        evaluate_ranking(**good | changed)


def test_progress_leaves_nothing_on_the_line(tmp_path, monkeypatch):
    data.draw_pedestrian(1, 1, 0).save(tmp_path / "a.png")
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", terminal)
    extract_features(SONANet(4), [str(tmp_path / "a.png")], 64, 32)
    shown, left, after = terminal.getvalue().split("\r")
    assert shown.strip() == "image 0 of 1"
    assert len(left) >= len(shown) and left.strip() == after == ""


def test_features_average_the_image_and_its_mirror_image(tmp_path):
    paths = [str(tmp_path / name) for name in ("a.png", "b.png")]
    for person, path in enumerate(paths):
        data.draw_pedestrian(person, 1, 0).save(path)
    network = SONANet(4)
    features = extract_features(network, paths, 64, 32)
    assert not network.training
    images = normalize(torch.stack([ImageDataset(paths, [0, 1], 64, 32)[i][0] for i in range(2)]))
    with torch.no_grad():
        apart = network(images), network(images.flip(3))
    np.testing.assert_allclose(features, (apart[0] + apart[1]) / 2, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(*apart, rtol=1e-3)


def test_features_of_half_precision_are_float32(tmp_path, monkeypatch):
    path = str(tmp_path / "a.png")
    data.draw_pedestrian(1, 1, 0).save(path)
    network = Tiny(4)
    full = extract_features(network, [path], 64, 32)
    seen_dtypes = set()
    network.trunk[0].register_forward_hook(lambda *arguments: seen_dtypes.add(arguments[2].dtype))
    monkeypatch.setattr(evaluate, "default_precision", lambda device: "fp16")
    half = extract_features(network, [path], 64, 32)
    assert seen_dtypes == {torch.float16}
    assert half.dtype == np.float32
    np.testing.assert_allclose(half, full, rtol=0.01, atol=0.01)
    assert (half != full).any()


def test_nearest_images():
    gallery = np.array([[0, 2], [0, 1], [0, 0], [0, 3]])
    assert evaluate.nearest(np.zeros(2), gallery) == [(2, 0), (1, 1), (0, 2), (3, 3)]
    skip = np.array([False, False, True, False])
    assert evaluate.nearest(np.zeros(2), gallery, skip) == [(1, 1), (0, 2), (3, 3)]


def write_log(folder, losses, mean_ap):
    records = [{"epoch": epoch, "loss": loss} for epoch, loss in enumerate(losses)]
    records[-1]["mean_ap"] = mean_ap
    lines = [json.dumps(record) + "\n" for record in records]
    (touch(folder) / "log.jsonl").write_text("".join(lines))
    return folder


def test_curves_compare_average_losses(tmp_path, capsys):
    bl = write_log(tmp_path / "bl", [4, 2], 0.5)
    sona = write_log(tmp_path / "sona", [4, 2.03], 0.5)
    launch(evaluate, bl, sona, "--curves", tmp_path / "curves.png")
    printed = capsys.readouterr().out
    assert f"   3.0000   +0.00%  {bl}\n   3.0150   +0.50%  {sona}\n" in printed
    assert f"wrote {tmp_path / 'curves.png'}\n" in printed
    assert Image.open(tmp_path / "curves.png").size == (840, 360)


@pytest.mark.parametrize("loss, step", [(9, 2), (9000, 2000)])
def test_curves_have_round_ticks(tmp_path, monkeypatch, loss, step):
    run = write_log(tmp_path / "run", [loss] * 30, 0.97)
    written = []  # (which chart, which axis, text)

    def text(_, at, text, *arguments, anchor=None, **options):
        written.append((at[0] > 440, anchor, text))

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    launch(evaluate, run, "--curves", tmp_path / "curves.png")
    for mean_ap, axis, unit in ((False, "mt", 10), (False, "rm", step), (True, "rm", 20)):
        assert {(mean_ap, axis, f"{n * unit}") for n in range(6)} <= set(written)


# ========== Part two: a run =======================================================================
class Tiny(nn.Module):
    """A small stand-in for SONANet: the same interface, milliseconds a step."""

    def __init__(self, num_classes, sona="2", drop="dropblock+", weights=None):
        super().__init__()
        attention = next(iter(PLACEMENTS[sona].values()), nn.Identity)(8)
        self.trunk = nn.Sequential(
            nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8), nn.LeakyReLU(), attention
        )
        self.drop = DROPS[drop]()
        self.global_classifier, self.local_classifier = (
            nn.Linear(8, num_classes),
            nn.Linear(8, num_classes),
        )

    def forward(self, images):
        x = self.trunk(images)
        first, second = x.mean((2, 3)), self.drop(x).amax((2, 3))
        if not self.training:
            return torch.cat([first, second], 1)
        return {
            "global": (first, self.global_classifier(first)),
            "local": (second, self.local_classifier(second)),
        }


def launch(program, *arguments, processes=1, wait=True):
    """Run train or evaluate with Tiny, in this process or in several as torchrun would.

    Returns the processes if wait is False. They are forks, so patches made here hold there, too.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def work(rank):
        torch.set_num_threads(1)
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
        of_torchrun = {name: str(number) for name, number in numbers.items()} | {
            "MASTER_ADDR": "127.0.0.1"
        }
        with (
            mock.patch.object(sys, "argv", [f"{program.__name__}.py", *map(str, arguments)]),
            mock.patch.object(train, "SONANet", Tiny),
            mock.patch.object(evaluate, "SONANet", Tiny),
            mock.patch.dict(os.environ, of_torchrun if processes > 1 else {}),
        ):
            program.main()

    if processes == 1 and wait:
        return work(0)
    return mp.start_processes(work, nprocs=processes, join=wait, start_method="fork")


def python(*arguments, folder=HERE):
    """The standard error of `python ...`, and its exit status."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    return done.stderr, done.returncode


@pytest.fixture(scope="module")
def market(datasets):
    """The arguments to train on the small market1501."""
    small = [
        "--height",
        32,
        "--width",
        16,
        "--ids-per-batch",
        4,
        "--images-per-id",
        2,
        "--images-per-pass",
        4,
    ]
    return [
        "--dataset",
        "market1501",
        "--data-dir",
        datasets,
        *small,
        "--weights",
        "none",
        "--workers",
        0,
    ]


@pytest.fixture(scope="module")
def run(market, tmp_path_factory):
    """A finished run of 4 epochs, and what it printed."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        launch(train, *market, "--epochs", 4, "--eval-every", 2, "--output", output)
    return output, printed.getvalue()


@contextlib.contextmanager
def cut_off_before(epoch):
    """In this context, training saves every epoch and is interrupted before `epoch`."""

    def rate(now, *rest):
        if now == epoch:
            raise KeyboardInterrupt
        return learning_rate(now, *rest)

    with (
        mock.patch.multiple(train, learning_rate=rate, CHECKPOINT_SECONDS=0),
        pytest.raises(KeyboardInterrupt),
    ):
        yield


def records_of(output):
    """A run's log, without the speed."""
    records = map(json.loads, (output / "log.jsonl").read_text().splitlines())
    return [
        {key: value for key, value in record.items() if key != "images_per_second"}
        for record in records
    ]


def checkpoint_of(output):
    return torch.load(output / "last.pt", weights_only=True)


def assert_same_run(output, other, rtol=0.0):
    """Asserts the same log, weights and Adam moments, bit for bit unless rtol is given."""
    records, others = records_of(output), records_of(other)
    assert len(records) == len(others)
    for record, expected in zip(records, others, strict=True):
        assert record == (pytest.approx(expected, rel=rtol) if rtol else expected)
    ours, others = checkpoint_of(output), checkpoint_of(other)
    torch.testing.assert_close(ours["network"], others["network"], rtol=10 * rtol, atol=rtol)
    moments = (
        [adam["exp_avg"] for adam in run["optimizer"]["state"].values()] for run in (ours, others)
    )
    for ours, others in zip(*moments, strict=True):  # Adam's mean gradients
        torch.testing.assert_close(ours, others, rtol=10 * rtol, atol=rtol / 100)


# ---------- Training ------------------------------------------------------------------------------
def test_a_run_trains_logs_and_evaluates(run):
    output, printed = run
    records = records_of(output)
    assert [record["epoch"] for record in records] == [0, 1, 2, 3]
    assert [record["lr"] for record in records] == [learning_rate(epoch, 4) for epoch in range(4)]
    for record in records:
        parts = [
            record[f"{b}_{part}"]
            for b in ("global", "local")
            for part in ("triplet", "cross_entropy")
        ]
        assert record["loss"] == pytest.approx(sum(parts))
        assert {"global_accuracy", "local_accuracy"} < set(record)
        assert ("mean_ap" in record) == ("rank1" in record) == (record["epoch"] in (1, 3))
    assert sorted(path.name for path in output.iterdir()) == ["args.json", "last.pt", "log.jsonl"]
    state = checkpoint_of(output)
    assert [record["loss"] for record in state["history"]] == [record["loss"] for record in records]
    assert state["settings"] == json.loads((output / "args.json").read_text())
    assert "untrained    mAP" in printed
    assert f"trained      mAP{100 * records[3]['mean_ap']:7.2f}" in printed
    (group,) = state["optimizer"]["param_groups"]  # one rate and one decay for all parameters
    assert (group["lr"], group["betas"]) == (learning_rate(3, 4), (0.9, 0.999))
    assert group["weight_decay"] == 5e-4
    assert len(group["params"]) == len([*Tiny(4).parameters()])


@forks
def test_one_process_two_and_four_are_the_same_run(market, tmp_path):
    command = [*market, "--epochs", 2, "--eval-every", 1, "--images-per-pass", 2]
    for name, processes, *flags in (
        ("one", 1),
        ("recomputed", 1, "--recompute"),
        ("two", 2),
        ("four", 4),
        ("bfe", 1, "--drop", "bfe", "--margin", 5),
        ("bfe-two", 2, "--drop", "bfe", "--margin", 5),
        ("larger", 1, "--images-per-pass", 4),
    ):
        launch(train, *command, *flags, "--output", tmp_path / name, processes=processes)
    assert_same_run(tmp_path / "recomputed", tmp_path / "one")
    for name, first in (("two", "one"), ("four", "one"), ("bfe-two", "bfe")):
        assert_same_run(tmp_path / name, tmp_path / first, rtol=1e-4)
    assert (
        records_of(tmp_path / "bfe")[0]["global_triplet"] > 3
    )  # of the margin 5; about ln 2 of the soft one
    larger, one = (records_of(tmp_path / name)[0]["loss"] for name in ("larger", "one"))
    assert abs(larger - one) > 1e-3


@forks
def test_processes_evaluate_alike_and_leave_no_tensors(market, tmp_path, monkeypatch):
    tensors = []

    def evaluated(network, *arguments, evaluate=train.evaluate):
        gc.collect()
        tensors.append(sum(type(thing) is torch.Tensor for thing in gc.get_objects()))
        assert len(tensors) < 4 or tensors[2] == tensors[3]  # untrained, and after each epoch
        ranking = evaluate(network, *arguments)
        aps = torch.from_numpy(ranking.average_precisions)
        torch.save([*network.buffers(), aps], tmp_path / f"{dist.get_rank()}.pt")
        return ranking

    monkeypatch.setattr(train, "evaluate", evaluated)
    launch(
        train, *market, "--epochs", 3, "--eval-every", 1, "--output", tmp_path / "run", processes=2
    )
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(map(torch.equal, first, second))
    assert first[0].abs().min() > 0  # running means that were updated
    assert len(first[-1]) == 6


@forks
def test_a_compiled_run_of_two_processes_is_the_same_run(monkeypatch, market, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of processes in a fork
    monkeypatch.setattr(
        torch, "compile", partial(torch.compile, backend="aot_eager")
    )  # needs no compiler
    for name, flags in {"plain": [], "compiled": ["--compile", "--recompute"]}.items():
        flags += [
            "--images-per-pass",
            2,
            "--epochs",
            1,
            "--eval-every",
            0,
            "--output",
            tmp_path / name,
        ]
        launch(train, *market, *flags, processes=2)
    plain, compiled = (records_of(tmp_path / name)[0]["loss"] for name in ("plain", "compiled"))
    assert compiled == pytest.approx(plain, rel=1e-4)


def test_a_loss_that_is_not_finite_ends_the_run(market, tmp_path, monkeypatch):
    def poisoned(*arguments):
        loss, parts = branch_losses(*arguments)
        return loss, parts | {"loss": parts["loss"] * math.nan}

    monkeypatch.setattr(train, "branch_losses", poisoned)
    with pytest.raises(FloatingPointError, match="the loss of epoch 0 is nan; lower --lr"):
        launch(train, *market, "--epochs", 2, "--output", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_weights_that_are_not_finite_are_never_saved(market, tmp_path):
    with pytest.raises(FloatingPointError, match="epoch 0 left weights of nan or inf; lower --lr"):
        launch(train, *market, "--lr", 1e39, "--epochs", 2, "--output", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", sorted({*mp.get_all_start_methods()} - {"fork"}))
def test_workers_of_another_start_method(market, tmp_path, monkeypatch, method):
    monkeypatch.setattr(
        train, "evaluate", lambda *_: evaluate.Ranking(np.ones(10), 1.0, np.ones(1))
    )
    mp.set_start_method(method, force=True)
    try:
        launch(
            train, *market, "--workers", 2, "--epochs", 1, "--eval-every", 0, "--output", tmp_path
        )
    finally:
        mp.set_start_method(None, force=True)
    assert len(records_of(tmp_path)) == 1


# ---------- Interrupting and resuming -------------------------------------------------------------
@forks
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_is_killed_and_resumed_is_the_same_run(market, tmp_path, monkeypatch, processes):
    """SIGKILL at a random moment of an epoch, its end or its checkpoint, with workers or not."""
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", 0)
    command = [*market, "--epochs", 60, "--eval-every", 25]
    whole, output = tmp_path / "whole", tmp_path / "killed"
    launch(train, *command, "--output", whole, processes=processes)
    rng = random.Random(processes)
    log = output / "log.jsonl"
    for epochs in (0, 5, 15, 30):
        flags = ["--workers", int(epochs == 15), "--output", output, "--resume"]
        running = launch(train, *command, *flags, processes=processes, wait=False).processes
        while (
            running[0].is_alive()
            and epochs
            and not (log.exists() and len(log.read_text().splitlines()) >= epochs)
        ):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.1))
        for end in ("kill", "join"):
            for process in running:
                getattr(process, end)()
    launch(train, "--output", output, "--resume", processes=processes)
    assert [record["epoch"] for record in records_of(output)] == [*range(60)]
    assert_same_run(output, whole)


@forks
def test_a_resumed_run_takes_its_settings_from_the_checkpoint(market, tmp_path):
    command = [*market, "--epochs", 4, "--eval-every", 0, "--margin", 0.3, "--output"]
    launch(
        train, *command, tmp_path / "whole", "--resume"
    )  # there is none to resume: it starts one
    for name in ("same", "typed", "two"):
        with cut_off_before(2):
            launch(train, *command, tmp_path / name)
    launch(train, "--output", tmp_path / "same", "--resume")
    assert_same_run(tmp_path / "same", tmp_path / "whole")
    launch(train, "--output", tmp_path / "typed", "--resume", "--lr", 0.5, "--epochs", 5)
    rates = [record["lr"] for record in records_of(tmp_path / "typed")]
    assert rates[2:] == [learning_rate(epoch, 5, 0.5) for epoch in (2, 3, 4)]
    first, typed = (
        checkpoint_of(tmp_path / name)["settings"].items() for name in ("whole", "typed")
    )
    assert {key for key, _ in first ^ typed} == {"output", "lr", "epochs"}
    launch(
        train, "--output", tmp_path / "two", "--resume", processes=2
    )  # on other machines it is resumed as well
    assert_same_run(tmp_path / "two", tmp_path / "whole", rtol=1e-4)


def test_a_run_is_resumed_with_another_seed(market, tmp_path, monkeypatch):
    rng_keys = []
    batches = []
    forward = Passes.forward
    monkeypatch.setattr(Passes, "forward", lambda *a: rng_keys.append(a[2]) or forward(*a))
    monkeypatch.setattr(
        train, "branch_losses", lambda *a: batches.append(a[1].tolist()) or branch_losses(*a)
    )
    with cut_off_before(1):
        launch(
            train,
            *market,
            "--ids-per-batch",
            2,
            "--epochs",
            4,
            "--eval-every",
            0,
            "--output",
            tmp_path,
        )
    with cut_off_before(2):
        launch(train, "--output", tmp_path, "--resume", "--seed", 7)
    launch(train, "--output", tmp_path, "--resume")
    assert rng_keys == [(7 * (epoch > 0), epoch, step) for epoch in range(4) for step in (0, 1)]
    labels = load_dataset("market1501", market[3])["train"].labels
    for (seed, epoch, step), batch in zip(rng_keys, batches, strict=True):
        sampler = IdentitySampler(labels, 2, 2, seed)
        sampler.set_epoch(epoch)
        assert batch == labels[list(sampler)[step]].tolist()


def test_a_folder_that_holds_a_run_is_refused(market, run, tmp_path, capsys):
    output = shutil.copytree(run[0], tmp_path / "run")
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    with pytest.raises(SystemExit, match="2"):
        launch(train, *market, "--output", output)
    assert f"error: {output} holds a run; --resume resumes it" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before


def test_a_finished_run_is_left_as_it_is(run, tmp_path, capsys):
    output = shutil.copytree(run[0], tmp_path / "run")
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    launch(train, "--output", output, "--resume", "--lr", 5)
    printed = capsys.readouterr().out
    assert printed.startswith(f"{output} is finished\n")
    assert f"trained      mAP{100 * records_of(output)[-1]['mean_ap']:7.2f}" in printed
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before


def test_resuming_says_what_it_resumes(market, tmp_path, capsys):
    command = [*market, "--epochs", 3, "--eval-every", 0, "--resume", "--output", tmp_path / "run"]
    with cut_off_before(1):
        launch(train, *command)
    launch(train, *command)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"no run in {tmp_path / 'run'} yet: starting one"
    assert f"resuming {tmp_path / 'run'} at epoch 1 of 3" in lines


def test_the_first_epoch_after_each_start_is_saved(market, tmp_path):
    command = [*market, "--epochs", 4, "--eval-every", 0, "--resume", "--output", tmp_path]
    for epoch in (1, 2, 3):
        with cut_off_before(epoch), mock.patch.object(train, "CHECKPOINT_SECONDS", 300):
            launch(train, *command)
        assert len(checkpoint_of(tmp_path)["history"]) == epoch


def test_a_run_is_saved_before_its_last_evaluation(market, run, tmp_path, monkeypatch):
    output = tmp_path / "run"
    command = [*market, "--epochs", 4, "--eval-every", 2, "--output", output]

    def unreadable(*arguments):
        if len(records_of(output) if output.exists() else ()) == 4:
            raise DataError("an image")
        return evaluate.evaluate(*arguments)

    with monkeypatch.context() as patch, pytest.raises(DataError, match="an image"):
        patch.setattr(train, "evaluate", unreadable)
        launch(train, *command)
    assert len(checkpoint_of(output)["history"]) == 4
    launch(train, "--output", output, "--resume")
    assert_same_run(output, run[0])


@pytest.mark.parametrize("change", ["another identity", "one identity less", "another set"])
def test_a_checkpoint_knows_its_identities(market, run, tmp_path, change):
    output = shutil.copytree(run[0], tmp_path / "run")
    shutil.copytree(market[3], tmp_path / "datasets")
    for path in (tmp_path / "datasets/market1501/bounding_box_train").glob("0002*"):
        if change == "another identity":
            path.rename(path.with_name(f"0009{path.name[4:]}"))
        else:
            path.unlink()
    flags = ["--data-dir", tmp_path / "datasets", "--epochs", 9]
    if change == "another set":
        flags += ["--dataset", "toy"]
    folder = "toy" if change == "another set" else "market1501"
    message = f"the run has other identities than '.*/{folder}/bounding_box_train', for example"
    with pytest.raises(DataError, match=message):
        launch(train, "--output", output, "--resume", *flags)


@forks
@pytest.mark.parametrize("change", ["an image less", "another identity", "another epoch"])
def test_processes_compare_what_they_read(market, run, tmp_path, monkeypatch, capfd, change):
    for rank in (0, 1):
        shutil.copytree(market[3] / "market1501", tmp_path / f"{rank}/market1501")
        shutil.copytree(run[0], tmp_path / f"{rank}/run")
    if change == "an image less":
        (tmp_path / "1/market1501/query/0050_c1s1_000000_00.jpg").unlink()
    if change == "another identity":
        for path in (tmp_path / "1/market1501/bounding_box_test").glob("0051*"):
            path.rename(path.with_name(f"0061{path.name[4:]}"))
    if change == "another epoch":
        state = checkpoint_of(run[0])
        train.save(state | {"history": state["history"][:3]}, tmp_path / "1/run/last.pt")

    def load(name, data_dir):
        return load_dataset(name, tmp_path / os.environ["RANK"])

    def load_checkpoint(path, *keys):
        return data.load_tensors(tmp_path / os.environ["RANK"] / "run/last.pt", *keys)

    monkeypatch.setattr(train, "load_dataset", load)
    monkeypatch.setattr(train, "load_tensors", load_checkpoint)
    with pytest.raises(mp.ProcessRaisedException, match="processes found different files"):
        launch(train, "--output", run[0], "--resume", "--epochs", 9, processes=2)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_run_in_half_precision(market, run, tmp_path, precision):
    command = [*market, "--precision", precision, "--epochs", 4, "--eval-every", 0, "--output"]
    launch(train, *command, tmp_path / "whole")
    full, half = (
        [record["loss"] for record in records_of(output)] for output in (run[0], tmp_path / "whole")
    )
    assert full == pytest.approx(half, rel=0.05)
    assert full != half
    with cut_off_before(2):
        launch(train, *command, tmp_path / "cut")
    launch(train, "--output", tmp_path / "cut", "--resume")
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    scaler = checkpoint_of(tmp_path / "cut")["scaler"]
    assert scaler == checkpoint_of(tmp_path / "whole")["scaler"]
    assert ("scale" in scaler) == (precision == "fp16")
    assert (
        precision == "bf16" or scaler["scale"] < 2**16 or scaler["_growth_tracker"] == 4
    )  # steps, in both parts


def test_a_file_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    def half(state, path):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    train.save({"epoch": 1}, tmp_path / "last.pt")
    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        train.save({"epoch": 2}, tmp_path / "last.pt")
    assert checkpoint_of(tmp_path) == {"epoch": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]  # and no scratch file


@forks
def test_two_writers_never_leave_a_damaged_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 1)  # as in two containers
    train.save({"rank": -1, "x": torch.zeros(50_000)}, tmp_path / "last.pt")

    def write(rank):
        for _ in range(150):
            train.save({"rank": rank, "x": torch.full((50_000,), rank)}, tmp_path / "last.pt")

    writers = mp.start_processes(write, nprocs=2, join=False, start_method="fork")
    ranks = set()
    while any(process.is_alive() for process in writers.processes) or not ranks:
        state = checkpoint_of(tmp_path)
        assert (state["x"] == max(state["rank"], 0)).all()
        ranks.add(state["rank"])
    writers.join()
    assert ranks & {0, 1}
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


# ---------- Errors in one line --------------------------------------------------------------------
def move(folder):
    """Images into folders by identity."""
    for path in list(folder.iterdir()):
        path.rename(touch(folder / path.name[:4]) / path.name)


def remove(market, pattern):
    for path in market.glob(pattern):
        path.unlink()


IMAGE = "bounding_box_train/0001_c1s1_000000_00.jpg"
ERRORS = {  # what is done to the folder of market1501, flags, the line
    "missing": (
        shutil.rmtree,
        [],
        "market1501: found no folder named like 'market 1501' with bounding_box_train, ",
    ),
    "empty": (lambda m: remove(m, "query/*"), [], r"/query' holds no images \(.jpg, .*\)$"),
    "nested": (
        lambda m: move(m / "query"),
        [],
        "/query' holds no images .*; move them up out of subfolders",
    ),
    "name": (
        lambda m: touch(m / "query", "me.jpg"),
        [],
        "/query/me.jpg': the name must be <identity>_c<camera>_",
    ),
    "no match": (
        lambda m: remove(m, "[bq][ou]*/005*_c2*"),
        [],
        "market1501': no query has a match from another cam",
    ),
    "few": (lambda m: None, ["--ids-per-batch", 8], "4 identities, but a batch needs 8"),
    "unreadable": (
        lambda m: (m / IMAGE).write_text(""),
        [],
        f"cannot read the image .*{IMAGE}': .*; replace or remove",
    ),
    "in a worker": (
        lambda m: (m / IMAGE).write_text(""),
        ["--workers", 1],
        f"cannot read the image .*{IMAGE}': .*; re",
    ),
}


def error_of(program, *arguments):
    """The one line with which train.py or evaluate.py ends."""
    with (
        mock.patch.object(sys, "argv", [program, *map(str, arguments)]),
        mock.patch.object(model, "SONANet", Tiny),
        mock.patch.object(evaluate, "SONANet", Tiny),
        pytest.raises(SystemExit) as exit,
    ):
        runpy.run_path(str(HERE / program), run_name="__main__")
    assert isinstance(exit.value.code, str) and "\n" not in exit.value.code
    return exit.value.code


@pytest.mark.parametrize("damage", ERRORS)
def test_data_that_cannot_be_used_ends_training(market, tmp_path, damage):
    shutil.copytree(market[3] / "market1501", tmp_path / "market1501")
    do, flags, message = ERRORS[damage]
    do(tmp_path / "market1501")
    every = [
        "--images-per-id",
        4,
        "--eval-every",
        0,
        "--epochs",
        1,
    ]  # so that each image is in the batch
    line = error_of(
        "train.py", *market, "--data-dir", tmp_path, *every, *flags, "--output", tmp_path / "run"
    )
    assert re.match(f"error: .*{message}", line), line
    assert not (tmp_path / "run/last.pt").exists()


def test_data_that_cannot_be_used_ends_evaluation(market, run, tmp_path):
    shutil.copytree(market[3] / "market1501", tmp_path / "market1501")
    (tmp_path / "market1501/query/0050_c1s1_000000_00.jpg").write_text("not an image")
    of_image = "error: cannot read the image .*0050_c1s1_000000_00.jpg': "
    assert re.match(
        of_image, error_of("evaluate.py", run[0], "--data-dir", tmp_path, "--workers", 1)
    )
    assert re.match(
        "error: dukemtmc: found no folder", error_of("evaluate.py", run[0], "--dataset", "dukemtmc")
    )
    told, status = python(__file__, "evaluate.py", run[0], "--data-dir", tmp_path, "--workers", 1)
    assert re.fullmatch(f"{of_image}.*\n", told), told
    assert status == 1


@pytest.mark.parametrize("content", ["cut off", "empty", "text", "a tensor", "no run"])
def test_a_damaged_checkpoint_is_named(run, tmp_path, content):
    file = tmp_path / "last.pt"
    if content == "cut off":
        file.write_bytes((run[0] / "last.pt").read_bytes()[:1000])
    elif content == "a tensor":
        torch.save(torch.zeros(3), file)
    elif content == "no run":
        torch.save({"conv1.weight": torch.zeros(3)}, file)
    else:
        file.write_text(content.replace("empty", ""))
    message = f"error: '{file}' (is damaged or not a file of weights|has no network, .*)"
    assert re.fullmatch(message, error_of("evaluate.py", tmp_path))
    assert re.fullmatch(message, error_of("train.py", "--output", tmp_path, "--resume"))


def test_a_program_runs_in_a_notebook(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # which has no reconfigure, either
    data.run_program(lambda: print("runs"))
    assert sys.stdout.getvalue() == "runs\n"


def test_missing_files_are_named(market, tmp_path):
    missing = "No such file or directory: "
    line = error_of("evaluate.py", tmp_path / "nothere")
    assert line.endswith(missing + repr(str(tmp_path / "nothere/last.pt")))
    line = error_of("train.py", *market, "--output", tmp_path, "--weights", "nothere.pth")
    assert line.endswith(missing + "'nothere.pth'")


def test_several_processes_need_a_rank(monkeypatch, market, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = error_of("train.py", *market, "--output", tmp_path)
    assert line == "error: WORLD_SIZE is set but RANK is not: start several processes with torchrun"


FLAGS = {  # what is typed, and what is said of it
    "train.py": [
        (["--output", ""], "--output is empty"),
        (["--epochs", "0"], "argument --epochs: 0 is less than 1"),
        (["--ids-per-batch", "0"], "argument --ids-per-batch: 0 is less than 1"),
        (["--images-per-id", "1"], "argument --images-per-id: 1 is less than 2"),
        (["--images-per-pass", "1"], "argument --images-per-pass: 1 is less than 2"),
        (["--seed", "-1"], "argument --seed: -1 is less than 0"),
        (["--eval-every", "-1"], "argument --eval-every: -1 is less than 0"),
    ],
    "evaluate.py": [
        (["run", "--ranking", "nodir/x.png"], "argument --ranking: 'nodir/x.png' is not a .png"),
        (["run", "--attention", "out"], "argument --attention: 'out' is not a .png"),
        (["run", "--curves", "out.txt"], "argument --curves: 'out.txt' is not a .png"),
        (["run", "--query", "a.png"], "--query and --gallery go together"),
        (["run", "--gallery", "."], "--query and --gallery go together"),
    ],
}


@pytest.mark.parametrize(
    ("program", "flags", "message"),
    [(program, *case) for program, cases in FLAGS.items() for case in cases],
)
def test_flags_are_checked_before_anything_is_read(program, flags, message, capsys):
    with mock.patch.object(sys, "argv", [program, *flags]), pytest.raises(SystemExit):
        {"train.py": train, "evaluate.py": evaluate}[program].parse_args()
    assert f"{program}: error: {message}" in capsys.readouterr().err


# ---------- Evaluation ----------------------------------------------------------------------------
def test_evaluate_prints_the_runs_own_metrics(run, tmp_path, capsys):
    launch(evaluate, run[0], "--workers", 0)
    whole = capsys.readouterr().out
    assert run[1].split("\ntrained    ")[-1].splitlines()[0].strip() in whole.splitlines()[-1]
    state = checkpoint_of(run[0])
    train.save(
        state | {"history": state["history"][:3]}, tmp_path / "last.pt"
    )  # of a run that goes on
    launch(evaluate, tmp_path, "--workers", 0)
    note = f"note: {tmp_path} has trained for 3 of 4 epochs\n"
    assert capsys.readouterr().out.splitlines()[:-1] == (note + whole).splitlines()[:-1]


def test_several_runs_have_a_mean_and_a_standard_deviation(market, run, tmp_path, capsys):
    launch(
        train,
        *market,
        "--epochs",
        4,
        "--eval-every",
        0,
        "--seed",
        1,
        "--sona",
        "none",
        "--output",
        tmp_path,
    )
    capsys.readouterr()
    launch(evaluate, run[0], tmp_path, "--workers", 0)
    lines = capsys.readouterr().out.splitlines()[-4:]
    first, second, mean, deviation = ([float(x) for x in line.split()[-7::2]] for line in lines)
    assert first != second
    np.testing.assert_allclose(mean, np.mean([first, second], 0), atol=0.011)
    np.testing.assert_allclose(
        deviation, np.abs(np.subtract(first, second)) / 2, atol=0.011
    )  # population, of two
    with pytest.raises(DataError, match="no SONA module"):
        launch(evaluate, tmp_path, "--attention", tmp_path / "attention.png")


def size_of(picture):
    """Columns and rows of tiles."""
    width, height = Image.open(picture).size
    return (width - 4) / (evaluate.TILE[0] + 14), (height - 32) / (evaluate.TILE[1] + 52)


def test_a_data_set_is_ranked_and_drawn(run, datasets, tmp_path, capsys):
    pictures = [tmp_path / "ranking.png", tmp_path / "attention.png"]
    launch(evaluate, run[0], "--workers", 0, "--ranking", pictures[0])
    launch(evaluate, run[0], "--attention", pictures[1])
    assert [size_of(picture) for picture in pictures] == [(6, 6), (6, 6)]
    capsys.readouterr()
    launch(evaluate, run[0], "--workers", 0, "--dataset", "toy", "--data-dir", datasets)
    assert re.match("toy .*\n  train +768 +64 +4\n", capsys.readouterr().out)


@pytest.fixture
def album(tmp_path):
    """Five photos, one in a folder that is linked; what is hidden, or no photo."""
    photo = data.draw_pedestrian(1, 1, 0)
    for person in range(3):
        folder = touch(tmp_path / f"album/{person}", "notes.txt", "._a b.jpg")
        data.draw_pedestrian(person, 1, 0).save(folder / "a b.jpg")
    photo.save(tmp_path / "album/1/c.webp", lossless=True)
    photo.save(touch(tmp_path / "elsewhere") / "d.tif")
    (tmp_path / "album/linked").symlink_to(tmp_path / "elsewhere")
    for hidden in (".thumbnails", "@eaDir"):
        photo.save(touch(tmp_path / "album/0" / hidden) / "thumbnail.jpg")
    os.mkfifo(tmp_path / "album/pipe.jpg")
    return tmp_path / "album"


def test_your_own_photos_are_ranked(run, album, tmp_path, capsys):
    query = album / "1/a b.jpg"
    flags = ["--query", query, "--gallery", album, "--workers", 0]
    launch(evaluate, run[0], *flags, "--ranking", tmp_path / "ranking.png")
    head, asked, *found, wrote = capsys.readouterr().out.splitlines()
    assert head == "searching 5 images for 1"
    assert [asked, *found[0].split(maxsplit=1)] == [str(query), "0.000", str(query)]
    distances = [float(line.split()[0]) for line in found]
    assert distances == sorted(distances)
    assert len(distances) == 5
    assert wrote == f"wrote {tmp_path / 'ranking.png'}"
    assert size_of(tmp_path / "ranking.png") == (6, 1)


def test_queries_keep_their_order_whatever_their_endings(album, tmp_path):
    data.draw_pedestrian(1, 1, 0).save(tmp_path / "photo", format="PNG")
    names = [str(tmp_path / "photo"), str(album / "2"), str(album / "0/a b.jpg")]
    assert evaluate.find_images(names) == [names[0], str(album / "2/a b.jpg"), names[2]]
    with pytest.raises(DataError, match="'.*empty' holds no images"):
        evaluate.find_images([str(touch(tmp_path / "empty"))])


def test_attention_of_your_own_photos_is_drawn(run, album, tmp_path):
    query = album / "1/a b.jpg"
    flags = ["--attention", tmp_path / "attention.png", "--query", query, query]
    launch(evaluate, run[0], *flags)
    assert size_of(tmp_path / "attention.png") == (6, 2)


# ---------- README, and copying -------------------------------------------------------------------
def msmt17(root):
    """A stand-in for MSMT17_V1: four images of each of four people to train on, of three others."""
    for part, people, lists in (("train", 4, ("train", "val")), ("test", 3, ("query", "gallery"))):
        lines = []
        for person, frame, camera in product(range(people), (0, 1), (1, 2)):
            name = f"{person:04d}_{len(lines) % 4:03d}_{camera:02d}_0303morning_000{frame}_0.jpg"
            data.draw_pedestrian(person, camera, frame).save(
                touch(root / part / f"{person:04d}") / name
            )
            lines.append(f"{person:04d}/{name} {person}\n")
        for i, name in enumerate(lists):  # one camera in one list, the other in the other
            (root / f"list_{name}.txt").write_text("".join(lines[i::2]))


def test_the_readmes_python_runs(run, datasets, tmp_path, monkeypatch):
    """Runs each block where its runs and data are; a block for one of our files gets its names."""
    for name in ("cuhk03", "toy"):
        shutil.copytree(run[0], tmp_path / "runs" / name)
    shutil.copytree(datasets, tmp_path / "datasets")
    data.draw_pedestrian(1, 1, 1).save(tmp_path / "a.jpg")
    msmt17(tmp_path / "MSMT17_V1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "SONANet", Tiny)
    within = {**vars(data), **vars(losses), **vars(model), "__name__": "__main__"}
    within |= {
        "losses": {},
        "branch": "global",
        "embedding": torch.ones(2, 4),
        "labels": torch.zeros(2),
    }
    texts = [(HERE / name).read_text() for name in ("README.md", ".github/CHOICES.md")]
    blocks = re.findall(r"^```python\n(.*?)^```$", "\n".join(texts), re.DOTALL | re.MULTILINE)
    known = {*DATASETS}
    with mock.patch.dict(PLACEMENTS), mock.patch.dict(DROPS), mock.patch.dict(DATASETS):
        for block in blocks:
            exec(compile(block, "README.md", "exec"), dict(within))
        for name in PLACEMENTS.keys() - set(SONAS):
            assert SONANet(4, name).eval()(torch.rand(1, 3, 32, 16)).shape == (1, 1536)
        for name in DATASETS.keys() - known:
            assert len(load_dataset(name, tmp_path)["train"].paths) == 16
    for program in tmp_path.glob("*.pt2"):
        embedding = torch.export.load(program).module()(images := torch.rand(3, 3, 32, 16))
        torch.testing.assert_close(embedding, evaluate.load_run("runs/cuhk03")[0](images))


def test_files_work_when_copied_alone(tmp_path):
    ranking = "evaluate_ranking(np.eye(2), np.eye(2), [1, 2], [1, 2], [1, 1], [2, 2])"
    code = "import sys\nimport numpy as np\nfrom typing import NamedTuple\n"
    code += "".join(map(inspect.getsource, (evaluate.Ranking, evaluate_ranking)))
    code += f"assert {ranking}.mean_ap == 1 and 'torch' not in sys.modules\nimport torch\n"
    for file, use in (
        ("model", "SONANet(5).eval()(torch.rand(1, 3, 64, 32)).shape == (1, 1536)"),
        ("losses", "batch_hard_triplet_loss(torch.eye(4), torch.tensor([0, 0, 1, 1])) > 0"),
        ("data", "len(list(IdentitySampler(torch.arange(99)))) == 3"),
    ):
        shutil.copy(HERE / f"{file}.py", touch(tmp_path / file))
        code += f"sys.path[0] = {file!r}\nfrom {file} import *\nassert {use}\n"
    assert python("-c", code, folder=tmp_path) == ("", 0)


if (
    __name__ == "__main__"
):  # python test_model.py train.py ...: the program with Tiny in SONANet's place
    model.SONANet = evaluate.SONANet = Tiny
    sys.argv = sys.argv[1:]
    runpy.run_path(str(HERE / sys.argv[0]), run_name="__main__")
