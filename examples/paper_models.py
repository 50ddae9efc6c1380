"""The networks of the SWA paper for images of 28x28 or 32x32: VGG-16, pre-activation ResNets and a Wide ResNet.

Written from the papers: Simonyan & Zisserman 2015, He et al. 2016 (identity mappings; blocks of two convolutions at
every depth), Zagoruyko & Komodakis 2016.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.functional import relu

__all__ = ["MODELS", "preresnet", "vgg16", "wide_resnet"]

VGG16_WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class PreActivation(nn.Module):
    """x + conv(relu(bn(conv(relu(bn(x)))))), with x projected where its shape changes."""

    def __init__(self, channels_in: int, channels: int, stride: int):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(channels_in), nn.BatchNorm2d(channels)
        self.conv1 = convolution(channels_in, channels, stride)
        self.conv2 = convolution(channels, channels)
        same = stride == 1 and channels_in == channels
        self.project = None if same else nn.Conv2d(channels_in, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = relu(self.norm1(x))
        residual = self.conv2(relu(self.norm2(self.conv1(activated))))
        return residual + (x if self.project is None else self.project(activated))


def convolution(channels_in: int, channels: int, stride: int = 1) -> nn.Conv2d:
    """3x3 without a bias, which a following BatchNorm would take out."""
    return nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)


def preresnet(
    depth: int, channels: int, classes: int, *, width: int = 16, first_stride: int = 1
) -> nn.Sequential:
    """Depth 6n + 2: three stages of n blocks with ``width``, 2 and 4 times ``width`` channels."""
    blocks, rest = divmod(depth - 2, 6)
    if rest or blocks < 1:
        raise ValueError(f"a ResNet of this kind has 8, 14, 20, … layers, not {depth}")
    layers: list[nn.Module] = [convolution(channels, 16, first_stride)]
    channels_in = 16
    for stage in range(3):
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            layers.append(PreActivation(channels_in, width << stage, stride))
            channels_in = width << stage
    return with_head(layers, channels_in, classes)


def wide_resnet(depth: int, widening: int, channels: int, classes: int) -> nn.Sequential:
    """Depth 6n + 4, as its authors count the projections: WRN-28-10 has 28 layers and 160, 320, 640 channels."""
    return preresnet(depth - 2, channels, classes, width=16 * widening)


def with_head(layers: list[nn.Module], width: int, classes: int) -> nn.Sequential:
    """The last BatchNorm, the mean over the image, and the classifier."""
    head = [
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, classes),
    ]
    return nn.Sequential(*layers, *head)


def vgg16(channels: int, classes: int) -> nn.Sequential:
    """Thirteen convolutions and three linear layers with dropout, without BatchNorm, as the SWA paper trains it."""
    layers: list[nn.Module] = []
    for widths in VGG16_WIDTHS:
        for width in widths:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2, ceil_mode=True))  # 28 pixels halve five times as 32 do
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    for _ in range(2):
        layers += [nn.Dropout(), nn.Linear(512, 512), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(512, classes))
    for layer in model:
        if isinstance(
            layer, nn.Conv2d
        ):  # torch's own start is too small for so many layers without BatchNorm
            nn.init.kaiming_normal_(layer.weight, mode="fan_out")
    return model


# Name to a function of image channels and classes.
MODELS: dict[str, Callable[[int, int], nn.Sequential]] = {
    "vgg16": vgg16,
    # Of no paper, for two cores: half the width, and the first convolution halves the image.
    "preresnet8": lambda channels, classes: preresnet(8, channels, classes, width=8, first_stride=2),
    "preresnet20": lambda channels, classes: preresnet(20, channels, classes),
    "preresnet110": lambda channels, classes: preresnet(110, channels, classes),
    "wrn": lambda channels, classes: wide_resnet(28, 10, channels, classes),
}
