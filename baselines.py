"""L_I of Eq. 1: the methods that SERE is added to, each a head and a loss side by side.

DINO (Caron et al. 2021): the student predicts the teacher's soft cluster assignment of another view.
iBOT (Zhou et al. 2022): and, of patches it does not see, the teacher's assignment of the same patch.
MoCo v3 (Chen et al. 2021): the student tells its image from all others of the batch by the teacher's embedding of another view.

A head takes (summary, patches, mask): the class tokens of all views (V, B, C), after the encoder's final norm; of the first
`head.patches` resolutions, global first, the patch tokens likewise (V, B, N, C); and which of the global views' patches the
student does not see, (G, B, N) bool, or None. What it returns is its loss's to know.
A loss is called with (student's, teacher's, teacher_temp, boxes=) and returns a scalar; call `update_center` once
an optimizer step.

B batch, V views, G global views, N patches, C channels, K outputs (out_dim)
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from distributed import BatchNorm, average_over_processes, gather_from_processes, world
from relations import cross_entropy, mean_over_pairs


class Loss(nn.Module):
    """What losses have in common, where there is nothing of their own to do."""

    def update_center(self):
        """Called once an optimizer step."""

    def diagnostics(self, teacher, teacher_temp):
        """What the log says of the teacher's outputs, {name: number}. Entropies are in nats, at most ln K."""
        return {}


class NoLoss(Loss):
    """L_I = 0, for --li_weight 0."""

    def forward(self, student, teacher, teacher_temp, boxes):
        return boxes.new_zeros(())


# --- DINO -------------------------------------------------------------------------------------------------------------


class DINOHead(nn.Module):
    """3-layer MLP with GELU, a bottleneck, L2 normalisation, and a last layer whose rows are unit vectors times `scale`.

    (..., in_dim) -> (..., out_dim). norm_last_layer keeps every scale at 1, so that logits are cosines; else scales are learned.
    """

    patches = 0

    def __init__(self, in_dim, out_dim, norm_last_layer=True, hidden_dim=2048, bottleneck_dim=256):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, bottleneck_dim)
        )
        self.last_layer = UnitRowLinear(bottleneck_dim, out_dim, learn_scale=not norm_last_layer)
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def bottleneck(self, x):
        return F.normalize(self.mlp(x).float(), dim=-1)

    def forward(self, summary, patches=(), mask=None):
        return self.last_layer(self.bottleneck(summary))


class UnitRowLinear(nn.Module):
    """A linear layer with weight normalisation: row k is scale_k times a unit vector. Its state is plain parameters,
    which compile, copy and synchronise like any other."""

    def __init__(self, in_dim, out_dim, learn_scale):
        super().__init__()
        self.weight = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(out_dim, in_dim), a=5**0.5))
        self.scale = nn.Parameter(torch.ones(out_dim, 1), requires_grad=learn_scale)    # (K, 1): weight decay reaches it, as in DINO and iBOT

    def forward(self, x):
        # What torch.nn.utils.parametrizations.weight_norm calls; F.normalize goes over the weights, 2^24 numbers in DINO, several times more.
        return F.linear(x, torch._weight_norm(self.weight, self.scale, 0))


class Assignment(Loss):
    """Soft cluster assignments: softmax((output - centre) / temperature), the centre a running mean of outputs.

    The centre and the teacher's temperature keep outputs from collapsing: one makes them uniform, the other peaked.
    `assign` notes what it is given for the next `update_center`.
    """

    def __init__(self, out_dim, student_temp=0.1, center_momentum=0.9):
        super().__init__()
        self.student_temp, self.center_momentum = student_temp, center_momentum
        self.register_buffer("center", torch.zeros(out_dim))
        self.register_buffer("batch_sum", torch.zeros(out_dim), persistent=False)    # of the batches since the last update
        self.register_buffer("batches", torch.zeros(()), persistent=False)

    def targets(self, outputs, temperature):
        """Teacher outputs (..., K) -> probabilities (..., K)."""
        return ((outputs.detach().float() - self.center) / temperature).softmax(dim=-1)

    def assign(self, outputs, temperature, mean=None):
        """`targets`, and the outputs count for the centre; or their `mean` (K,) does, where they are not all."""
        self.batch_sum += outputs.detach().float().flatten(0, -2).mean(dim=0) if mean is None else mean.detach().float()
        self.batches += 1
        return self.targets(outputs, temperature)

    def predict(self, outputs):
        """Student outputs (..., K) -> logits (..., K)."""
        return outputs.float() / self.student_temp

    def entropy(self, outputs, temperature):
        """Mean entropy of the targets: 0 where they are peaked, ln K where they are uniform."""
        return torch.special.entr(self.targets(outputs, temperature)).sum(dim=-1).mean().item()

    @torch.no_grad()
    def update_center(self):
        """center <- m center + (1 - m) mean of the outputs since the last call, over all processes."""
        self.center.lerp_(average_over_processes(self.batch_sum / self.batches), 1 - self.center_momentum)
        self.batch_sum.zero_()
        self.batches.zero_()


class DINOLoss(Assignment):
    """Cross-entropy of the student's outputs with the teacher's centred and sharpened ones, over pairs of different views."""

    def forward(self, student, teacher, teacher_temp, boxes=None):
        """student: (V, B, K), teacher: (G, B, K); views of the same index are the same view, and that pair is skipped.

        Returns the mean over pairs and images, a scalar between 0 and about ln K.
        """
        return mean_over_pairs(self.assign(teacher, teacher_temp), map(self.predict, student))

    def diagnostics(self, teacher, teacher_temp):
        return {"teacher_temp": float(teacher_temp), "teacher_entropy": self.entropy(teacher, teacher_temp)}


# --- iBOT -------------------------------------------------------------------------------------------------------------


class IBOTOutput(NamedTuple):
    """What an IBOTHead gives."""

    summary: torch.Tensor          # (V, B, K)
    patches: list                  # by resolution, (V, B, N, K_patch); of masked views (G, B, most, K_patch), the masked patches first
    masked: torch.Tensor = None    # (G, B, most) bool, which of these are masked
    mean: torch.Tensor = None      # (K_patch,) the mean output of all patches


class IBOTHead(DINOHead):
    """A DINOHead for class and patch tokens. patches: of how many resolutions it takes the patch tokens.

    patch_out_dim None: one last layer for both (shared); else patches have their own, of so many outputs. The MLP is shared always.
    most: masked patches in a view, at most; only these have outputs, as no others are asked of the student. mean: give the mean output of
    all patches too, for the teacher's centre.
    """

    def __init__(self, in_dim, out_dim, norm_last_layer=True, patch_out_dim=None, patches=1, most=None, mean=False, **rest):
        super().__init__(in_dim, out_dim, norm_last_layer, **rest)
        self.patches, self.most, self.mean = patches, most, mean
        self.patch_last_layer = None
        if patch_out_dim:
            self.patch_last_layer = UnitRowLinear(self.last_layer.weight.shape[1], patch_out_dim, learn_scale=not norm_last_layer)

    def forward(self, summary, patches, mask=None):
        summary, last_layer = super().forward(summary), self.patch_last_layer or self.last_layer
        if mask is None:
            return IBOTOutput(summary, [last_layer(self.bottleneck(p)) for p in patches])
        # As many in every view, so that shapes stay the same from step to step: the masked patches, then others that don't count.
        masked, chosen = mask.int().sort(dim=-1, descending=True, stable=True)
        masked, chosen = masked[..., : self.most].bool(), chosen[..., : self.most, None]    # (G, B, most), (G, B, most, 1)
        if not self.mean:
            return IBOTOutput(summary, [last_layer(self.bottleneck(patches[0].take_along_dim(chosen, dim=2)))], masked)
        bottleneck = self.bottleneck(patches[0])    # of all; the last layer is linear, so it gives the mean output of the mean
        return IBOTOutput(summary, [last_layer(bottleneck.take_along_dim(chosen, dim=2))], masked, last_layer(bottleneck.mean(dim=(0, 1, 2))))


class IBOTLoss(DINOLoss):
    """DINO's loss on class tokens, plus masked image modelling: cross-entropy with the teacher's assignment of each masked patch.

    The two are averages over pairs of different views, and over the patches masked in the same view, with equal weights.
    """

    def __init__(self, out_dim, patch_out_dim, student_temp=0.1, center_momentum=0.9):
        super().__init__(out_dim, student_temp, center_momentum)
        self.patches = Assignment(patch_out_dim, student_temp, center_momentum)
        self.register_buffer("terms", torch.zeros(2), persistent=False)    # of this process's last batch, for the log

    def forward(self, student, teacher, teacher_temp, boxes=None):
        """student, teacher: IBOTOutput, of the same mask. teacher_temp: (2,) for class and for patch tokens. boxes: (views, B, 5). A view
        without masked patches counts as 0."""
        summary_term = super().forward(student.summary, teacher.summary, teacher_temp[0])
        patch_term = self.patch_loss(student, teacher, teacher_temp[1], boxes)
        self.terms.copy_(torch.stack([summary_term, patch_term]).detach())
        return summary_term + patch_term

    def patch_loss(self, student, teacher, teacher_temp, boxes):
        targets = self.patches.assign(teacher.patches[0], teacher_temp, teacher.mean)    # (G, B, most, K)
        ce = cross_entropy(targets, self.patches.predict(student.patches[0]))            # (G, B, most)
        return ((ce * student.masked).sum(dim=-1) / student.masked.sum(dim=-1).clamp(min=1)).mean()

    def update_center(self):
        super().update_center()
        self.patches.update_center()

    def diagnostics(self, teacher, teacher_temp):
        return super().diagnostics(teacher.summary, teacher_temp[0]) | {
            "teacher_patch_temp": float(teacher_temp[1]), "teacher_patch_entropy": self.patches.entropy(teacher.patches[0], teacher_temp[1]),
            "L_I_summary": self.terms[0].item(), "L_I_patch": self.terms[1].item(),
        }


# --- MoCo v3 ----------------------------------------------------------------------------------------------------------


def _moco_mlp(*dims):
    """Linear layers without bias, each followed by BatchNorm and, but for the last, ReLU; the last BatchNorm has no scale and shift."""
    layers = []
    for i, (in_dim, out_dim) in enumerate(zip(dims, dims[1:])):
        last = i == len(dims) - 2
        layers += [nn.Linear(in_dim, out_dim, bias=False), BatchNorm(out_dim, affine=not last, track_running_stats=False)]
        layers += [] if last else [nn.ReLU()]
    return nn.Sequential(*layers)


class MoCoHead(nn.Module):
    """MoCo v3's MLPs for ViTs: a projector of 3 layers and, for the student, a predictor of 2. (V, B, in_dim) -> (V, B, out_dim).

    Batch statistics are those of one view, of all processes.
    """

    patches = 0

    def __init__(self, in_dim, out_dim=256, predictor=True, hidden_dim=4096):
        super().__init__()
        self.projector = _moco_mlp(in_dim, hidden_dim, hidden_dim, out_dim)
        self.predictor = _moco_mlp(out_dim, hidden_dim, out_dim) if predictor else nn.Identity()

    def forward(self, summary, patches=(), mask=None):
        return torch.stack([self.predictor(self.projector(view)) for view in summary])


class MoCoLoss(Loss):
    """InfoNCE: 2 τ times the cross-entropy of finding an image's key, the teacher's embedding of another view, among the keys of the
    batches of all processes. Summed over both directions, as MoCo v3 does with its two views; with more views, twice the mean over pairs.
    """

    def __init__(self, temperature=0.2):
        super().__init__()
        self.temperature = temperature

    def forward(self, student, teacher, teacher_temp=None, boxes=None):
        """student: (V, B, K), teacher: (G, B, K); the pair of the same view is skipped."""
        B = student.shape[1]
        rank, _ = world()
        label = rank * B + torch.arange(B, device=student.device)
        total, pairs = 0.0, 0
        for q, keys in enumerate(F.normalize(teacher.float(), dim=-1)):
            keys = gather_from_processes(keys)                                        # (processes * B, K)
            for v, queries in enumerate(F.normalize(student.float(), dim=-1)):
                if v != q:
                    total = total + F.cross_entropy(queries @ keys.T / self.temperature, label)
                    pairs += 1
        return 2 * (2 * self.temperature * total / pairs)
