"""The encoder f, and the two networks that carry it: the student f₂ and its moving average, the teacher f₁ (Sec. 3.4).

A Vision Transformer with the parameter names of timm and DINO, and a ResNet-50 with torchvision's, so that weights travel both ways.

B batch (images or views), V views, N patches, C channels (dim), M attention heads
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet

from distributed import BatchNorm


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def _qkv(self, x):
        return self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)    # (3, B, M, 1 + N, C / M)

    def forward(self, x):
        """x: (B, 1 + N, C), and so is the result."""
        q, k, v = self._qkv(x)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def attention_map(self, x):
        """Who looks at whom: (B, M, 1 + N, 1 + N), rows sum to 1."""
        q, k, _ = self._qkv(x)
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(dim=-1)


class Mlp(nn.Module):
    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block. With drop_path in training, each sample skips each of the two branches with that probability."""

    def __init__(self, dim, heads, drop_path=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path = drop_path

    def _drop(self, branch):
        if not self.training or self.drop_path == 0:
            return branch
        # A tensor mask, not Python's random: a compiled graph would freeze the latter when it is traced.
        keep = torch.rand(len(branch), 1, 1, device=branch.device) >= self.drop_path
        return branch * (keep / (1 - self.drop_path))

    def forward(self, x):
        x = x + self._drop(self.attn(self.norm1(x)))
        return x + self._drop(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    def __init__(self, patch_size, dim):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images):
        """(B, 3, H, W) -> (B, N, C), row by row. Patches do not overlap, so that the convolution is a single matrix product; that is faster."""
        p = self.patch_size
        patches = images.unflatten(3, (-1, p)).unflatten(2, (-1, p)).permute(0, 2, 4, 1, 3, 5)    # (B, H / p, W / p, 3, p, p)
        return F.linear(patches.flatten(3).flatten(1, 2), self.proj.weight.flatten(1), self.proj.bias)


def _resize_matrix(old, new, like):
    """(new, old): bicubic resizing of a row of `old` values to `new`, not antialiased. Applied as a product, its gradient is deterministic."""
    eye = torch.eye(old, device=like.device)[None, None]
    return F.interpolate(eye, size=(new, old), mode="bicubic", align_corners=False)[0, 0].to(like.dtype)


class VisionTransformer(nn.Module):
    """ViT. image_size sets only the grid of the stored position embeddings: any size divisible by patch_size can be given.

    masked: there is an embedding that stands in for masked patches (iBOT's student), under iBOT's name `masked_embed`.
    Raises ValueError for an image whose sides patch_size does not divide.
    """

    def __init__(self, image_size=224, patch_size=16, dim=384, depth=12, heads=6, drop_path_rate=0.0, masked=False):
        super().__init__()
        self.patch_size, self.dim, self.depth, self.heads = patch_size, dim, depth, heads
        self.grid = image_size // patch_size
        self.patch_embed = PatchEmbed(patch_size, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid**2, dim))
        rates = np.linspace(0, drop_path_rate, depth).tolist()    # stochastic depth grows with depth
        self.blocks = nn.ModuleList([Block(dim, heads, rate) for rate in rates])
        self.norm = nn.LayerNorm(dim, eps=1e-6)

        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if masked:
            self.masked_embed = nn.Parameter(torch.zeros(1, dim))
        # Shapes don't tell the heads, so a state dict carries them, where PyTorch keeps a module's version. Its keys are the plain ones.
        self.register_state_dict_post_hook(lambda module, state, prefix, metadata: metadata.update(heads=module.heads))

    def _position_embedding(self, height, width):
        """(1, 1 + height * width, C), interpolated by size where the grid is another."""
        if (height, width) == (self.grid, self.grid):
            return self.pos_embed
        grid = self.pos_embed[:, 1:].unflatten(1, (self.grid, self.grid))    # (1, g, g, C)
        rows = _resize_matrix(self.grid, height, grid)
        columns = _resize_matrix(self.grid, width, grid)
        grid = torch.einsum("hi,wj,bijc->bhwc", rows, columns, grid)
        return torch.cat([self.pos_embed[:, :1], grid.flatten(1, 2)], dim=1)

    @torch.no_grad()
    def resize(self, image_size):
        """Interpolate the stored position embeddings to the grid of another image size, for good."""
        grid = image_size // self.patch_size
        self.pos_embed = nn.Parameter(self._position_embedding(grid, grid).clone())
        self.grid = grid

    def _embed(self, images, mask=None):
        if images.shape[-2] % self.patch_size or images.shape[-1] % self.patch_size:
            raise ValueError(f"images of {images.shape[-2]}x{images.shape[-1]} can't be cut into patches of {self.patch_size}")
        h, w = (side // self.patch_size for side in images.shape[-2:])
        patches = self.patch_embed(images)                                                         # (B, N, C)
        if mask is not None:
            patches = torch.where(mask[..., None], self.masked_embed, patches)
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1)           # (B, 1 + N, C)
        return tokens + self._position_embedding(h, w)

    def forward(self, images, mask=None):
        """images: (B, 3, H, W), normalised; mask: (B, N) bool, True where a patch is not to be seen. Returns tokens (B, 1 + N, C) before
        the final norm: the class token, then the feature map row by row. Self-relations use the latter as it is; a summary of the
        image is `norm(tokens)[:, 0]`."""
        x = self._embed(images, mask)
        for block in self.blocks:
            x = block(x)
        return x

    def get_intermediate_layers(self, images, n):
        """Tokens after each of the last n blocks, `norm` applied: a list of (B, 1 + N, C)."""
        x = self._embed(images)
        layers = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i >= len(self.blocks) - n:
                layers.append(self.norm(x))
        return layers

    def get_last_selfattention(self, images):
        """The last block's attention map: (B, M, 1 + N, 1 + N)."""
        x = self._embed(images)
        for block in self.blocks[:-1]:
            x = block(x)
        return self.blocks[-1].attn.attention_map(self.blocks[-1].norm1(x))


class ResNet50(ResNet):
    """torchvision's ResNet-50 without its classifier, in the manner of the VisionTransformer: `patch_size` is its stride,
    tokens are the last stage's features, before them their mean. Any image size."""

    def __init__(self, image_size=224):
        super().__init__(Bottleneck, [3, 4, 6, 3], norm_layer=BatchNorm)
        del self.fc
        self.norm = nn.Identity()
        self.patch_size, self.dim, self.depth, self.heads, self.grid = 32, 2048, 1, 0, image_size // 32    # depth: layers that get_intermediate_layers can give

    def forward(self, images, mask=None):
        """images: (B, 3, H, W), normalised. Returns (B, 1 + N, C): the mean feature, then the feature map row by row."""
        if mask is not None:
            raise ValueError("a ResNet has no mask embedding")
        images = images.contiguous(memory_format=torch.channels_last)    # and so all features: 1.2 times as fast on a CPU
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        features = x.flatten(2).mT                                                                 # (B, N, C)
        return torch.cat([features.mean(dim=1, keepdim=True), features], dim=1)

    def get_intermediate_layers(self, images, n=1):
        """[tokens]."""
        return [self(images)]


# Every dim but vit_nano's is timm's; nano is for the demo and the tests.
ARCHITECTURES = {
    "vit_nano": dict(dim=96, depth=4, heads=3),
    "vit_tiny": dict(dim=192, depth=12, heads=3),
    "vit_small": dict(dim=384, depth=12, heads=6),
    "vit_base": dict(dim=768, depth=12, heads=12),
    "vit_large": dict(dim=1024, depth=24, heads=16),
    "resnet50": dict(dim=2048),
}


def build_encoder(arch, image_size=224, patch_size=16, drop_path_rate=0.0, masked=False, heads=None):
    """An encoder of ARCHITECTURES by name, with other attention heads if told so. resnet50 takes the image size alone: it has no
    patches, stochastic depth, masks or heads."""
    if arch == "resnet50":
        return ResNet50(image_size)
    shape = ARCHITECTURES[arch] | ({"heads": heads} if heads else {})
    return VisionTransformer(image_size, patch_size, drop_path_rate=drop_path_rate, masked=masked, **shape)


class Output(NamedTuple):
    """What a network makes of V views of each of B images; None or [] where it has no such head."""

    summary: torch.Tensor      # (V, B, C) class token after the final norm
    embedding: object          # what `head` gives, P(r) of Eq. 1: (V, B, K), or a tuple of such
    spatial: list              # by resolution, (V, B, C, N): p or g_p(p)
    channel: list              # by resolution, (V, B, C, N): cᵀ or g_c(c)ᵀ


class Network(nn.Module):
    """An encoder and its heads: the student (all views) or the teacher (global views).

    head: of baselines.py, for L_I, or None. spatial, channel: a relation head, (B, C, N) -> (B, C, N), for each
    resolution, or none. The encoder is called `backbone`, as in DINO's checkpoints.
    """

    def __init__(self, backbone, head=None, spatial=(), channel=()):
        super().__init__()
        self.backbone, self.head = backbone, head
        self.spatial, self.channel = nn.ModuleList(spatial), nn.ModuleList(channel)
        if head is None:
            backbone.norm.requires_grad_(False)    # only what is embedded passes through it: it would wait for a gradient in vain

    def forward(self, views, mask=None):
        """views: a list by resolution, global first, of images (V, B, 3, H, W); each resolution is one batch for the encoder.
        mask: (G, B, N) bool, patches of the global views, or None: those that the head is asked of, and hidden from an encoder that can mask
        (the student's)."""
        B = views[0].shape[1]
        hidden = mask.flatten(0, 1) if mask is not None and hasattr(self.backbone, "masked_embed") else None
        masks = [hidden] + [None] * (len(views) - 1)
        tokens = [self.backbone(images.flatten(0, 1), m) for images, m in zip(views, masks)]    # (V * B, 1 + N, C)
        summaries, patches = zip(*(t.split([1, t.shape[1] - 1], dim=1) for t in tokens))
        summary = self.backbone.norm(torch.cat(summaries).squeeze(1)).unflatten(0, (-1, B))     # (V, B, C), of all resolutions
        embedding = None
        if self.head is not None:
            embedding = self.head(summary, [self.backbone.norm(p).unflatten(0, (-1, B)) for p in patches[: self.head.patches]], mask)
        related = len(self.spatial) or len(self.channel)
        features = [p.contiguous().mT for p in patches] if related else []                      # (V * B, C, N): r, before the final norm
        return Output(
            summary=summary,
            embedding=embedding,
            spatial=[h(r).unflatten(0, (-1, B)) for h, r in zip(self.spatial, features)],
            channel=[h(r).unflatten(0, (-1, B)) for h, r in zip(self.channel, features)],
        )


@torch.no_grad()
def update_teacher(student, teacher, momentum):
    """θ₁ <- λθ₁ + (1 - λ)θ₂ for every parameter of the teacher, matched by name.

    Raises KeyError where the student lacks one. Buffers stay each network's own.
    """
    theta2 = dict(student.named_parameters())
    theta1 = dict(teacher.named_parameters())
    torch._foreach_lerp_(list(theta1.values()), [theta2[name] for name in theta1], 1 - momentum)
