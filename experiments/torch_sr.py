"""RLFN and IMDN in PyTorch, written from their papers, with tensors named as published: the peer of parity tests and timings.

Needs the extra `parity`.
"""

import torch
from torch import nn
from torch.nn import functional as F


def same(inputs: int, outputs: int, kernel: int = 3) -> nn.Conv2d:
    """Convolution that keeps the size."""
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)


def act(x: torch.Tensor) -> torch.Tensor:
    """LeakyReLU of slope 0.05."""
    return F.leaky_relu(x, 0.05)


class Attention(nn.Module):
    """Enhanced spatial attention with one pooled convolution."""

    def __init__(self, channels: int, features: int = 16):
        super().__init__()
        self.conv1, self.conv_f = same(channels, features, 1), same(features, features, 1)
        self.conv2, self.conv3 = nn.Conv2d(features, features, 3, stride=2), same(features, features)
        self.conv4 = same(features, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Masked features."""
        full = self.conv1(x)
        low = self.conv3(F.max_pool2d(self.conv2(full), kernel_size=7, stride=3))
        low = F.interpolate(low, size=x.shape[2:], mode="bilinear", align_corners=False)
        return x * torch.sigmoid(self.conv4(low + self.conv_f(full)))


class ResidualBlock(nn.Module):
    """RLFB."""

    def __init__(self, channels: int, mid: int):
        super().__init__()
        self.c1_r, self.c2_r, self.c3_r = same(channels, mid), same(mid, mid), same(mid, channels)
        self.c5, self.esa = same(channels, channels, 1), Attention(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features of the same shape."""
        return self.esa(self.c5(act(self.c3_r(act(self.c2_r(act(self.c1_r(x)))))) + x))


class RLFN(nn.Module):
    """RLFN."""

    def __init__(self, channels: int, mid: int, blocks: int, scale: int):
        super().__init__()
        self.conv_1, self.conv_2 = same(3, channels), same(channels, channels)
        self.blocks = [f"block_{i + 1}" for i in range(blocks)]
        for name in self.blocks:
            self.add_module(name, ResidualBlock(channels, mid))
        self.upsampler = nn.Sequential(same(channels, 3 * scale**2), nn.PixelShuffle(scale))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The upscaled image."""
        head = y = self.conv_1(x)
        for name in self.blocks:
            y = getattr(self, name)(y)
        return self.upsampler(self.conv_2(y) + head)


class DistillationBlock(nn.Module):
    """IMDB of 64 channels."""

    def __init__(self):
        super().__init__()
        layer = lambda inputs: nn.Sequential(same(inputs, 64), nn.LeakyReLU(0.05))
        self.conv1, self.conv2, self.conv3 = layer(64), layer(48), layer(48)
        self.conv4, self.conv1x1 = same(48, 16), same(64, 64, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features of the same shape."""
        distilled, rest = [], x
        for layer in (self.conv1, self.conv2, self.conv3):
            part, rest = torch.split(layer(rest), (16, 48), dim=1)
            distilled.append(part)
        return x + self.conv1x1(torch.cat([*distilled, self.conv4(rest)], dim=1))


class Skip(nn.Module):
    """x + modules(x)."""

    def __init__(self, *modules: nn.Module):
        super().__init__()
        self.sub = nn.Sequential(*modules)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features of the same shape."""
        return x + self.sub(x)


class IMDN(nn.Module):
    """The baseline of NTIRE 2022, x4."""

    def __init__(self):
        super().__init__()
        trunk = Skip(*(DistillationBlock() for _ in range(8)), same(64, 64))
        self.model = nn.Sequential(same(3, 64), trunk, same(64, 48))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The upscaled image."""
        return F.pixel_shuffle(self.model(x), 4)
