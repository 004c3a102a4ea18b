"""The encoder f, and the two networks that carry it (Sec. 3.4).

These are the student f₂ and its moving average f₁, the teacher.

A Vision Transformer whose parameters have the names of timm and DINO, so that weights travel both
ways. ResNet-50 (Table 16) is in extras/resnet.py and is used in the same manner.

B batch (images or views), V views, N patches, C channels (dim), M attention heads
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def split(self, x):
        """Compute queries, keys and values: (B, 1 + N, C) -> 3 x (B, M, 1 + N, C / M)."""
        return self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, x):
        q, k, v = self.split(x)
        x = F.scaled_dot_product_attention(q, k, v)            # (B, M, 1 + N, C / M)
        return self.proj(x.transpose(1, 2).flatten(2))         # (B, 1 + N, C)

    def attention_map(self, x):
        """Compute who looks at whom: (B, 1 + N, C) -> (B, M, 1 + N, 1 + N), rows sum to 1."""
        q, k, _ = self.split(x)
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(dim=-1)


class Mlp(nn.Module):
    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block; in training drop_path of the samples skip a branch."""

    def __init__(self, dim, heads, drop_path=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path = drop_path

    def drop(self, branch):
        if not self.training or self.drop_path == 0:
            return branch
        # A tensor, not Python's random: a compiled graph would freeze the latter when it is traced.
        keep = torch.rand(len(branch), 1, 1, device=branch.device) >= self.drop_path
        return branch * (keep / (1 - self.drop_path))

    def forward(self, x):
        x = x + self.drop(self.attn(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    def __init__(self, patch_size, dim):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images):
        return self.proj(images).flatten(2).mT    # (B, N, C), row by row


def resize_matrix(old, new):
    """Return the (new, old) matrix that resizes `old` values to `new`, bicubic.

    As a product, unlike F.interpolate, resizing has a deterministic gradient on CUDA.
    """
    rows = torch.eye(old)[None, None]    # (1, 1, old, old)
    return F.interpolate(rows, size=(new, old), mode="bicubic", align_corners=False)[0, 0]


class VisionTransformer(nn.Module):
    """ViT. image_size only sets the grid of the position embeddings that are kept.

    Any size is understood that patch_size divides. masked: has an embedding that stands in for
    hidden patches, `masked_embed`, as iBOT's student.
    """

    def __init__(
        self, image_size=224, patch_size=16, dim=384, depth=12, heads=6, drop_path_rate=0.0,
        masked=False,
    ):
        super().__init__()
        self.image_size, self.patch_size = image_size, patch_size
        self.dim, self.depth, self.heads = dim, depth, heads
        self.patch_embed = PatchEmbed(patch_size, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (image_size // patch_size) ** 2, dim))
        rates = torch.linspace(0, drop_path_rate, depth).tolist()    # grow with depth
        self.blocks = nn.ModuleList([Block(dim, heads, rate) for rate in rates])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.masked_embed = nn.Parameter(torch.zeros(1, dim)) if masked else None

        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def position_embedding(self, height, width):
        """Interpolate the position embeddings to a grid: (1, 1 + height * width, C)."""
        side = self.image_size // self.patch_size
        if (height, width) == (side, side):
            return self.pos_embed
        grid = self.pos_embed[:, 1:].unflatten(1, (side, side))    # (1, side, side, C)
        rows, columns = (resize_matrix(side, n).to(grid) for n in (height, width))
        grid = torch.einsum("hi,wj,bijc->bhwc", rows, columns, grid)
        return torch.cat([self.pos_embed[:, :1], grid.flatten(1, 2)], dim=1)

    @torch.no_grad()
    def resize(self, image_size):
        """Interpolate the stored position embeddings to another image size, for good."""
        side = image_size // self.patch_size
        self.pos_embed = nn.Parameter(self.position_embedding(side, side).clone())
        self.image_size = image_size

    def embed(self, images, mask=None):
        height, width = (side // self.patch_size for side in images.shape[-2:])
        if images.shape[-2:] != (height * self.patch_size, width * self.patch_size):
            size = f"{images.shape[-2]}x{images.shape[-1]}"
            raise ValueError(f"images of {size} can't be cut into patches of {self.patch_size}")
        x = self.patch_embed(images)                                                # (B, N, C)
        if mask is not None:
            x = torch.where(mask[..., None], self.masked_embed, x)
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), x], dim=1)       # (B, 1 + N, C)
        return x + self.position_embedding(height, width)

    def forward(self, images, mask=None):
        """Encode images (B, 3, H, W) as tokens (B, 1 + N, C) before the final norm.

        Images are normalized. mask: (B, N) bool, True where a patch is hidden. The class token
        comes first, then the feature map row by row. SERE relates the latter as it is, other uses
        want `norm(tokens)`. Raises ValueError where patch_size does not divide a side.
        """
        x = self.embed(images, mask)
        for block in self.blocks:
            x = block(x)
        return x

    def get_intermediate_layers(self, images, n=1):
        """Return the normed tokens after each of the last n blocks: n x (B, 1 + N, C)."""
        x, layers = self.embed(images), []
        for block in self.blocks:
            x = block(x)
            layers.append(x)
        return [self.norm(x) for x in layers[-n:]]

    def get_last_selfattention(self, images):
        """Return the attention map of the last block: (B, M, 1 + N, 1 + N)."""
        x = self.embed(images)
        for block in self.blocks[:-1]:
            x = block(x)
        return self.blocks[-1].attn.attention_map(self.blocks[-1].norm1(x))


# Every dim but vit_nano's is timm's; nano is for the demo and the tests. A ResNet has no heads.
ARCHITECTURES = {
    "vit_nano": dict(dim=96, depth=4, heads=3),
    "vit_tiny": dict(dim=192, depth=12, heads=3),
    "vit_small": dict(dim=384, depth=12, heads=6),
    "vit_base": dict(dim=768, depth=12, heads=12),
    "vit_large": dict(dim=1024, depth=24, heads=16),
    "resnet50": dict(dim=2048, depth=1, heads=0),
}


def build_encoder(
    arch, image_size=224, patch_size=16, drop_path_rate=0.0, masked=False, heads=None
):
    """Build an encoder of ARCHITECTURES by name, with other attention heads if given.

    resnet50 takes the image size alone: it has no patches, stochastic depth, masks or heads.
    """
    shape = ARCHITECTURES[arch]
    if not shape["heads"]:
        from extras.resnet import ResNet50
        return ResNet50(image_size)
    shape = shape | ({"heads": heads} if heads else {})
    options = dict(drop_path_rate=drop_path_rate, masked=masked)
    return VisionTransformer(image_size, patch_size, **shape, **options)


class Output(NamedTuple):
    """Outputs of a network for V views of each of B images."""

    cls: torch.Tensor    # (V, B, C) class tokens after the final norm
    embedding: object    # of Eq. 1: P of class tokens and patches, normed; None without a head
    p: list              # V times (B, N, C): h_p(r), the student's g_p(h_p(r)); [] without a head
    c: list              # V times (B, N, C): h_c(r), the student's g_c(h_c(r)); [] without a head


class Network(nn.Module):
    """An encoder and its heads: the student (all views) or the teacher (global views).

    head: of baselines.py, for L_I, or None. spatial, channel: a RelationHead for each resolution,
    or none. The encoder is called `backbone`, as in DINO's checkpoints.
    """

    def __init__(self, backbone, head=None, spatial=(), channel=()):
        super().__init__()
        self.backbone, self.head = backbone, head
        self.spatial, self.channel = nn.ModuleList(spatial), nn.ModuleList(channel)
        if head is None:
            backbone.norm.requires_grad_(False)    # no loss sees it: DDP would wait for a gradient

    def forward(self, views, mask=None):
        """Encode views, by resolution, global first, (V, B, 3, S, S), as an Output.

        mask: (G, B, N) bool, patches of the global views that an encoder with a `masked_embed` does
        not see; the teacher's head answers for them. Each resolution is one batch for the encoder.
        """
        B, masks = views[0].shape[1], [None] * len(views)
        if mask is not None and self.backbone.masked_embed is not None:
            masks[0] = mask.flatten(0, 1)
        tokens = [self.backbone(x.flatten(0, 1), m) for x, m in zip(views, masks)]
        tokens = [t.unflatten(0, (-1, B)) for t in tokens]      # by resolution (V, B, 1 + N, C)
        normed = [self.backbone.norm(t) for t in tokens]
        r = [t[:, :, 1:] for t in tokens]                       # by resolution (V, B, N, C)
        return Output(
            cls=torch.cat([t[:, :, 0] for t in normed]),
            embedding=None if self.head is None else self.head(normed, mask),
            p=[view for head, x in zip(self.spatial, r) for view in head(x)],
            c=[view for head, x in zip(self.channel, r) for view in head(x)],
        )


@torch.no_grad()
def update_teacher(student, teacher, momentum):
    """Update θ₁ ← λθ₁ + (1 − λ)θ₂ for every parameter of the teacher, matched by name.

    momentum: λ. Raises KeyError where the student lacks a parameter. Buffers stay each network's
    own.
    """
    student = dict(student.named_parameters())
    for name, theta_1 in teacher.named_parameters():
        theta_1.mul_(momentum).add_(student[name], alpha=1 - momentum)
