# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors of SONA-Net in plain PyTorch
"""The network of SONA-Net, for person re-identification (Xia et al., ICCV 2019).

Fig. 2:
    images (B, 3, 384, 128)
      -> ResNet-50, stages 3 and 4 dilated              (B, 2048, 48, 16)    Sec. 2.1
         with SONA after stage 2, stage 3 or both                            Sec. 2.2, Eq. 1-3
      -> global branch: average pool, reduce            (B,  512)
      -> local branch:  bottleneck, DropBlock+,
                        max pool, reduce                (B, 1024)

Usage:
    network = SONANet(num_classes=767, weights="imagenet")  # or None, for random weights
    global_embedding, global_logits = network.train()(images)["global"]     # and "local"
    embedding = network.eval()(images)                                      # (B, 1536)
"""

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import ResNet50_Weights, resnet50
from torchvision.models.resnet import Bottleneck, ResNet


class SONA(nn.Module):
    """Second-order non-local attention: a residual block, (B, C, H, W) -> (B, C, H, W) (Sec. 2.2).

    Every position attends to every other by the covariance of their d = C / r features,

        Sigma = theta(x) I_bar theta(x)^T,    I_bar = (I - 11^T / d) / d             (1)
        z = softmax(Sigma / sqrt(d)) g(x)                                            (2)
        SONA(x) = x + p(z)                                                           (3)

    I - 11^T / d is symmetric and idempotent: it subtracts a vector's own mean. With theta_c = theta
    minus its mean over channels, Sigma = theta_c theta_c^T / d, so Eq. 2 is scaled-dot-product
    attention with query = key = theta_c, value = g(x) and scale d^-1.5. It needs no (HW, HW) matrix
    in memory.
    """

    def __init__(self, channels: int, reduction: int = 2) -> None:
        super().__init__()
        reduced = channels // reduction  # d
        self.scale = reduced**-1.5  # 1 / d of Eq. 1 times 1 / sqrt(d) of Eq. 2
        # Not in the paper: LeakyReLU's slope, 0.01; g and p bare, without batch norm or activation.
        self.theta = nn.Sequential(
            nn.Conv2d(channels, reduced, 1, bias=False),
            nn.BatchNorm2d(reduced),
            nn.LeakyReLU(0.01),
        )
        self.g = nn.Conv2d(channels, reduced, 1)
        self.p = nn.Conv2d(reduced, channels, 1)
        # Not in the paper: p starts at zero, so that SONA starts as the identity.
        nn.init.zeros_(self.p.weight)
        nn.init.zeros_(self.p.bias)

    @staticmethod
    def tokens(x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, HW, C), channels contiguous as the fused attention kernels require.

        Makes no copy if the map is already channels-last.
        """
        return x.flatten(2).transpose(1, 2).contiguous()

    def centred_theta(self, x: Tensor) -> Tensor:
        """theta_c: (B, C, H, W) -> (B, HW, d)."""
        theta = self.tokens(self.theta(x))
        return theta - theta.mean(2, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        theta_c = self.centred_theta(x)[:, None]  # (B, 1 head, HW, d)
        g = self.tokens(self.g(x))[:, None]
        z = F.scaled_dot_product_attention(theta_c, theta_c, g, scale=self.scale)
        z = z[:, 0].transpose(1, 2).unflatten(2, x.shape[2:])  # (B, d, H, W)
        return x + self.p(z)

    def attention(self, x: Tensor) -> Tensor:
        """The softmax of Eq. 2, (B, HW, HW), rows summing to 1, to view in eval mode (Fig. 3)."""
        theta_c = self.centred_theta(x)
        return (theta_c @ theta_c.transpose(1, 2) * self.scale).softmax(2)


class DropBlockPlus(nn.Module):
    """DropBlock with separate block height and width: (B, C, H, W) -> same (Sec. 2.1, 3.2).

    drop_rate is the paper's gamma, 0.1. Not in the paper: it is read as the share of positions that
    would be dropped if no blocks overlapped. DropBlock's own gamma is the rate at which blocks are
    drawn; at 0.1, that would drop 78 % of the map.

    Also not in the paper: blocks lie inside the map, and one larger than the map is clipped to it.
    All channels of an image share one mask. What remains is divided by the mean of all masks in
    the pass. Identity in eval mode.
    """

    def __init__(self, drop_rate: float = 0.1, block_height: int = 5, block_width: int = 8) -> None:
        super().__init__()
        self.drop_rate = drop_rate
        self.block_height = block_height
        self.block_width = block_width

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        height, width = x.shape[2:]
        block_height = min(self.block_height, height)
        block_width = min(self.block_width, width)
        # A block lies inside the map: its corner, at the top left, has rows x columns positions. At
        # corner_rate, as many blocks are dropped as would cover drop_rate of the map if none
        # overlapped (Ghiasi et al. 2018, Eq. 1).
        rows = height - block_height + 1
        columns = width - block_width + 1
        expected_blocks = self.drop_rate * (height * width) / (block_height * block_width)
        corner_rate = expected_blocks / (rows * columns)
        corners = torch.rand(len(x), 1, rows, columns, device=x.device) < corner_rate
        # A position is dropped if a corner lies less than a block's size above and left of it.
        padding = (block_width - 1, block_width - 1, block_height - 1, block_height - 1)
        corners = F.pad(corners.float(), padding)  # left, right, top, bottom
        dropped = F.max_pool2d(corners, (block_height, block_width), stride=1)
        mask = 1 - dropped  # (B, 1, H, W)
        mask = mask / mask.mean().clamp(min=1e-6)  # the clamp: all positions may be dropped
        return x * mask.to(x.dtype)


class BatchDropBlock(nn.Module):
    """BFE's drop layer: (B, C, H, W) -> same (BL+BFE, Sec. 3.4).

    Not in the paper: one rectangle for all images of a pass. The ratios are its height
    and width as shares of the map's, rounded down to positions. Identity in eval mode.
    """

    def __init__(self, height_ratio: float, width_ratio: float) -> None:
        super().__init__()
        self.height_ratio = height_ratio
        self.width_ratio = width_ratio

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        height, width = x.shape[2:]
        block_height = int(self.height_ratio * height)
        block_width = int(self.width_ratio * width)
        top = torch.randint(height - block_height + 1, (1,), device=x.device)
        left = torch.randint(width - block_width + 1, (1,), device=x.device)
        row = torch.arange(height, device=x.device)[:, None]
        column = torch.arange(width, device=x.device)
        rows = (top <= row) & (row < top + block_height)  # (H, 1)
        columns = (left <= column) & (column < left + block_width)  # (W,)
        return x.masked_fill(rows & columns, 0)  # mask: (H, W)


# What follows stage 2, stage 3, or stage 4 on a branch (Sec. 3.3, 3.4): SONA, or another class that
# is called with the number of channels.
PLACEMENTS = {
    "none": {},
    "2": {"stage2": SONA},
    "3": {"stage3": SONA},
    "2+3": {"stage2": SONA, "stage3": SONA},
    "4-global": {"global": SONA},
    "4-local": {"local": SONA},
    "4-both": {"global": SONA, "local": SONA},  # not in the paper: a separate module on each branch
}

# The local branch's drop layer: BL, BL+DB, BL+DB+ and BL+BFE (Table 5).
# Not in the paper: BL+DB's blocks of 7 x 7 and its one mask for all channels (the original has one
# for each); BL+BFE's ratios, those of BFE's code of early 2019.
DROPS = {
    "none": nn.Identity,
    "dropblock": partial(DropBlockPlus, block_height=7, block_width=7),
    "dropblock+": DropBlockPlus,
    "bfe": partial(BatchDropBlock, height_ratio=0.2, width_ratio=1),
}


class SONANet(nn.Module):
    """The network of Fig. 2.

    sona     where SONA is inserted, a key of PLACEMENTS
    drop     the local branch's drop layer, a key of DROPS
    weights  to start from: None, "imagenet", or a path: a ResNet-50's state dict, or a run's
             last.pt. Classifiers are not loaded

    Input: (B, 3, height, width) floats, normalised by ImageNet's mean and standard deviation.
    In training mode returns {"global": (embedding (B, 512), logits (B, num_classes)),
    "local": (embedding (B, 1024), logits)}; in eval mode the two embeddings concatenated,
    (B, 1536). The paper's test embedding is the mean over an image and its mirror image (Sec. 3.2).

    Usually faster with its parameters in torch.channels_last format.
    """

    def __init__(
        self,
        num_classes: int,
        sona: str = "2",
        drop: str = "dropblock+",
        weights: str | Path | None = None,
    ) -> None:
        super().__init__()
        placement = PLACEMENTS[sona]

        def sona_after(place: str, channels: int) -> nn.Module:
            return placement[place](channels) if place in placement else nn.Identity()

        backbone = dilated_resnet50()
        self.stem = nn.Sequential(backbone.conv1, backbone.bn1, backbone.relu, backbone.maxpool)
        self.stage1 = backbone.layer1
        self.stage2 = backbone.layer2
        self.stage2_sona = sona_after("stage2", 512)
        self.stage3 = backbone.layer3
        self.stage3_sona = sona_after("stage3", 1024)
        self.stage4 = backbone.layer4

        # Not in the paper: new layers keep PyTorch's initialisation, except SONA's p and the
        # classifiers. On the local branch, SONA comes before the bottleneck, which has no dilation.
        self.global_sona = sona_after("global", 2048)
        self.global_reduction = feature_reduction(2048, 512)
        self.local_sona = sona_after("local", 2048)
        self.local_bottleneck = Bottleneck(2048, 512)  # 2048 -> 512 -> 2048 channels
        self.drop = DROPS[drop]()
        self.local_reduction = feature_reduction(2048, 1024)
        # Not in the paper: deviation 0.001, so that cross-entropy starts near ln(num_classes).
        self.global_classifier = nn.Linear(512, num_classes)
        self.local_classifier = nn.Linear(1024, num_classes)
        for classifier in (self.global_classifier, self.local_classifier):
            nn.init.normal_(classifier.weight, std=0.001)
            nn.init.zeros_(classifier.bias)

        if weights is not None:  # the stages above are the backbone's own: loading it loads them
            load_initial_weights(self, backbone, weights)

    def forward(self, images: Tensor) -> Tensor | dict[str, tuple[Tensor, Tensor]]:
        x = self.stage1(self.stem(images))  # (B, 256, H/4, W/4)
        x = self.stage2_sona(self.stage2(x))  # (B, 512, H/8, W/8)
        x = self.stage3_sona(self.stage3(x))  # (B, 1024, H/8, W/8)
        x = self.stage4(x)  # (B, 2048, H/8, W/8)

        average = F.adaptive_avg_pool2d(self.global_sona(x), 1)  # (B, 2048, 1, 1)
        global_embedding = self.global_reduction(average)  # (B, 512)

        y = self.drop(self.local_bottleneck(self.local_sona(x)))  # (B, 2048, H/8, W/8)
        maximum = y.amax((2, 3), keepdim=True)  # (B, 2048, 1, 1); equal maxima share the gradient
        local_embedding = self.local_reduction(maximum)  # (B, 1024)

        if not self.training:
            return torch.cat([global_embedding, local_embedding], 1)  # Sec. 2.1
        return {
            "global": (global_embedding, self.global_classifier(global_embedding)),
            "local": (local_embedding, self.local_classifier(local_embedding)),
        }


def feature_reduction(channels: int, reduced: int) -> nn.Sequential:
    """The feature reduction of both branches: (B, channels, 1, 1) -> (B, reduced) (Sec. 2.1)."""
    return nn.Sequential(
        nn.Conv2d(channels, reduced, 1, bias=False),
        nn.BatchNorm2d(reduced),
        nn.ReLU(),
        nn.Flatten(),
    )


def dilated_resnet50() -> ResNet:
    """ResNet-50 without classifier; stages 3 and 4 keep stage 2's stride-8 map (Sec. 2.1).

    Not in the paper: the dilation, 2 in stage 3 and 4 in stage 4 (half that in each stage's first
    block); without weights, residual branches start at zero.
    """
    backbone = resnet50(replace_stride_with_dilation=[False, True, True], zero_init_residual=True)
    backbone.fc = nn.Identity()
    return backbone


def load_initial_weights(network: SONANet, backbone: ResNet, weights: str | Path) -> None:
    """Loads a ResNet-50's weights into the backbone, or a run's into the network.

    Classifiers are left out.
    """
    if weights == "imagenet":  # not in the paper: which ImageNet weights; V1 are of its time
        state = ResNet50_Weights.IMAGENET1K_V1.get_state_dict(check_hash=True, weights_only=True)
    else:
        state = torch.load(weights, map_location="cpu", weights_only=True)
    if "network" in state:  # last.pt, whose classifiers are of other identities
        own = network.state_dict()
        classifiers = {name: own[name] for name in own if "_classifier." in name}
        network.load_state_dict(state["network"] | classifiers)
    else:
        state = {name: x for name, x in state.items() if not name.startswith("fc.")}
        backbone.load_state_dict(state)
