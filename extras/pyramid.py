"""Build feature maps at four resolutions, for UperNet and detectors.

A ViT has one resolution: maps of four depths are brought to four, as iBOT does. ResNet-50 has four
stages.

B batch, C channels of the encoder, (h, w) patches
"""

from torch import nn

from extras.resnet import BatchNorm2d


def four_maps(encoder, images, norm=True):
    """Return four feature maps of images (B, 3, H, W), normalized.

    Those of a ViT are (B, C, h, w), after a third, a half, two thirds and all of its blocks: 4, 6,
    8, 12 of 12. norm: apply its final norm to each. ResNet-50's are its stages, (B, 256, H / 4, W /
    4) to (B, 2048, H / 32, W / 32).
    """
    if not encoder.heads:
        return encoder.stages(images)
    h, w = (side // encoder.patch_size for side in images.shape[-2:])
    wanted = [max(1, round(encoder.depth * share)) for share in (1 / 3, 1 / 2, 2 / 3, 1)]
    x, tokens = encoder.embed(images), {}
    for number, block in enumerate(encoder.blocks, start=1):
        x = block(x)
        tokens[number] = x    # (B, 1 + N, C)
    maps = [encoder.norm(tokens[number]) if norm else tokens[number] for number in wanted]
    return [m[:, 1:].mT.unflatten(-1, (h, w)).contiguous() for m in maps]


class FeaturePyramid(nn.Module):
    """Four maps of `four_maps` -> four maps (B, dims[i], ., .), each half the one before.

    A ViT's become 4, 2, 1 and 1/2 times (h, w): strides 4 to 32 for patches of 16. ResNet-50's stay
    as they are.
    """

    def __init__(self, encoder):
        super().__init__()
        dim = encoder.dim
        if not encoder.heads:
            self.dims = [dim // 8, dim // 4, dim // 2, dim]
            self.scales = nn.ModuleList(nn.Identity() for _ in range(4))
            return
        self.dims = [dim] * 4
        self.scales = nn.ModuleList([
            nn.Sequential(double(dim), BatchNorm2d(dim), nn.GELU(), double(dim)),
            double(dim),
            nn.Identity(),
            nn.MaxPool2d(kernel_size=2, ceil_mode=True),    # of an odd number too
        ])

    def forward(self, maps):
        return [scale(x) for scale, x in zip(self.scales, maps)]


def double(dim):
    return nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2)
