# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors of SONA-Net in plain PyTorch
"""The paper's equations and this repository's promises, as tests: `pytest test_model.py`.

In the order of the files: the network, the losses, the data, the schedule, the ranking, the programs.
"""

import contextlib
import inspect
import io
import json
import math
import os
import random
import re
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torchvision.models import ResNet50_Weights, resnet18, resnet50

import data
import evaluate
import model
import train
from data import DATASETS, DataError, IdentitySampler, ImageDataset, augment, cutout, load_dataset, normalize
from evaluate import evaluate_ranking, extract_features
from losses import batch_hard_triplet_loss, branch_losses
from model import DROPS, PLACEMENTS, SONA, BatchDropBlock, DropBlockPlus, SONANet, WeightsError
from train import Passes, collapsed, learning_rate, load_checkpoint

HERE = Path(__file__).parent
torch.set_num_threads(1)  # sums of other numbers of threads round otherwise


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    np.random.seed(0)


# ---------------------------------------------------------------------------------------------------
# SONA (Sec. 2.2)


def trained_sona(channels=16):
    """A SONA block with no parameter left at its initial value."""
    sona = SONA(channels)
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


def test_sona_computes_equations_1_to_3():
    sona, x = trained_sona(), 3 * torch.randn(2, 16, 6, 4, dtype=torch.float64)
    torch.testing.assert_close(sona(x), sona_by_the_paper(sona, x))
    assert (sona(x) - x).abs().max() > 0.1


def test_sona_has_the_gradients_of_equations_1_to_3():
    sona, x = trained_sona(), 3 * torch.randn(2, 16, 6, 4, dtype=torch.float64)
    inputs = [x.requires_grad_(), *sona.parameters()]
    weights = torch.randn_like(x)
    ours = torch.autograd.grad((sona(x) * weights).sum(), inputs)
    papers = torch.autograd.grad((sona_by_the_paper(sona, x) * weights).sum(), inputs)
    for our, paper in zip(ours, papers, strict=True):
        torch.testing.assert_close(our, paper)


def test_attention_is_the_softmax_of_equation_2():
    sona, x = trained_sona(), 3 * torch.randn(2, 16, 6, 4, dtype=torch.float64)
    attention = sona.attention(x)
    assert attention.shape == (2, 24, 24)
    torch.testing.assert_close(attention.sum(2), torch.ones(2, 24, dtype=torch.float64))
    torch.testing.assert_close(attention, attention_by_the_paper(sona, x))


def test_sona_is_the_same_in_either_memory_format():
    sona, x = trained_sona(), torch.randn(2, 16, 6, 4, dtype=torch.float64)
    torch.testing.assert_close(sona(x.contiguous(memory_format=torch.channels_last)), sona(x))


def test_sona_has_the_papers_layers_and_starts_as_the_identity():
    sona, x = SONA(32, reduction=4), torch.randn(2, 32, 6, 4)
    convolution, norm, activation = sona.theta
    assert convolution.weight.shape == sona.g.weight.shape == (8, 32, 1, 1)
    assert sona.p.weight.shape == (32, 8, 1, 1)
    assert isinstance(norm, nn.BatchNorm2d)
    assert isinstance(activation, nn.LeakyReLU)
    assert torch.equal(sona(x), x)


def test_sona_never_holds_the_attention_matrix():
    """Forward and backward on 144 x 48 positions, where the matrix alone takes 190 MB."""
    code = """
import torch
from model import SONA
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
sona, x = SONA(512), torch.randn(1, 512, 144, 48, requires_grad=True)
before = peak()
sona(x).sum().backward()
print(peak() - before)
"""
    extra = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=True).stdout
    assert int(extra) < 180 * 1024  # KiB


# ---------------------------------------------------------------------------------------------------
# Drop layers (Sec. 2.1, 3.4)


def test_dropblock_plus_drops_blocks_of_its_size_and_rescales_the_rest():
    layer, x = DropBlockPlus(), torch.ones(2000, 3, 48, 16)
    y = layer(x)
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
    covering = F.avg_pool2d(F.pad(covering, (7, 7, 4, 4)), (5, 8), stride=1, divisor_override=1)[0, 0]
    dropped_share = 1 - (1 - seed_rate) ** covering
    assert abs((~kept).float().mean() - dropped_share.mean()) < 0.005
    assert 0.08 < dropped_share.mean() < 0.1


def test_dropblock_plus_cuts_its_block_to_a_smaller_map():
    y = DropBlockPlus(drop_rate=0.5)(torch.ones(200, 1, 8, 4))
    assert y.isfinite().all()
    assert (y == 0).any() and (y > 0).any()
    assert ((y == 0).all(3) == (y == 0).any(3)).all()  # whole rows of 4, as 8 do not fit


def test_batch_drop_block_drops_one_rectangle_of_the_whole_batch():
    starts = set()
    for _ in range(50):
        y = BatchDropBlock(height_ratio=1 / 3, width_ratio=0.5)(torch.ones(3, 2, 48, 16))
        assert torch.equal(y, y[:1, :1].expand_as(y))
        rows, columns = (y[0, 0] == 0).any(1).nonzero().flatten(), (y[0, 0] == 0).any(0).nonzero().flatten()
        assert len(rows) == rows[-1] - rows[0] + 1 == 16
        assert len(columns) == columns[-1] - columns[0] + 1 == 8
        assert (y == 0).sum() == 3 * 2 * 16 * 8
        assert y.max() == 1
        starts.add((int(rows[0]), int(columns[0])))
    assert len(starts) > 25


@pytest.mark.parametrize("layer", [DropBlockPlus(), BatchDropBlock(1 / 3, 1)])
def test_drop_layers_are_the_identity_in_eval_mode(layer):
    x = torch.randn(2, 3, 48, 16)
    assert torch.equal(layer.eval()(x), x)


# ---------------------------------------------------------------------------------------------------
# The network (Sec. 2.1, 3.3, 3.4)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def shapes_of(network, modules, images):
    """The output shapes of modules in a forward pass of the network."""
    shapes = {}
    for module in modules:
        module.register_forward_hook(lambda module, _, output: shapes.update({module: tuple(output.shape)}))
    with torch.no_grad():
        network(images)
    return [shapes.get(module) for module in modules]


def test_stages_3_and_4_keep_the_map_of_stage_2():
    network = SONANet(10).eval()
    stages = [network.stage1, network.stage2, network.sona2, network.stage3, network.stage4, network.local_branch[1]]
    assert shapes_of(network, stages, torch.randn(1, 3, 384, 128)) == [
        (1, 256, 96, 32),
        (1, 512, 48, 16),
        (1, 512, 48, 16),
        (1, 1024, 48, 16),
        (1, 2048, 48, 16),
        (1, 2048, 48, 16),
    ]


SONAS = ["none", "2", "3", "2+3", "4-global", "4-local", "4-both"]


@pytest.mark.parametrize("sona", SONAS)
def test_every_placement_of_sona_has_its_shapes_and_parameters(sona):
    network = SONANet(10, sona)
    outputs = network(torch.randn(2, 3, 64, 32))
    assert {branch: [tensor.shape for tensor in pair] for branch, pair in outputs.items()} == {
        "global": [(2, 512), (2, 10)],
        "local": [(2, 1024), (2, 10)],
    }
    assert all((embedding >= 0).all() for embedding, _ in outputs.values())  # reduced by conv, BN and ReLU
    assert network.eval()(torch.randn(1, 3, 64, 32)).shape == (1, 1536)

    def sona_parameters(c):  # theta: conv without bias, BN; g and p: conv with bias
        return c * c // 2 + c + c * c // 2 + c // 2 + c * c // 2 + c

    channels = {"none": [], "2": [512], "3": [1024], "2+3": [512, 1024]}.get(sona, [2048] * (1 + (sona == "4-both")))
    bottleneck = 2 * 2048 * 512 + 9 * 512 * 512 + 2 * (512 + 512 + 2048)
    reductions = 2048 * 512 + 2 * 512 + 2048 * 1024 + 2 * 1024
    classifiers = 10 * (512 + 1) + 10 * (1024 + 1)
    resnet50_without_fc = 23_508_032
    assert count(network) == resnet50_without_fc + bottleneck + reductions + classifiers + sum(
        map(sona_parameters, channels)
    )


def test_sona_stands_where_its_name_says():
    images = torch.randn(2, 3, 64, 32)
    stage = {"2": "stage2", "3": "stage3"}
    for sona in SONAS:
        network = SONANet(10, sona).eval()
        before = network(images)
        shapes = shapes_of(network, [network.stage2, network.sona2, network.stage3, network.sona3], images)
        assert shapes == [(2, 512, 8, 4), (2, 512, 8, 4), (2, 1024, 8, 4), (2, 1024, 8, 4)]
        for module in network.modules():
            if isinstance(module, SONA):
                nn.init.normal_(module.p.weight)
        changed = (network(images) != before).any(0)
        in_trunk = sona in ("2", "3", "2+3")
        assert changed[:512].any() == (in_trunk or sona in ("4-global", "4-both")), sona
        assert changed[512:].any() == (in_trunk or sona in ("4-local", "4-both")), sona
        for name in ("2", "3"):
            assert isinstance(getattr(network, f"sona{name}"), SONA) == (stage[name] in PLACEMENTS[sona])


def test_the_global_branch_averages_and_the_local_branch_takes_the_maximum():
    network = SONANet(10, "none").eval()
    x = torch.rand(2, 2048, 8, 4)
    for branch, features, pooled in (
        (network.global_branch, x, x.mean((2, 3), keepdim=True)),
        (network.local_branch, x, network.local_branch[1](x).amax((2, 3), keepdim=True)),
    ):
        torch.testing.assert_close(branch(features), branch[-1](pooled))


def test_drop_layers_act_on_the_local_branch_in_training_only():
    expected = {
        "none": nn.Identity,
        "dropblock": DropBlockPlus,
        "dropblock+": DropBlockPlus,
        "bfe": BatchDropBlock,
    }
    for drop in DROPS:
        network = SONANet(10, "none", drop)
        layer = network.local_branch[2]
        assert type(layer) is expected[drop]
        if drop.startswith("dropblock"):
            sizes = {"dropblock": (7, 7), "dropblock+": (5, 8)}
            assert (layer.drop_rate, layer.block_height, layer.block_width) == (0.1, *sizes[drop])
        if drop == "bfe":
            assert (layer.height_ratio, layer.width_ratio) == (1 / 3, 1)
        images = torch.randn(2, 3, 64, 32)
        assert torch.equal(network.eval()(images), network(images))
        seen = []
        layer.register_forward_hook(lambda layer, inputs, output, seen=seen: seen.append((inputs[0] == output).all()))
        layer.drop_rate = 0.9
        network.train()(images)
        assert seen[0] == (drop == "none")


def test_classifiers_start_undecided():
    outputs = SONANet(767)(torch.randn(4, 3, 64, 32))
    for _, logits in outputs.values():
        assert abs(F.cross_entropy(logits, torch.arange(4)) - math.log(767)) < 0.05


def test_from_scratch_residual_branches_start_at_zero():
    assert all(block.bn3.weight.abs().max() == 0 for block in SONANet(10).stage3)


def test_unknown_variants_are_refused():
    with pytest.raises(ValueError, match="sona is '5'; choose from none, 2, 3"):
        SONANet(10, sona="5")
    with pytest.raises(ValueError, match="drop is 'cutout'; choose from none, dropblock"):
        SONANet(10, drop="cutout")


@pytest.fixture(scope="module")
def resnet_state():
    torch.manual_seed(1)
    return resnet50().state_dict()


def assert_backbone_is(network, state):
    for ours, theirs in (("stem.0.weight", "conv1.weight"), ("stage4.2.bn3.running_var", "layer4.2.bn3.running_var")):
        assert torch.equal(network.state_dict()[ours], state[theirs])


@pytest.mark.parametrize("with_fc", [True, False])
def test_weights_from_a_file(tmp_path, resnet_state, with_fc):
    state = {name: value for name, value in resnet_state.items() if with_fc or not name.startswith("fc.")}
    torch.save(state, tmp_path / "resnet50.pth")
    assert_backbone_is(SONANet(10, weights=str(tmp_path / "resnet50.pth")), state)


def test_imagenet_weights_are_torchvisions_first(monkeypatch, resnet_state):
    asked = []

    def get_state_dict(self, check_hash, weights_only):
        asked.append((self.name, check_hash, weights_only))
        return resnet_state

    monkeypatch.setattr(ResNet50_Weights, "get_state_dict", get_state_dict)
    assert_backbone_is(SONANet(10, weights="imagenet"), resnet_state)
    assert asked == [("IMAGENET1K_V1", True, True)]


def test_imagenet_weights_without_a_network_say_where_to_get_them(monkeypatch):
    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(ResNet50_Weights, "get_state_dict", offline)
    with pytest.raises(WeightsError, match=r"https://download.pytorch.org/models/resnet50-\w+\.pth"):
        SONANet(10, weights="imagenet")


def test_bad_weights_are_one_line_that_names_the_file(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save(resnet18().state_dict(), tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"conv1.weight": Evil()}, tmp_path / "evil.pth")
    (tmp_path / "torn.pth").write_bytes((tmp_path / "other.pth").read_bytes()[:100_000])
    (tmp_path / "text.pth").write_text("404: not found")
    for name in ("missing", "other", "list", "evil", "torn", "text"):
        with pytest.raises(WeightsError, match=rf"{name}\.pth") as error:
            SONANet(10, weights=str(tmp_path / f"{name}.pth"))
        assert "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()


# ---------------------------------------------------------------------------------------------------
# Losses (Sec. 2.1)


def triplet_by_brute_force(embeddings, labels, margin):
    losses = []
    for a, anchor in enumerate(embeddings):
        distances = [(anchor - other).square().sum().sqrt() if i != a else None for i, other in enumerate(embeddings)]
        positive = max(d for i, d in enumerate(distances) if labels[i] == labels[a] and i != a)
        negative = min(d for i, d in enumerate(distances) if labels[i] != labels[a])
        gap = positive - negative
        losses.append(torch.log(1 + gap.exp()) if margin is None else (gap + margin).clamp(min=0))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("margin", [None, 0.3, 2.0])
def test_triplet_loss_and_its_gradient_are_those_of_brute_force(margin):
    labels = torch.tensor([0, 1, 2, 3] * 3)
    apart = torch.tensor([0, 0, 9, 18])[labels, None]  # two identities that lie among each other, two that do not
    embeddings = (torch.randn(12, 5, dtype=torch.float64) + apart).requires_grad_()
    ours, theirs = (f(embeddings, labels, margin) for f in (batch_hard_triplet_loss, triplet_by_brute_force))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, embeddings)[0] for loss in (ours, theirs)))


@pytest.mark.parametrize("margin", [None, 0.3])
def test_triplet_loss_where_embeddings_coincide(margin):
    embeddings = torch.ones(8, 5, requires_grad=True)
    loss = batch_hard_triplet_loss(embeddings, torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), margin)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2) if margin is None else margin)
    assert embeddings.grad.isfinite().all()


def test_triplet_loss_does_not_cancel_far_from_the_origin():
    near, labels = torch.randint(-8, 8, (12, 5)) / 4, torch.tensor([0, 1, 2, 3] * 3)
    torch.testing.assert_close(batch_hard_triplet_loss(near + 4096, labels), batch_hard_triplet_loss(near, labels))


def test_triplet_loss_is_float32_inside_autocast():
    embeddings, labels = torch.randn(8, 64).bfloat16().float(), torch.tensor([0, 1] * 4)
    with torch.autocast("cpu", torch.bfloat16):
        inside = batch_hard_triplet_loss(embeddings.bfloat16(), labels)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, batch_hard_triplet_loss(embeddings, labels))


def test_triplet_loss_without_positives_or_negatives():
    embeddings = torch.tensor([[0.0], [3.0]], requires_grad=True)
    torch.testing.assert_close(  # alone in its identity: its own positive
        batch_hard_triplet_loss(embeddings, torch.tensor([0, 1])), F.softplus(torch.tensor(-3.0))
    )
    loss = batch_hard_triplet_loss(embeddings, torch.tensor([1, 1]))
    loss.backward()
    assert loss == 0
    assert embeddings.grad.isfinite().all()


def test_triplet_loss_refuses_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"not \(4, 2\) and \(3,\)"):
        batch_hard_triplet_loss(torch.zeros(4, 2), torch.zeros(3))


def test_the_loss_is_the_sum_of_both_losses_of_both_branches():
    labels = torch.tensor([0, 1, 2] * 2)
    outputs = {branch: (torch.randn(6, d), torch.randn(6, 3)) for branch, d in (("global", 512), ("local", 1024))}
    total, parts = branch_losses(outputs, labels)
    for branch, (embedding, logits) in outputs.items():
        target = 0.9 * F.one_hot(labels) + 0.1 / 3  # label smoothing of 0.1 [36]
        cross_entropy = -(target * logits.log_softmax(1)).sum(1).mean()
        torch.testing.assert_close(parts[f"{branch}_cross_entropy"], cross_entropy)
        torch.testing.assert_close(parts[f"{branch}_triplet"], triplet_by_brute_force(embedding, labels, None))
        torch.testing.assert_close(parts[f"{branch}_accuracy"], (logits.argmax(1) == labels).float().mean())
    losses = [parts[f"{branch}_{loss}"] for branch in ("global", "local") for loss in ("triplet", "cross_entropy")]
    torch.testing.assert_close(total, sum(losses))
    torch.testing.assert_close(parts["loss"], sum(losses))


def test_a_collapsed_network_has_the_loss_that_train_names():
    outputs = {branch: (torch.ones(8, d), torch.zeros(8, 751)) for branch, d in (("global", 512), ("local", 1024))}
    total, parts = branch_losses(outputs, torch.arange(8) // 4)
    assert total.item() == pytest.approx(14.63, abs=0.005)
    assert collapsed(parts, 751)
    for margin in (0.3, 0.0):
        assert collapsed(branch_losses(outputs, torch.arange(8) // 4, margin)[1], 751, margin)
    # A loss of the same sum need not be a collapse.
    assert not collapsed({**parts, "local_triplet": parts["local_triplet"] + 1}, 751)


def step(rank, processes, folder):
    """One process's part of a step on a fixed batch, normalisation frozen; the first leaves loss and gradients."""
    torch.set_num_threads(1)
    if processes > 1:
        dist.init_process_group("gloo", f"file://{folder}/{processes}", rank=rank, world_size=processes)
    torch.manual_seed(0)
    images = torch.randn(8, 3, 32, 16)
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 3, 3])  # most anchors' positives lie in another process
    network = SONANet(4, drop="none")
    nn.init.normal_(network.sona2.p.weight, std=0.1)
    network.train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.2, 1)
            module.eval()
    model = DistributedDataParallel(network) if processes > 1 else network
    share = slice(rank * 8 // processes, (rank + 1) * 8 // processes)
    results = {}
    for margin in (None, 5.0):
        network.zero_grad()
        total, parts = branch_losses(model(images[share]), labels[share], margin)
        total.backward()
        loss = parts["loss"]
        if processes > 1:
            dist.all_reduce(loss)
        results[margin] = loss / processes, [p.grad.clone() for p in network.parameters()]
    if rank == 0:
        torch.save(results, f"{folder}/{processes}.pt")
    if processes > 1:
        del model  # before its group, as in train.py
        dist.destroy_process_group()


def test_a_step_of_several_processes_is_that_of_one_with_the_whole_batch(tmp_path):
    step(0, 1, tmp_path)
    alone = torch.load(tmp_path / "1.pt", weights_only=True)
    for processes in (2, 4):
        mp.start_processes(step, (processes, tmp_path), processes, start_method="fork")
        shared = torch.load(tmp_path / f"{processes}.pt", weights_only=True)
        for margin, (loss, gradients) in alone.items():
            torch.testing.assert_close(shared[margin][0], loss, rtol=1e-5, atol=0)
            for ours, theirs in zip(shared[margin][1], gradients, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


# ---------------------------------------------------------------------------------------------------
# Data (Sec. 3.1, 3.2)


def draw_market(root, train_ids=4, test_ids=3):
    """A small data set in the Market-1501 layout, drawn like the toy: 2 cameras x 2 images."""
    for folder, people in (
        ("bounding_box_train", range(1, train_ids + 1)),
        ("query", range(50, 50 + test_ids)),
        ("bounding_box_test", range(50, 50 + test_ids)),
    ):
        (root / folder).mkdir(parents=True)
        for person in people:
            for camera in (1, 2):
                for image in range(1 if folder == "query" else 2):
                    picture = data.draw_pedestrian(person, camera, image + 2 * (folder == "query"))
                    picture.save(root / folder / f"{person:04d}_c{camera}s1_{image:06d}_00.jpg")
    return root


def touch(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()


def test_the_counts_are_those_of_table_1():
    table_1 = {
        "market1501": {"train": (12936, 751), "query": (3368, 750), "gallery": (19732 - 3819, 750)},
        "cuhk03": {"train": (7368, 767), "query": (1400, 700), "gallery": (5328, 700)},
        "cuhk03-detected": {"train": (7365, 767), "query": (1400, 700), "gallery": (5332, 700)},
        "dukemtmc": {"train": (16522, 702), "query": (2228, 702), "gallery": (17661, 1110)},
    }
    assert {name: DATASETS[name].counts for name in table_1} == table_1


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("market1501", "market1501"),
        ("market1501", "Market-1501-v15.09.15"),
        ("dukemtmc", "dukemtmc-reid"),
        ("dukemtmc", "DukeMTMC-reID"),
        ("cuhk03", "cuhk03-np/labeled"),
        ("cuhk03-detected", "CUHK03-NP/detected"),
    ],
)
def test_data_sets_are_found_under_the_names_of_their_archives(tmp_path, name, folder):
    for split in data.FOLDERS.values():
        touch(tmp_path / folder / split, "0001_c1s1_000001_00.jpg", "0001_c2s1_000001_00.jpg")
    assert load_dataset(name, tmp_path)["query"].ids.tolist() == [1, 1]


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
    found = {Path(p).name: (i, c) for p, i, c in zip(split.paths, split.ids, split.cams, strict=True)}
    assert found == {name: who for name, who in names.items() if who}
    assert split.num_ids == 4
    assert split.labels.tolist() == np.searchsorted([0, 2, 3, 5, 1467], split.ids).tolist()


@pytest.mark.parametrize("name", ["person.jpg", "0001.jpg", "0001_1.jpg", "_c1s1_0.jpg", "-2_c1_0.jpg", "0001_c1x.png"])
def test_a_name_that_does_not_parse_is_named(tmp_path, name):
    touch(tmp_path, name)
    with pytest.raises(DataError, match=name):
        data.read_split(tmp_path)


def test_missing_empty_and_nested_data_sets_are_told(tmp_path):
    with pytest.raises(DataError, match="no data set is named markt; choose from toy, market1501"):
        load_dataset("markt", tmp_path)
    with pytest.raises(DataError, match="no folder .*market1501 or .*Market-1501-v15.09.15"):
        load_dataset("market1501", tmp_path)
    (tmp_path / "market1501").mkdir()
    with pytest.raises(DataError, match="bounding_box_train is missing"):
        load_dataset("market1501", tmp_path)
    touch(tmp_path / "market1501/bounding_box_train", "Thumbs.db")
    with pytest.raises(DataError, match="bounding_box_train holds no images"):
        load_dataset("market1501", tmp_path)
    touch(tmp_path / "dukemtmc-reid/DukeMTMC-reID/bounding_box_train", "0001_c1_f0.jpg")
    with pytest.raises(DataError, match="it is in .*dukemtmc-reid/DukeMTMC-reID: move"):
        load_dataset("dukemtmc", tmp_path)


def test_counts_that_are_not_the_papers_are_noted(tmp_path):
    draw_market(tmp_path / "market1501")
    text = data.describe("market1501", load_dataset("market1501", tmp_path))
    assert "published: 12,936 of 751" in text
    assert "note:" in text
    assert max(map(len, text.splitlines())) <= 80


def test_images_of_any_mode_load_as_rgb(tmp_path):
    grey = (np.arange(64, dtype=np.uint8) * 4).reshape(8, 8)
    rgb = np.stack([grey, grey.T, 255 - grey], 2)
    modes = {
        "L.png": Image.fromarray(grey),
        "LA.png": Image.fromarray(grey).convert("LA"),
        "1.png": Image.fromarray(grey).convert("1"),
        "I16.png": Image.fromarray(grey.astype(np.uint16) * 257),
        "RGB.bmp": Image.fromarray(rgb),
        "RGBA.png": Image.fromarray(rgb).convert("RGBA"),
        "P.png": Image.fromarray(rgb).quantize(64),
        "CMYK.jpg": Image.fromarray(rgb).convert("CMYK"),
    }
    for name, image in modes.items():
        image.save(tmp_path / name, quality=95)
        loaded = data.read_image(tmp_path / name).permute(1, 2, 0).numpy().astype(int)
        assert loaded.shape == (8, 8, 3), name
        expected = rgb if name[:3] in ("RGB", "P.p", "CMY") else grey[..., None]
        if name != "1.png":
            assert np.abs(loaded - expected).mean() < 12, name


def test_a_photo_that_lies_on_its_side_is_set_upright(tmp_path):
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, 8:] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned clockwise
    Image.fromarray(pixels).save(tmp_path / "phone.jpg", exif=exif)
    image = data.read_image(tmp_path / "phone.jpg")
    assert image.shape == (3, 16, 8)
    assert (image[:, :7] < 50).all() and (image[:, 9:] > 200).all()


def test_broken_exif_data_do_not_spoil_a_picture(tmp_path):
    Image.new("RGB", (16, 8)).save(tmp_path / "broken.png", exif=b"Exif\0\0neither II nor MM")
    assert data.read_image(tmp_path / "broken.png").shape == (3, 8, 16)


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    data.draw_pedestrian(1, 1, 1).save(tmp_path / "whole.jpg")
    (tmp_path / "torn.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:900])
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.bmp").touch()
    for name in ("torn.jpg", "text.png", "empty.bmp", "missing.jpg"):
        with pytest.raises(DataError, match=f"cannot read the image .*{name}") as error:
            ImageDataset([str(tmp_path / name)], 64, 32)[0]
        assert "\n" not in str(error.value)


def test_images_are_resized_and_normalised(tmp_path):
    Image.new("RGB", (50, 90), (255, 0, 128)).save(tmp_path / "plain.png")
    image, index = ImageDataset([str(tmp_path / "plain.png")], 384, 128)[0]
    assert (image.shape, image.dtype, index) == ((3, 384, 128), torch.uint8, 0)
    expected = (torch.tensor([1, 0, 128 / 255]) - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor(
        [0.229, 0.224, 0.225]
    )
    normalised = normalize(image[None])
    torch.testing.assert_close(normalised[0], expected[:, None, None].expand(3, 384, 128))
    assert normalised.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("height", "width", "side"), [(384, 128, 64), (96, 32, 16)])
def test_cutout_fills_one_square_of_half_the_images_with_0(height, width, side):
    images = cutout(torch.ones(400, 3, height, width))
    assert torch.equal(images[:, 0], images[:, 2])
    cut, corners = 0, set()
    for image in images[:, 0]:
        rows, columns = (image == 0).any(1).nonzero().flatten(), (image == 0).any(0).nonzero().flatten()
        if len(rows):
            cut += 1
            corners.add((int(rows[0]), int(columns[0])))
            assert (image == 0).sum() == side**2
            assert len(rows) == len(columns) == side
            assert rows[-1] - rows[0] == columns[-1] - columns[0] == side - 1
    assert 150 < cut < 250
    assert {0, width - side} <= {column for _, column in corners}
    assert len(corners) > 100


def test_augmentation_flips_half_the_images_and_normalises():
    images = torch.randint(0, 256, (400, 3, 24, 8), dtype=torch.uint8)
    augmented, straight, mirrored = augment(images), normalize(images), normalize(images.flip(3))
    flipped = 0
    for ours, image, mirror in zip(augmented, straight, mirrored, strict=True):
        kept = ours != 0
        is_flipped = torch.equal(ours[kept], mirror[kept])
        assert is_flipped or torch.equal(ours[kept], image[kept])
        assert kept.float().mean() > 0.9
        flipped += is_flipped
    assert 150 < flipped < 250


LABELS = [label for label in range(10) for _ in range(2 + label % 4)]  # identities of 2 to 5 images


def test_sampler_takes_each_identity_once_an_epoch():
    sampler = IdentitySampler(LABELS, ids_per_batch=3, images_per_id=4)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 10 // 3
    seen = []
    for batch in batches:
        groups = np.array(LABELS)[batch].reshape(3, 4)
        assert (groups == groups[:, :1]).all()
        seen += groups[:, 0].tolist()
        for images in np.reshape(batch, (3, 4)):  # none twice where there are enough
            assert len(set(images)) == 4 or LABELS.count(LABELS[images[0]]) < 4
    assert len(set(seen)) == 9


def test_sampler_is_a_function_of_seed_and_epoch_alone():
    def batches(seed, epoch, before=0):
        sampler = IdentitySampler(LABELS, 5, 2, seed=seed)
        for _ in range(before):
            list(sampler)
        np.random.rand()
        sampler.set_epoch(epoch)
        return list(sampler)

    assert batches(1, 2) == batches(1, 2, before=3)
    assert batches(1, 2) != batches(1, 3)
    assert batches(1, 2) != batches(2, 2)


def test_processes_share_the_same_global_batch():
    whole = list(IdentitySampler(LABELS, 4, 2, seed=3))
    shares = [list(IdentitySampler(LABELS, 4, 2, seed=3, rank=rank, world_size=2)) for rank in range(2)]
    assert [first + second for first, second in zip(*shares, strict=True)] == whole
    with pytest.raises(DataError, match="4 identities a batch cannot be shared among 3 processes"):
        IdentitySampler(LABELS, 4, 2, world_size=3)


def test_sampler_needs_a_batch_of_identities():
    with pytest.raises(DataError, match="10 identities, a batch takes 11"):
        IdentitySampler(LABELS, ids_per_batch=11)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return load_dataset("toy", tmp_path_factory.mktemp("toy"))


def test_the_toy_is_drawn_whole_and_the_same_each_time(toy):
    assert {name: (len(split.paths), split.num_ids) for name, split in toy.items()} == DATASETS["toy"].counts
    assert not set(toy["train"].ids) & set(toy["query"].ids)
    folder = Path(toy["train"].paths[0]).parents[1]
    assert [path.name for path in folder.parent.iterdir()] == ["toy"]  # no scratch folder stays
    assert "note" not in data.describe("toy", toy)
    for path, person, camera in list(zip(*toy["query"], strict=True))[::40]:
        data.draw_pedestrian(person, camera, 0).save(again := folder.parent / "again.png")
        assert again.read_bytes() == Path(path).read_bytes()
        again.unlink()


def test_the_toy_is_not_solved_by_colour(toy):
    def histogram(path):
        return np.concatenate([np.histogram(channel, 8, (0, 256))[0] for channel in data.read_image(path)])

    query, gallery = toy["query"], toy["gallery"]
    features = [np.stack([histogram(path) for path in split.paths]) for split in (query, gallery)]
    ranking = evaluate_ranking(*features, query.ids, gallery.ids, query.cams, gallery.cams)
    assert ranking.mean_ap < 0.1


# ---------------------------------------------------------------------------------------------------
# The schedule and the training step (Sec. 3.2)


def test_the_learning_rate_is_the_papers_in_every_epoch():
    warm_up = [1e-4 * step for step in range(1, 11) for _ in range(5)]
    papers = warm_up + 150 * [1e-3] + 100 * [1e-4] + 100 * [1e-5]
    assert [learning_rate(epoch) for epoch in range(400)] == pytest.approx(papers, rel=1e-12)


def test_other_numbers_of_epochs_run_the_same_course():
    assert [learning_rate(epoch, 40, 2e-3) for epoch in range(40)] == pytest.approx(
        [2e-3 * f for f in (0.1, 0.3, 0.5, 0.7, 0.9)] + 15 * [2e-3] + 10 * [2e-4] + 10 * [2e-5]
    )
    assert [learning_rate(epoch, 800) for epoch in range(0, 800, 2)] == [learning_rate(e) for e in range(400)]
    assert learning_rate(0, 1) == pytest.approx(1e-4)


class Tiny(nn.Module):
    """Stands in SONANet's place in tests of the programs: the same interface, and steps of milliseconds."""

    def __init__(self, num_classes, sona="2", drop="dropblock+", weights=None):
        super().__init__()
        attention = next(iter(PLACEMENTS[sona].values()), nn.Identity)(8)
        self.trunk = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8), nn.LeakyReLU(), attention)
        self.drop = DROPS[drop]()
        self.classifier = nn.Linear(8, num_classes)

    def forward(self, images):
        x = self.trunk(images)
        embeddings = {"global": x.mean((2, 3)), "local": self.drop(x).amax((2, 3))}
        if not self.training:
            return torch.cat(list(embeddings.values()), 1)
        return {branch: (embedding, self.classifier(embedding)) for branch, embedding in embeddings.items()}


def test_a_pass_is_random_by_seed_epoch_step_and_its_number():
    network = nn.Sequential()  # returns the images as they come out of augmentation
    network.forward = lambda images: {"global": (images, torch.rand(1))}
    images = torch.randint(256, (8, 3, 24, 8), dtype=torch.uint8)

    def augmented(*key, rank=0):
        return torch.cat([x.flatten() for x in Passes(network, 4, rank)(images, key)["global"]])

    first = augmented(1, 2, 3)
    torch.rand(5)
    assert torch.equal(augmented(1, 2, 3), first)
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4), (2, 1, 3)):
        assert not torch.equal(augmented(*other), first)
    # Two processes of two passes each make the four passes of one process.
    halves = [Passes(network, 2, rank)(images[4 * rank :][:4], (1, 2, 3))["global"][0] for rank in (0, 1)]
    assert torch.equal(torch.cat(halves), Passes(network, 2)(images, (1, 2, 3))["global"][0])


def test_passes_are_normalised_apart_and_the_first_one_is_remembered():
    network = SONANet(4, drop="none")
    alone, images = SONANet(4, drop="none"), torch.randint(256, (8, 3, 32, 16), dtype=torch.uint8)
    alone.load_state_dict(network.state_dict())
    outputs = Passes(network, 4)(images, (0, 0, 0))
    for i in (1, 0):
        expected = Passes(alone, 4, rank=i)(images[4 * i :][:4], (0, 0, 0))
        for branch in ("global", "local"):
            torch.testing.assert_close(outputs[branch][0][4 * i :][:4], expected[branch][0])
    for (name, ours), theirs in zip(network.named_buffers(), alone.buffers(), strict=True):
        assert torch.equal(ours, theirs), name
    Passes(alone, 4, rank=1)(images, (0, 0, 1))  # another process's passes change no statistics
    for ours, theirs in zip(network.buffers(), alone.buffers(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_recomputed_gradients_are_the_same_bit_for_bit(precision):
    network, images = SONANet(4), torch.randint(256, (8, 3, 32, 16), dtype=torch.uint8)
    nn.init.normal_(network.sona2.p.weight, std=0.1)
    results, labels = [], torch.arange(4).repeat_interleave(2)
    buffers = [buffer.clone() for buffer in network.buffers()]
    for recompute in (False, True):
        for buffer, value in zip(network.buffers(), buffers, strict=True):
            buffer.copy_(value)
        network.zero_grad()
        outputs = Passes(network, 2, precision=precision, recompute=recompute)(images, (0, 0, 0))
        loss = branch_losses(outputs, labels)[0]
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in network.parameters()), *map(torch.clone, network.buffers())])
    assert all(map(torch.equal, *results))


def test_classifiers_are_of_float32_in_training_in_bf16():
    outputs = Passes(SONANet(4), 4, precision="bf16")(torch.zeros(4, 3, 32, 16, dtype=torch.uint8), (0, 0, 0))
    assert {tensor.dtype for pair in outputs.values() for tensor in pair} == {torch.float32}


@pytest.mark.parametrize(("sona", "drop"), [*((sona, "dropblock+") for sona in SONAS), ("2", "bfe")])
def test_a_step_on_a_gpu_waits_for_no_value(sona, drop):
    """Shapes and devices alone: fails where a tensor lies on the wrong device, or a value would have to be known."""
    data.imagenet_statistics.cache_clear()
    try:
        with FakeTensorMode():
            with torch.device("cuda"):
                network = SONANet(10, sona, drop)
            images = torch.zeros(8, 3, 64, 32, dtype=torch.uint8, device="cuda")
            labels = torch.zeros(8, dtype=torch.int64, device="cuda")
            with mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False):
                outputs = Passes(network, 4, precision="fp16")(images, (0, 0, 0))
            loss, parts = branch_losses(outputs, labels)
            assert {part.device.type for part in (loss, *parts.values())} == {"cuda"}
    finally:
        data.imagenet_statistics.cache_clear()


@pytest.mark.parametrize(
    ("gpu", "capability", "cpu", "precision"),
    [
        (True, (8, 0), {}, "bf16"),
        (True, (7, 5), {}, "fp16"),
        (True, (7, 0), {}, "fp16"),
        (True, (6, 1), {}, "float32"),
        (False, None, {"amx_bf16": True, "avx512_bf16": False}, "bf16"),
        (False, None, {"amx_bf16": False, "avx512_bf16": True}, "bf16"),
        (False, None, {"avx2": True}, "float32"),
        (False, None, {}, "float32"),
    ],
)
def test_the_precision_is_what_the_device_is_fast_in(monkeypatch, gpu, capability, cpu, precision):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: capability >= (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    assert train.fast_precision(torch.device("cuda" if gpu else "cpu")) == precision


# ---------------------------------------------------------------------------------------------------
# Ranking (Sec. 3.3)


def rank_by_brute_force(query, gallery, query_ids, gallery_ids, query_cams, gallery_cams, max_rank=50):
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
    """Features of few levels, so that many distances are equal; some junk (-1) and distractors (0)."""
    rng = np.random.default_rng(0)
    features = [rng.integers(0, levels, (n, dimensions)).astype(np.float32) for n in (queries, gallery)]
    return [
        *features,
        rng.integers(1, ids + 1, queries),
        rng.integers(-1, ids - 1, gallery),  # the two last identities are in no gallery: unmatched queries
        rng.integers(1, 4, queries),
        rng.integers(1, 4, gallery),
    ]


def test_ranking_is_that_of_brute_force_with_junk_distractors_ties_and_unmatched_queries():
    arguments = random_ranking(queries=60, gallery=300, ids=15)
    ranking = evaluate_ranking(*arguments)
    cmc, aps = rank_by_brute_force(*arguments)
    assert np.isnan(aps).sum() > 3
    np.testing.assert_allclose(ranking.average_precisions, aps, rtol=1e-12)
    np.testing.assert_allclose(ranking.cmc, cmc, rtol=1e-12)
    assert ranking.mean_ap == pytest.approx(np.nanmean(aps))
    assert ranking.figures() == {"mean_ap": ranking.mean_ap, "rank1": cmc[0], "rank5": cmc[4], "rank10": cmc[9]}


def test_ranking_in_several_slabs_is_the_same_ranking():
    arguments = random_ranking(queries=1000, gallery=10_000, ids=3000, dimensions=3, levels=1000)
    query, gallery, query_ids, gallery_ids, query_cams, gallery_cams = arguments
    whole = evaluate_ranking(*arguments)  # more than one slab of 8 million distances
    parts = [
        evaluate_ranking(query[i], gallery, query_ids[i], gallery_ids, query_cams[i], gallery_cams)
        for i in np.array_split(np.arange(1000), 3)
    ]
    np.testing.assert_array_equal(whole.average_precisions, np.concatenate([p.average_precisions for p in parts]))


def test_ranking_does_not_cancel_far_from_the_origin():
    arguments = random_ranking(queries=60, gallery=300, ids=15, dimensions=64, levels=1000)
    _, aps = rank_by_brute_force(*arguments)
    for side in (0, 1):
        arguments[side] = arguments[side] / 1024 + 512
    np.testing.assert_allclose(evaluate_ranking(*arguments).average_precisions, aps, rtol=1e-12)


def test_a_collapsed_network_ranks_in_gallery_order():
    rng = np.random.default_rng(0)
    one = rng.random((1, 1536), dtype=np.float32)
    ids = rng.integers(1, 4, 37)
    ranking = evaluate_ranking(one, np.tile(one, (37, 1)), np.array([1]), ids, np.array([1]), np.full(37, 2))
    hits = np.flatnonzero(ids == 1) + 1
    assert ranking.mean_ap == pytest.approx(np.mean(np.arange(1, len(hits) + 1) / hits))


def test_ranking_by_hand():
    """One query; the gallery in order of distance: junk, own camera, wrong, right, distractor, right."""
    gallery = np.arange(1, 7, dtype=np.float32)[:, None]
    ids, cams = np.array([-1, 1, 2, 1, 0, 1]), np.array([2, 1, 2, 2, 2, 3])
    ranking = evaluate_ranking(np.zeros((1, 1)), gallery, np.array([1]), ids, np.array([1]), cams, max_rank=6)
    assert ranking.mean_ap == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert ranking.cmc.tolist() == [0, 1, 1, 1, 1, 1]


def test_ranking_refuses_what_it_cannot_rank():
    arguments = random_ranking(queries=4, gallery=20, ids=5)
    unmatched = [*arguments]
    unmatched[2] = np.full(4, 99)
    with pytest.raises(ValueError, match="no query has a true match"):
        evaluate_ranking(*unmatched)
    for side in (0, 1):
        broken = [a.copy() for a in arguments]
        broken[side][1, 1] = np.nan
        with pytest.raises(ValueError, match="nan"):
            evaluate_ranking(*broken)
    with pytest.raises(ValueError, match=r"\(4, 6\) and \(20, 5\)"):
        evaluate_ranking(arguments[0], arguments[1][:, :5], *arguments[2:])
    with pytest.raises(ValueError, match="gallery: 20 features"):
        evaluate_ranking(*arguments[:3], arguments[3][:7], *arguments[4:])


def test_features_average_the_image_and_its_mirror_image(tmp_path):
    data.draw_pedestrian(1, 1, 0).save(tmp_path / "a.png")
    data.draw_pedestrian(2, 1, 0).save(tmp_path / "b.png")
    paths = [str(tmp_path / name) for name in ("a.png", "b.png")]
    network, tf32 = SONANet(4), []
    hook = network.register_forward_hook(lambda *_: tf32.append(torch.backends.cudnn.allow_tf32))
    features = extract_features(network, paths, 64, 32)
    hook.remove()
    assert tf32 == [False]  # float32 is meant
    images = normalize(torch.stack([ImageDataset(paths, 64, 32)[i][0] for i in range(2)]))
    with torch.no_grad():
        network.eval()
        expected = (network(images) + network(images.flip(3))) / 2
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------
# Time and pictures (Fig. 3, Sec. 3.5)


def test_time_is_of_the_network_with_sona_and_of_the_same_without(monkeypatch):
    network, passes = SONANet(4, "2+3").eval(), []
    monkeypatch.setattr(
        SONANet, "forward", lambda self, x: passes.append(sum(isinstance(m, SONA) for m in self.modules()))
    )
    evaluate.print_times(network, height=32, width=16)
    assert passes == [2, 0] * 13 * 2  # in turn, three runs to warm up; one image, then 32


def picture_tiles(picture, columns):
    """The tiles of a sheet: arrays (236, 106, 3), rows of `columns`."""
    pixels = np.asarray(picture)[28 + 4 :, 4 : 4 + columns * 110]
    return [
        [pixels[y : y + 236, x : x + 106] for x in range(0, columns * 110, 110)] for y in range(0, len(pixels), 240)
    ]


def test_attention_is_drawn_on_one_scale_with_its_strength_in_numbers(monkeypatch, tmp_path):
    Image.new("RGB", (64, 128), (0, 128, 0)).save(tmp_path / "green.png")

    def attend(sona, x):  # at the first row as much as uniform, then twice and more, last half and less
        weight = torch.ones(x.shape[2:])
        weight[-1], weight[-2] = 0.3, 2.5
        return (weight.flatten() / weight.numel()).expand(1, weight.numel(), -1)

    written = []
    monkeypatch.setattr(SONA, "attention", attend)
    monkeypatch.setattr(evaluate, "tile", lambda *a, tile=evaluate.tile: written.append(a[2]) or tile(*a))
    picture = evaluate.draw_attention(SONANet(4).eval(), [str(tmp_path / "green.png")] * 2, 64, 32)
    rows = picture_tiles(picture, 6)
    assert len(rows) == 2
    for row in rows:
        assert tuple(row[0][190, 95]) == (0, 128, 0)  # the image itself
        for tile, (top, left) in zip(row[1:], evaluate.POINTS.values(), strict=True):
            plain, red, blue = tile[10, 90], tile[5 + 156, 90], tile[194, 90]  # in the rows of 1, 2.5 and 0.3
            assert tuple(plain) == (0, 128, 0)
            assert red[0] > 180 and red[2] < 20
            assert blue[2] > 180 and blue[0] < 20
            assert tuple(tile[int(5 + 192 * top), int(5 + 96 * left)]) == (0x20, 0xE0, 0x40)
    assert written[1] == "head\nup to 2.50 x"


def test_rows_of_the_attention_are_two_views_of_each_person():
    query = data.Split([f"q{i}" for i in range(6)], np.array([1, 1, 2, 2, 3, 3]), np.array([1, 2, 1, 2, 1, 2]))
    gallery = data.Split(["g1", "g2", "g3"], np.array([1, 2, 2]), np.array([2, 1, 3]))  # 3 has one camera alone
    paths = evaluate.two_views(query, gallery)
    assert sorted([paths[:2], paths[2:]]) == [["q0", "g1"], ["q2", "g3"]]


def test_curves_are_of_all_runs_and_compare_their_average_losses(tmp_path, capsys):
    parts = [f"{b}_{part}" for b in ("global", "local") for part in ("triplet", "cross_entropy", "accuracy")]
    for name, sona, losses in (("bl", "none", [4, 2]), ("sona", "2", [4, 2.03])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "args.json").write_text(json.dumps({"sona": sona, "seed": 0, "output": name}))
        records = [dict.fromkeys(parts, loss / 4) | {"loss": loss, "lr": 1e-3} for loss in losses]
        records = [{"epoch": epoch, **record} for epoch, record in enumerate(records)]
        records[-1]["mean_ap"] = 0.5
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    call(evaluate, tmp_path / "bl", tmp_path / "sona", "--curves", tmp_path / "curves.png")
    printed = capsys.readouterr().out
    assert f"   3.0000   +0.00%  {tmp_path / 'bl'} --sona none\n" in printed
    assert f"   3.0150   +0.50%  {tmp_path / 'sona'} --sona 2\n" in printed
    pixels = np.asarray(Image.open(tmp_path / "curves.png"))
    for left in range(0, 3 * 420, 420):
        for top in (0, 300):
            colours = set(map(tuple, pixels[top : top + 300, left : left + 420].reshape(-1, 3)))
            assert (0xD0, 0x70, 0x20) in colours  # the second run's, which lies on the first's where they agree
    with pytest.raises(DataError, match="nowhere is no folder of a run"):
        call(evaluate, tmp_path / "nowhere", "--curves", tmp_path / "curves.png")


@pytest.mark.parametrize("flags", [["--time"], ["--attention", "a.png"]])
def test_a_network_without_sona_has_no_attention_to_draw_or_time(monkeypatch, flags):
    monkeypatch.setattr(evaluate, "load_run", lambda *_: (Tiny(4, "none"), {"height": 32, "width": 16}))
    with pytest.raises(SystemExit, match="runs/bl has no SONA module to time or to draw"):
        call(evaluate, "runs/bl", *flags)


def test_the_ranking_sheet_frames_true_matches_green_and_false_ones_red(tmp_path):
    Image.new("RGB", (64, 128)).save(tmp_path / "a.png")
    query = data.Split([str(tmp_path / "a.png")], np.array([1]), np.array([1]))
    gallery = data.Split([str(tmp_path / "a.png")] * 4, np.array([2, 1, 1, 0]), np.array([2, 2, 1, 2]))
    features = [np.zeros((1, 2)), np.array([[0, 2], [0, 1], [0, 0], [0, 3]])]  # the nearest is of its own camera
    order, distances = evaluate.nearest(0, query, gallery, features)
    assert order.tolist() == [1, 0, 3]
    assert distances.tolist() == [1, 2, 3]
    ranking = evaluate_ranking(*features, query.ids, gallery.ids, query.cams, gallery.cams)
    rows = picture_tiles(evaluate.draw_ranking(query, gallery, features, ranking), 11)
    green, red, white = (0x20, 0xA0, 0x40), (0xD0, 0x30, 0x30), (255, 255, 255)
    for row in rows[:2]:  # at random, and the worst
        assert [tuple(tile[2, 2]) for tile in row[1:5]] == [green, red, red, white]
    unlabelled = picture_tiles(evaluate.draw_ranking(query, gallery, features), 11)[0]
    assert all(tuple(tile[2, 2]) == white for tile in unlabelled[1:])


# ---------------------------------------------------------------------------------------------------
# The programs


def call(program, *arguments):
    """train or evaluate as a command line starts it, in this process, with Tiny in SONANet's place."""
    with (
        mock.patch.object(sys, "argv", [f"{program.__name__}.py", *map(str, arguments)]),
        mock.patch.object(train, "SONANet", Tiny),
        mock.patch.object(evaluate, "SONANet", Tiny),
    ):
        program.main()


def fork(processes, *arguments):
    """train in several processes, as torchrun starts it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def work(rank):
        torch.set_num_threads(1)
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        os.environ.update({name: str(number) for name, number in numbers.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        call(train, *arguments)

    mp.start_processes(work, nprocs=processes, start_method="fork")


def program_arguments(command, torchrun=0):
    """What starts train.py or evaluate.py, with Tiny, as a user does by python or by torchrun."""
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={torchrun}"] if torchrun else []
    return {
        "args": [sys.executable, *launcher, __file__, *map(str, command)],
        "cwd": HERE,
        "env": {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error::UserWarning"},
        "stderr": subprocess.PIPE,
        "text": True,
    }


@pytest.fixture(scope="module")
def market(tmp_path_factory):
    """A data folder with a small market1501, and the arguments to train on it."""
    folder = tmp_path_factory.mktemp("datasets")
    draw_market(folder / "market1501")
    size = ["--height", 32, "--width", 16, "--ids-per-batch", 4, "--images-per-id", 2, "--images-per-pass", 4]
    options = ["--weights", "none", "--precision", "float32", "--workers", 0]
    return ["--dataset", "market1501", "--data-dir", folder, *size, *options]


@pytest.fixture(scope="module")
def run(market, tmp_path_factory):
    """A finished run of 4 epochs, and what it printed."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        call(train, *market, "--epochs", 4, "--eval-every", 2, "--output", output)
    return output, printed.getvalue()


def records_of(output):
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def test_a_run_trains_logs_and_evaluates(run):
    output, printed = run
    records = records_of(output)
    assert [record["epoch"] for record in records] == [0, 1, 2, 3]
    assert [record["lr"] for record in records] == [learning_rate(epoch, 4) for epoch in range(4)]
    for record in records:
        parts = [record[f"{b}_{part}"] for b in ("global", "local") for part in ("triplet", "cross_entropy")]
        assert record["loss"] == pytest.approx(sum(parts))
        assert ("mean_ap" in record) == (record["epoch"] in (1, 3))
    assert {"rank1", "rank5", "rank10"} < set(records[3])
    assert sorted(p.name for p in output.iterdir()) == ["args.json", "last.pt", "log.jsonl", "model.pt"]
    assert max(len(line) for line in printed.splitlines() if not line.startswith(("note: no GPU", "the run"))) <= 80
    assert any(line.startswith("untrained    mAP") for line in printed.splitlines())
    assert f"trained      mAP{100 * records[3]['mean_ap']:7.2f}" in printed


def test_adam_is_the_papers_and_decays_all_but_theta(run):
    output, _ = run
    state = torch.load(output / "last.pt", weights_only=True)
    others, theta = state["optimizer"]["param_groups"]
    for group in (others, theta):
        assert (group["lr"], group["betas"], group["fused"]) == (learning_rate(3, 4), (0.9, 0.999), True)
    assert (others["weight_decay"], theta["weight_decay"]) == (5e-4, 0)
    names = [name for name, _ in Tiny(4).named_parameters()]
    assert len(theta["params"]) == 3  # a convolution without bias, batch norm's gain and bias
    assert len(others["params"]) == len(names) - 3
    shapes = [tuple(state["optimizer"]["state"][i]["exp_avg"].shape) for i in theta["params"]]
    assert shapes == [(4, 8, 1, 1), (4,), (4,)]


def contents(output):
    """A run's final weights, and its log without the speed."""
    weights = torch.load(output / "model.pt", weights_only=True)["model"]
    return weights, [{k: v for k, v in record.items() if k != "images_per_second"} for record in records_of(output)]


def assert_same_run(output, other):
    (weights, records), (other_weights, other_records) = contents(output), contents(other)
    assert records == other_records
    for name, value in weights.items():
        assert torch.equal(value, other_weights[name]), name


def test_one_process_two_and_four_are_the_same_run(market, tmp_path):
    command = [*market, "--epochs", 2, "--eval-every", 1]
    runs = {}
    for name, processes, *flags in (
        ("one", 1, "--images-per-pass", 2),
        ("recomputed", 1, "--images-per-pass", 2, "--recompute"),
        ("two", 2, "--images-per-pass", 2),
        ("four", 4, "--images-per-pass", 2),
        ("bfe", 1, "--images-per-pass", 2, "--drop", "bfe"),
        ("bfe-two", 2, "--images-per-pass", 2, "--drop", "bfe"),
        ("larger", 1, "--images-per-pass", 4),
    ):
        arguments = [*command, *flags, "--output", tmp_path / name]
        fork(processes, *arguments) if processes > 1 else call(train, *arguments)
        runs[name] = contents(tmp_path / name)
    assert_same_run(tmp_path / "recomputed", tmp_path / "one")
    for name, first in (("two", "one"), ("four", "one"), ("bfe-two", "bfe")):
        for record, expected in zip(runs[name][1], runs[first][1], strict=True):
            assert record == pytest.approx(expected, rel=1e-4)
        for tensor, value in runs[name][0].items():
            torch.testing.assert_close(value, runs[first][0][tensor], rtol=1e-3, atol=1e-4, msg=tensor)
    assert abs(runs["larger"][1][0]["loss"] - runs["one"][1][0]["loss"]) > 1e-3


def test_evaluation_takes_the_first_process_s_statistics(market, tmp_path, monkeypatch):
    def evaluate(network, *_):
        torch.save([*network.buffers()], tmp_path / f"{dist.get_rank()}.pt")
        return None, evaluate_ranking(np.eye(2), np.eye(2), [1, 2], [1, 2], [1, 1], [2, 2])

    monkeypatch.setattr(train, "evaluate", evaluate)
    fork(2, *market, "--epochs", 2, "--eval-every", 0, "--output", tmp_path / "run")
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(map(torch.equal, first, second))
    assert first[0].abs().min() > 0  # running means that were updated


def kill(output):
    """SIGKILL to all processes of the run that writes to output: launcher, training and reading ones."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(output) in (process / "cmdline").read_text():
                os.kill(int(process.name), signal.SIGKILL)


@pytest.mark.parametrize("processes", [0, 2])
def test_a_run_that_is_killed_and_resumed_is_the_same_run(market, tmp_path, processes):
    """SIGKILL, at a random moment of an epoch, of its end or of its checkpoint; with and without workers."""
    command = ["train.py", *market, "--epochs", 12, "--eval-every", 5]
    whole, output = tmp_path / "whole", tmp_path / "killed"
    fork(processes, *command[1:], "--output", whole) if processes else call(train, *command[1:], "--output", whole)
    arguments = [*command, "--workers", 1, "--output", output, "--resume"]
    moments = random.Random(0)
    for epochs in (0, 2, 6):
        with subprocess.Popen(**program_arguments(arguments, processes), stdout=subprocess.DEVNULL) as running:
            log = output / "log.jsonl"
            while running.poll() is None and not (log.exists() and len(log.read_text().splitlines()) >= epochs):
                time.sleep(0.01)
            time.sleep(moments.uniform(0, 0.3) if epochs else 2)
            kill(output)
    done = subprocess.run(**program_arguments(["train.py", "--output", output, "--resume"], processes))
    assert done.returncode == 0, done.stderr
    assert_same_run(output, whole)


def test_a_run_is_resumed_without_its_settings_but_not_with_others(run, tmp_path):
    output = shutil.copytree(run[0], tmp_path / "run")
    with pytest.raises(SystemExit, match="then and now: --epochs 4 and 5; --margin None and 0.5"):
        call(train, "--epochs", 5, "--margin", 0.5, "--output", output, "--resume")
    rewind(output, epochs=2)
    fork(2, "--output", output, "--resume", "--workers", 1)
    assert [record["epoch"] for record in records_of(output)] == [0, 1, 2, 3]
    assert json.loads((output / "args.json").read_text())["epochs"] == 4


def rewind(output, epochs):
    """Make a finished run one that was stopped after some epochs, as far as its history goes."""
    (output / "model.pt").unlink()
    state = torch.load(output / "last.pt", weights_only=True)
    state["history"] = state["history"][:epochs]
    torch.save(state, output / "last.pt")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_run_in_half_precision_trains_alike_and_resumes(market, run, tmp_path, precision):
    command = [*market, "--precision", precision, "--epochs", 4, "--eval-every", 0, "--output"]
    call(train, *command, tmp_path / "whole")
    losses = [[record["loss"] for record in records_of(output)] for output in (run[0], tmp_path / "whole")]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert losses[0] != losses[1]
    scaler = torch.load(tmp_path / "whole/last.pt", weights_only=True)["scaler"]
    assert ("scale" in scaler) == (precision == "fp16")

    def stop(*_):
        raise KeyboardInterrupt

    with mock.patch.object(train, "learning_rate", lambda epoch, *_: stop() if epoch == 1 else learning_rate(epoch, 4)):
        with pytest.raises(KeyboardInterrupt):
            call(train, *command, tmp_path / "stopped")
    call(train, *command, tmp_path / "stopped", "--resume")
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    assert torch.load(tmp_path / "stopped/last.pt", weights_only=True)["scaler"] == scaler


def test_checkpoints_take_a_fiftieth_of_the_time(market, tmp_path, monkeypatch):
    clock, saved = [0.0], []
    parts = {f"{b}_{part}": 1.0 for b in ("global", "local") for part in ("triplet", "cross_entropy", "accuracy")}

    def train_epoch(*_):
        clock[0] += 1
        return parts | {"loss": 4.0}

    def write_whole(path, content, write=train.write_whole):
        if path.name == "last.pt":
            saved.append(len(records_of(tmp_path)))  # as many epochs as the log has by then
            clock[0] += 0.2
        else:
            write(path, content)

    monkeypatch.setattr(train, "time", mock.Mock(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(train, "train_epoch", train_epoch)
    monkeypatch.setattr(train, "write_whole", write_whole)
    call(train, *market, "--epochs", 34, "--eval-every", 0, "--output", tmp_path)
    assert saved == [1, 11, 21, 31, 34, 34]  # after the first epoch, each 50 x 0.2 s, at the end, and once evaluated


def test_one_loader_reads_the_batches_of_all_epochs(market, tmp_path, monkeypatch):
    started, seen = [], []

    class Loader(DataLoader):
        def __iter__(self):
            started.append(self)
            return super().__iter__()

    def forward(passes, images, key, forward=Passes.forward):
        seen.append(key)
        return forward(passes, images, key)

    def losses(outputs, labels, margin):
        seen.append(labels.tolist())
        return branch_losses(outputs, labels, margin)

    monkeypatch.setattr(train, "DataLoader", Loader)
    monkeypatch.setattr(Passes, "forward", forward)
    monkeypatch.setattr(train, "branch_losses", losses)
    flags = ["--ids-per-batch", 2, "--seed", 7, "--epochs", 3, "--eval-every", 0]
    call(train, *market, *flags, "--output", tmp_path)
    assert len(started) == 1  # it need not stop between epochs
    assert seen[::2] == [(7, epoch, step) for epoch in range(3) for step in range(2)]
    labels = data.read_split(market[3] / "market1501/bounding_box_train").labels
    sampler, expected = IdentitySampler(labels, 2, 2, seed=7), []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        expected += [labels[batch].tolist() for batch in sampler]
    assert seen[1::2] == expected


def test_a_run_is_not_overwritten(market, run, tmp_path):
    output, _ = run
    with pytest.raises(SystemExit, match="holds a run; go on with it by --resume, or choose another folder"):
        call(train, *market, "--output", output)
    with pytest.raises(SystemExit, match="nowhere holds no run to go on with"):
        call(train, "--output", tmp_path / "nowhere", "--resume")
    (tmp_path / "args.json").write_text("{}")  # of a run before its first checkpoint
    with pytest.raises(SystemExit, match="holds a run"):
        call(train, *market, "--output", tmp_path)
    shutil.copy(output / "model.pt", tmp_path)
    with pytest.raises(SystemExit, match="has model.pt, but not all before it"):
        call(train, *market, "--output", tmp_path, "--resume")


def test_evaluate_prints_the_runs_own_figures(run, capsys):
    output, printed = run
    call(evaluate, output, "--workers", 0)
    lines = capsys.readouterr().out.splitlines()
    assert printed.split("trained    ")[-1].splitlines()[0].strip() in lines[-1]
    assert max(map(len, lines[:-1])) <= 80


@pytest.mark.parametrize(("stop", "code"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 1)])
def test_a_run_that_is_stopped_can_go_on(market, tmp_path, stop, code):
    output = tmp_path / "run"
    command = ["train.py", *market, "--epochs", 5000, "--workers", 1, "--output", output]
    running = subprocess.Popen(**program_arguments(command), stdout=subprocess.DEVNULL, start_new_session=True)
    while running.poll() is None and not (output / "last.pt").exists():
        time.sleep(0.05)
    os.killpg(running.pid, stop)  # with its workers, as terminals and schedulers do
    _, error = running.communicate()
    assert running.returncode == code
    assert error == ("" if stop == signal.SIGTERM else "stopped; the same command with --resume goes on\n")
    assert torch.load(output / "last.pt", weights_only=True)["history"]


def test_a_full_disk_keeps_the_checkpoint_before(run, tmp_path):
    output = shutil.copytree(run[0], tmp_path / "run")
    rewind(output, epochs=3)
    before = (output / "last.pt").read_bytes()
    limit = len(before) // 2  # bytes of any file
    done = subprocess.run(
        **program_arguments(["train.py", "--output", output, "--resume"]),
        stdout=subprocess.PIPE,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: cannot write {output / 'last.pt'}: "), done.stderr
    assert done.stderr.count("\n") == 1
    assert (output / "last.pt").read_bytes() == before
    assert not list(output.glob("*.tmp"))


def test_one_process_tells_what_is_wrong(market, tmp_path):
    """Before training by the first process, and in training by the one that meets it."""
    flags = ["--dataset", "market1501", "--data-dir", tmp_path, *market[4:], "--output", tmp_path / "run"]
    folder = draw_market(tmp_path / "market1501") / "bounding_box_train"
    for path in folder.glob("0001*"):
        path.write_text("not an image")
    for more, message in (
        (["--ids-per-batch", 3], "error: 3 identities a batch cannot be shared among 2 processes alike"),
        (["--epochs", "x"], "train.py: error: argument --epochs: invalid int value: 'x'"),
        (["--workers", 1], "error: cannot read the image"),
    ):
        done = subprocess.run(**program_arguments(["train.py", *flags, *more], 2), stdout=subprocess.PIPE)
        assert done.returncode != 0
        assert done.stderr.count("error: ") - done.stderr.count("SignalException") >= 1
        assert [line for line in done.stderr.splitlines() if message in line], done.stderr
        assert "Connection closed" not in done.stderr
        assert done.stderr.count(message) == 1
        shutil.rmtree(tmp_path / "run", ignore_errors=True)


def test_bad_launches_are_told_before_anything_is_written(market, tmp_path):
    output = tmp_path / "run"
    for more, message in {
        ("--data-dir", tmp_path / "nowhere"): "market1501 is not there",
        ("--ids-per-batch", 8): "4 identities, a batch takes 8",
        ("--images-per-pass", 3): r"--images-per-pass 3 does not divide the 8 images of a process \(4 x 2 over 1\)",
        ("--images-per-pass", 1): "--images-per-pass 1 ",
        ("--ids-per-batch", 1, "--images-per-id", 1): "does not divide the 1 images",
        ("--output", "/proc/nowhere"): "/proc/nowhere",
    }.items():
        with pytest.raises((DataError, SystemExit, OSError), match=message):
            call(train, *market, "--output", output, *more)
    with pytest.raises(WeightsError, match="none.pth: No such file"):
        with mock.patch.object(sys, "argv", ["train.py", *map(str, market), "--weights", "none.pth"]):
            train.main()
    assert not output.exists()


def test_a_share_smaller_than_a_pass_is_one_pass(market, tmp_path, capsys):
    call(train, *market, "--images-per-pass", 32, "--epochs", 1, "--eval-every", 0, "--output", tmp_path)
    assert "float32, 8 images a pass" in capsys.readouterr().out


def test_training_on_real_data_without_a_gpu_is_told(market, tmp_path, capsys, monkeypatch):
    def init():
        raise RuntimeError("The driver is too old.\nUpdate it.")

    monkeypatch.setattr(torch.cuda, "init", init)
    call(train, *market, "--epochs", 1, "--eval-every", 0, "--output", tmp_path)
    assert capsys.readouterr().out.splitlines()[0].endswith(": The driver is too old.")


def test_queries_without_any_match_are_told_before_training(tmp_path):
    for split in data.FOLDERS.values():
        touch(tmp_path / "market1501" / split, "0001_c1s1_000001_00.jpg", "0002_c1s1_000001_00.jpg")
    with pytest.raises(DataError, match="no query has a true match under another camera"):
        load_dataset("market1501", tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run(market, tmp_path):
    with pytest.raises(SystemExit, match="epoch 0 ends with a loss of .* and weights of norm (nan|inf)"):
        call(train, *market, "--lr", 1e39, "--epochs", 9, "--eval-every", 0, "--output", tmp_path)
    assert not (tmp_path / "last.pt").exists()  # the loss was finite still: it is of before the step


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["runs/b", "--time"], "take one RUN"),
        (["--time", "--attention", "a.png"], "argument --attention: not allowed with argument --time"),
        (["--curves", "a.png", "--features", "a.npz"], "do not go with --time, --attention or --curves"),
        (["--query", "a.jpg"], "--query and --gallery go together"),
        (["--gallery", "photos"], "--query and --gallery go together"),
        (["--query", "a.jpg", "--gallery", "photos", "--dataset", "toy"], "leave out --dataset"),
        (["--ranking", "a.gif"], "a.gif: must end in .png"),
        (["--features", "nowhere/a.npz"], "nowhere/a.npz: must end in .npz and lie in a folder that exists"),
    ],
)
def test_flags_of_evaluate_that_exclude_each_other_are_told(flags, message, capsys):
    with pytest.raises(SystemExit):
        call(evaluate, "runs/a", *flags)
    assert message in capsys.readouterr().err


def test_a_process_without_a_gpu_of_its_own_is_told(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(SystemExit, match="no GPU 3: here are 2"):
        train.start_process()


def test_a_full_gpu_is_told_in_pytorchs_words(monkeypatch, market, tmp_path):
    command = ["train.py", *map(str, market), "--output", str(tmp_path)]
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
    with mock.patch.object(sys, "argv", command), mock.patch.object(Tiny, "forward", side_effect=error):
        with mock.patch("model.SONANet", Tiny), pytest.raises(SystemExit, match="2 GiB. Train with --recompute"):
            runpy.run_path(str(HERE / "train.py"), run_name="__main__")


def test_a_collapsed_run_is_told_once_from_the_end_of_the_warm_up(monkeypatch, market, tmp_path, capsys):
    branch = {"triplet": math.log(2), "cross_entropy": math.log(4), "accuracy": 0.25}
    parts = {f"{name}_{key}": value for name in ("global", "local") for key, value in branch.items()}
    monkeypatch.setattr(train, "train_epoch", lambda *_: parts | {"loss": 2 * (math.log(2) + math.log(4))})
    call(train, *market, "--epochs", 16, "--eval-every", 0, "--output", tmp_path)
    lines = capsys.readouterr().out.splitlines()
    (note,) = [i for i, line in enumerate(lines) if "collapsed to one embedding" in line]
    assert lines[note - 1].split()[0] == "2"  # of 16 epochs, two are warm-up


def test_bad_checkpoints_and_runs_are_told_and_never_executed(run, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    whole = (run[0] / "last.pt").read_bytes()
    shutil.copy(run[0] / "args.json", tmp_path)
    torch.save({"settings": Evil()}, tmp_path / "evil.pt")
    torch.save({"num_classes": 4}, tmp_path / "part.pt")
    others = [(tmp_path / name).read_bytes() for name in ("evil.pt", "part.pt")]
    for content in (whole[: len(whole) // 2], b"", *others):
        (tmp_path / "last.pt").write_bytes(content)
        with pytest.raises(SystemExit, match="last.pt is damaged or no checkpoint"):
            call(train, "--output", tmp_path, "--resume")
        assert (tmp_path / "last.pt").read_bytes() == content
        with pytest.raises(WeightsError, match="its training has not ended"):
            evaluate.load_run(tmp_path)
        (tmp_path / "model.pt").write_bytes(content)
        with pytest.raises(WeightsError, match="model.pt is damaged"):
            evaluate.load_run(tmp_path)
        (tmp_path / "model.pt").unlink()
    assert not (tmp_path / "executed").exists()
    (tmp_path / "args.json").write_text('{"epochs": ')
    with pytest.raises(SystemExit, match="args.json is damaged"):
        call(train, "--output", tmp_path, "--resume")
    with pytest.raises(WeightsError, match="not the folder of a finished run"):
        evaluate.load_run(tmp_path / "nowhere")
    state = torch.load(run[0] / "model.pt", weights_only=True)
    torch.save(state | {"settings": state["settings"] | {"sona": "mine"}}, tmp_path / "model.pt")
    with pytest.raises(WeightsError, match="model.pt: sona is 'mine'; choose from"):
        evaluate.load_run(tmp_path)
    with pytest.raises(SystemExit, match="knows 4 identities, the training set has 5"):
        load_checkpoint(run[0] / "last.pt", 5)


def test_several_runs_have_a_mean_and_a_standard_deviation(market, run, tmp_path, capsys):
    output, _ = run
    call(train, *market, "--epochs", 4, "--eval-every", 0, "--seed", 1, "--output", tmp_path / "seed1")
    capsys.readouterr()
    call(evaluate, output, tmp_path / "seed1", "--workers", 0)
    lines = capsys.readouterr().out.splitlines()[-4:]
    first, second, mean, deviation = ([float(x) for x in line.split()[-7::2]] for line in lines)
    np.testing.assert_allclose(mean, np.mean([first, second], 0), atol=0.011)
    np.testing.assert_allclose(deviation, np.abs(np.subtract(first, second)) / 2, atol=0.011)  # population, of two

    call(train, *market, "--epochs", 1, "--eval-every", 0, "--sona", "3", "--output", tmp_path / "other")
    with pytest.raises(SystemExit, match="not runs of one configuration.*--sona 2 and 3; --epochs 4 and 1"):
        call(evaluate, output, tmp_path / "other")


def test_a_data_set_is_ranked_drawn_and_saved(run, tmp_path, capsys):
    output, _ = run
    pictures = [tmp_path / "ranking.png", tmp_path / "attention.png"]
    call(evaluate, output, "--workers", 0, "--ranking", pictures[0], "--features", tmp_path / "features.npz")
    printed = capsys.readouterr().out
    assert f"wrote {pictures[0]}" in printed
    call(evaluate, output, "--attention", pictures[1])
    assert Image.open(pictures[0]).size == (11 * 110 + 4 + 420, 10 * 240 + 4 + 28)
    assert Image.open(pictures[1]).size == (6 * 110 + 4, 2 * 3 * 240 + 4 + 28)  # three people, two views each
    saved = np.load(tmp_path / "features.npz", allow_pickle=False)
    assert saved["query_features"].shape == (6, 16)
    assert saved["gallery_features"].shape == (12, 16)
    assert saved["gallery_ids"].tolist() == sorted([50, 51, 52] * 4)
    assert saved["query_paths"][0].endswith("0050_c1s1_000000_00.jpg")
    ranking = evaluate_ranking(*(saved[f"{s}_{k}"] for k in ("features", "ids", "cams") for s in ("query", "gallery")))
    assert evaluate.summary(ranking.figures()) in printed


def test_your_own_photos_are_ranked(run, tmp_path, capsys):
    output = shutil.copytree(run[0], tmp_path / "run")
    for person in range(3):
        (tmp_path / "album" / f"{person}").mkdir(parents=True)
        data.draw_pedestrian(person, 1, 0).save(tmp_path / "album" / f"{person}" / "a b.jpg")
    data.draw_pedestrian(1, 1, 0).save(tmp_path / "album/1/c.webp", lossless=True)
    for other in ("._a b.jpg", "notes.txt"):  # the first as a Mac leaves it
        (tmp_path / "album/1" / other).touch()
    query = tmp_path / "album/1/a b.jpg"
    call(evaluate, output, "--query", query, "--gallery", tmp_path / "album", "--workers", 0)
    passed_over, asked, *found, wrote = capsys.readouterr().out.splitlines()
    assert passed_over.startswith(f"{tmp_path / 'album'}: 2 files are no images")
    assert asked == str(query)
    assert found[0].split(maxsplit=1) == ["0.000", str(query)]
    distances = [float(line.split()[0]) for line in found]
    assert distances == sorted(distances)
    assert len(found) == 4
    assert wrote == f"wrote {output / 'ranking.png'}"
    call(evaluate, output, "--attention", tmp_path / "attention.png", "--query", query, query)
    assert Image.open(tmp_path / "attention.png").size == (6 * 110 + 4, 2 * 240 + 4 + 28)


def test_time_prints_a_ratio(run, capsys):
    call(evaluate, run[0], "--time")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["32", "1", "32"]
    assert max(map(len, lines)) <= 80


def test_an_image_that_cannot_be_read_ends_training_with_one_line(market, tmp_path):
    folder = draw_market(tmp_path / "market1501") / "bounding_box_train"
    (folder / "0001_c1s1_000000_00.jpg").write_text("not an image")
    arguments = [*market, "--images-per-id", 4, "--data-dir", tmp_path, "--workers", 1]
    with pytest.raises(DataError) as error:
        call(train, *arguments, "--output", tmp_path / "run")
    message = evaluate.one_line(error.value)
    assert message.startswith(f"cannot read the image {folder / '0001_c1s1_000000_00.jpg'}: "), message


def test_a_final_evaluation_that_fails_loses_no_epoch(monkeypatch, market, tmp_path):
    arguments = [*market, "--epochs", 1, "--eval-every", 0, "--output", tmp_path]
    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", lambda *_: data.read_image("gone.jpg"))
        with pytest.raises(DataError, match="gone.jpg"):
            call(train, *arguments)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["history"][0]["epoch"] == 0
    call(train, *arguments, "--resume")
    assert "mean_ap" in records_of(tmp_path)[0]


def test_the_compiled_network_is_one_graph_with_the_same_losses():
    network, images, labels = SONANet(4, "2+3"), torch.randn(4, 3, 32, 16), torch.tensor([0, 0, 1, 1])
    nn.init.normal_(network.sona2.p.weight, std=0.1)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")  # fails where the graph breaks
    losses = []
    for module in (network, compiled):
        torch.manual_seed(1)
        losses.append(branch_losses(module(images), labels)[0].item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_compiled_run_of_two_processes_is_the_run_without(monkeypatch, market, tmp_path):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # needs no compiler
    for name, flags in {"plain": [], "compiled": ["--compile", "--recompute"]}.items():
        fork(2, *market, "--images-per-pass", 2, *flags, "--epochs", 1, "--eval-every", 0, "--output", tmp_path / name)
    losses = [records_of(tmp_path / name)[0]["loss"] for name in ("plain", "compiled")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


# ---------------------------------------------------------------------------------------------------
# README, and copying


def test_readmes_python_runs_as_it_stands(market, run, tmp_path, monkeypatch):
    """Each block, where its runs and photos are; what stands inside a file of ours finds that file's names."""
    for name in ("cuhk03", "toy"):
        shutil.copytree(run[0], tmp_path / "runs" / name)
    data.draw_pedestrian(1, 1, 0).save(tmp_path / "a.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "SONANet", Tiny)
    monkeypatch.setattr(data, "load_dataset", lambda *_: load_dataset("market1501", market[3]))
    within = {"losses": {}, "branch": "global", "embedding": torch.ones(2, 4), **vars(data), **vars(model)}
    blocks = re.findall(r"^```python\n(.*?)^```$", (HERE / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    with mock.patch.dict(PLACEMENTS), mock.patch.dict(DATASETS):
        for block in blocks:
            exec(block, dict(within))
        for name in ("first-order", "scaled"):
            assert SONANet(4, name).eval()(torch.rand(1, 3, 32, 16)).shape == (1, 1536)
        assert DATASETS["mine"].counts["train"] == (12000, 700)
    embedding = torch.export.load(tmp_path / "sona.pt2").module()(images := torch.rand(3, 3, 32, 16))
    torch.testing.assert_close(embedding, evaluate.load_run("runs/cuhk03")[0](images))


@pytest.mark.parametrize(
    "file, use",
    [
        ("model.py", "assert SONANet(5).eval()(torch.rand(1, 3, 64, 32)).shape == (1, 1536)"),
        ("losses.py", "assert batch_hard_triplet_loss(torch.eye(4), torch.tensor([0, 0, 1, 1])) > 0"),
        ("data.py", "assert len(list(IdentitySampler(load_dataset('toy', '.')['train'].labels))) == 2"),
    ],
)
def test_a_file_works_when_copied_alone(tmp_path, file, use):
    shutil.copy(HERE / file, tmp_path)
    run_alone(f"from {file[:-3]} import *\n{use}", tmp_path)


def test_the_ranking_works_when_copied_alone_with_numpy(tmp_path):
    source = "".join(map(inspect.getsource, (evaluate.Ranking, evaluate_ranking)))
    ranking = "evaluate_ranking(np.eye(2), np.eye(2), [1, 2], [1, 2], [1, 1], [2, 2])"
    imports = "import sys\nfrom typing import NamedTuple\nimport numpy as np\n"
    run_alone(f"{imports}{source}assert {ranking}.mean_ap == 1 and 'torch' not in sys.modules", tmp_path)


def run_alone(code, folder):
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":  # python test_model.py train.py ...: the program with Tiny in SONANet's place
    model.SONANet = evaluate.SONANet = Tiny
    sys.argv = sys.argv[1:]
    runpy.run_path(str(HERE / sys.argv[0]), run_name="__main__")
