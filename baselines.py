"""L_I of Eq. 1: the methods SERE is added to, each a head (P) and a loss (R).

DINO (Caron et al. 2021): the student predicts the teacher's soft cluster assignment of another
view. iBOT (Zhou et al. 2022): also, of patches hidden from it, the teacher's assignment of the same
patch. MoCo v3 (Chen et al. 2021): the student tells an image from all others of the batch by the
teacher's embedding of another view.

A head is called with (tokens, mask): of each resolution, global first, tokens (V, B, 1 + N, C)
after the encoder's final norm; and which patches of the global views are hidden from the student,
(G, B, N) bool, or None. A loss is called with the outputs of the student's and the teacher's head,
the teacher's temperature, and the boxes of all views. `update_center` follows each optimizer step.
To add a method, write both here and name them in train.py's build_head and build_embedding_loss.

B batch, V views, G global views, N patches, C channels, K outputs (out_dim)
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from support.distributed import BatchNorm, average_over_processes, gather_from_processes, world


class Loss(nn.Module):
    """L_I = 0, for --li_weight 0, and what the other losses have in common."""

    def forward(self, student, teacher, teacher_temp, boxes):
        return boxes.new_zeros(())

    def update_center(self):
        """Follow an optimizer step."""

    def diagnostics(self, teacher, teacher_temp):
        """Return {name: number} about the teacher's outputs, for the log."""
        return {}


def unit_rows(in_dim, out_dim, fixed):
    """Build a linear layer whose rows have length 1: fixed, or to begin with."""
    layer = weight_norm(nn.Linear(in_dim, out_dim, bias=False))
    length = nn.init.ones_(layer.parametrizations.weight.original0)    # (K, 1)
    length.requires_grad_(not fixed)
    return layer


# --- DINO -----------------------------------------------------------------------------------------


class DINOHead(nn.Module):
    """3-layer MLP, bottleneck of length 1, K unit rows: class tokens -> (V, B, K)."""

    def __init__(self, in_dim, out_dim, norm_last_layer=True, hidden_dim=2048, bottleneck_dim=256):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim), nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim), nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        for layer in self.mlp[::2]:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.last_layer = unit_rows(bottleneck_dim, out_dim, norm_last_layer)

    def bottleneck(self, x):
        return F.normalize(self.mlp(x).float(), dim=-1)

    def cls_outputs(self, tokens):
        cls = torch.cat([t[:, :, 0] for t in tokens])               # (V, B, C)
        return self.last_layer(self.bottleneck(cls))                # (V, B, K)

    def forward(self, tokens, mask=None):
        return self.cls_outputs(tokens)


class Center(nn.Module):
    """Running mean of the teacher's outputs: no cluster may take all images.

    `add` notes a batch; `update` follows once an optimizer step, however many batches it had.
    """

    def __init__(self, out_dim, momentum=0.9):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(out_dim))
        self.register_buffer("sum", torch.zeros(out_dim), persistent=False)
        self.register_buffer("batches", torch.zeros(()), persistent=False)

    def add(self, mean):
        """Note the mean output (K,) of a batch."""
        self.sum += mean.detach().float()
        self.batches += 1

    @torch.no_grad()
    def update(self):
        """Apply center ← m center + (1 − m) mean, over all processes."""
        mean = average_over_processes(self.sum / self.batches)
        self.value.mul_(self.momentum).add_(mean, alpha=1 - self.momentum)
        self.sum.zero_()
        self.batches.zero_()


def assign(outputs, center, temperature):
    """Center and sharpen the teacher's outputs (..., K): cluster assignments."""
    return ((outputs.detach().float() - center.value) / temperature).softmax(dim=-1)


def cross_entropy(assignment, logits):
    """Compare the student's logits (..., K) with the teacher's assignment: (...)."""
    return -(assignment * logits.log_softmax(dim=-1)).sum(dim=-1)


def entropy(assignment):
    """Average the entropy of assignments, in nats: 0 if peaked, ln K if uniform."""
    return torch.special.entr(assignment).sum(dim=-1).mean().item()


class DINOLoss(Loss):
    """Cross-entropy of the student's outputs with the teacher's for another view."""

    def __init__(self, out_dim, student_temp=0.1, center_momentum=0.9):
        super().__init__()
        self.student_temp = student_temp
        self.center = Center(out_dim, center_momentum)

    def forward(self, student, teacher, teacher_temp, boxes=None):
        """Average over pairs and images: student (V, B, K), teacher (G, B, K) -> scalar."""
        self.center.add(teacher.flatten(0, 1).mean(dim=0))
        assignment = assign(teacher, self.center, teacher_temp)     # (G, B, K)
        logits = student.float() / self.student_temp                # (V, B, K)
        loss, pairs = 0, 0
        for q in range(len(teacher)):
            for v in range(len(student)):
                if v == q:    # the same view
                    continue
                loss = loss + cross_entropy(assignment[q], logits[v]).mean()
                pairs += 1
        return loss / pairs

    def update_center(self):
        self.center.update()

    def diagnostics(self, teacher, teacher_temp):
        teacher_entropy = entropy(assign(teacher, self.center, teacher_temp))
        return {"teacher_temp": float(teacher_temp), "teacher_entropy": teacher_entropy}


# --- iBOT -----------------------------------------------------------------------------------------


class IBOTOutput(NamedTuple):
    """Outputs of an IBOTHead. P is the most patches that can be hidden in a view."""

    cls: torch.Tensor        # (V, B, K)
    patches: torch.Tensor    # (G, B, P, K_patch), those of the hidden patches first
    hidden: torch.Tensor     # (G, B, P) bool: which of them are; the others only keep shapes static
    mean: torch.Tensor       # (K_patch,) of all patches, the teacher's; None for the student


class IBOTHead(DINOHead):
    """A DINOHead for class tokens and for patches hidden from the student.

    patch_out_dim: of the patches' own last layer; None to share the one of the class tokens. most:
    P. No other patch reaches the last layer: that is what makes a large K affordable.
    """

    def __init__(self, in_dim, out_dim, norm_last_layer=True, hidden_dim=2048, bottleneck_dim=256,
                 patch_out_dim=None, most=None, teacher=False):
        super().__init__(in_dim, out_dim, norm_last_layer, hidden_dim, bottleneck_dim)
        self.most, self.teacher = most, teacher
        own = patch_out_dim and unit_rows(bottleneck_dim, patch_out_dim, norm_last_layer)
        self.patch_last_layer = own or self.last_layer

    def forward(self, tokens, mask):
        patches, mean = tokens[0][:, :, 1:], None                            # (G, B, N, C)
        hidden, index = mask.int().sort(dim=-1, descending=True, stable=True)
        hidden, index = hidden[..., : self.most].bool(), index[..., : self.most, None]
        if self.teacher:    # the last layer is linear: it gives the mean output of the mean
            bottleneck = self.bottleneck(patches)
            mean = self.patch_last_layer(bottleneck.mean(dim=(0, 1, 2)))
            bottleneck = bottleneck.take_along_dim(index, dim=2)
        else:
            bottleneck = self.bottleneck(patches.take_along_dim(index, dim=2))
        return IBOTOutput(self.cls_outputs(tokens), self.patch_last_layer(bottleneck), hidden, mean)


class IBOTLoss(DINOLoss):
    """DINO's loss on class tokens, plus cross-entropy on each hidden patch."""

    def __init__(self, out_dim, patch_out_dim, student_temp=0.1, center_momentum=0.9):
        super().__init__(out_dim, student_temp, center_momentum)
        self.patch_center = Center(patch_out_dim, center_momentum)
        self.register_buffer("terms", torch.zeros(2), persistent=False)    # of a batch, for the log

    def forward(self, student, teacher, teacher_temp, boxes=None):
        """Add both terms, of IBOTOutputs for one mask. teacher_temp: (2,), cls, patch."""
        cls_term = super().forward(student.cls, teacher.cls, teacher_temp[0])
        self.patch_center.add(teacher.mean)
        assignment = assign(teacher.patches, self.patch_center, teacher_temp[1])    # (G, B, P, K)
        losses = cross_entropy(assignment, student.patches.float() / self.student_temp)
        losses = (losses * student.hidden).sum(dim=-1) / student.hidden.sum(dim=-1).clamp(min=1)
        return self.note(cls_term, losses.mean())    # a view without hidden patches counts as 0

    def note(self, cls_term, patch_term):
        """Return the sum of the terms, and keep them for the log."""
        self.terms.copy_(torch.stack([cls_term, patch_term]).detach())
        return cls_term + patch_term

    def update_center(self):
        super().update_center()
        self.patch_center.update()

    def diagnostics(self, teacher, teacher_temp):
        patch_entropy = entropy(assign(teacher.patches, self.patch_center, teacher_temp[1]))
        return self.describe(teacher.cls, teacher_temp, patch_entropy)

    def describe(self, teacher_cls, teacher_temp, patch_entropy):
        return super().diagnostics(teacher_cls, teacher_temp[0]) | {
            "teacher_patch_temp": float(teacher_temp[1]), "teacher_patch_entropy": patch_entropy,
            "L_I_cls": self.terms[0].item(), "L_I_patch": self.terms[1].item(),
        }


# --- MoCo v3 --------------------------------------------------------------------------------------


def moco_mlp(*dims):
    """Build linear layers with BatchNorm and ReLU; it ends in a plain BatchNorm."""
    layers = []
    for in_dim, out_dim in zip(dims[:-2], dims[1:]):
        layers += [nn.Linear(in_dim, out_dim, bias=False), BatchNorm(out_dim), nn.ReLU()]
    layers += [nn.Linear(*dims[-2:], bias=False), BatchNorm(dims[-1], affine=False)]
    return nn.Sequential(*layers)


class MoCoHead(nn.Module):
    """A projector of 3 layers and the student's predictor of 2: cls -> (V, B, K).

    Batch statistics are those of one view, of all processes.
    """

    def __init__(self, in_dim, out_dim=256, predictor=True, hidden_dim=4096):
        super().__init__()
        self.projector = moco_mlp(in_dim, hidden_dim, hidden_dim, out_dim)
        self.predictor = moco_mlp(out_dim, hidden_dim, out_dim) if predictor else nn.Identity()

    def forward(self, tokens, mask=None):
        cls = torch.cat([t[:, :, 0] for t in tokens])               # (V, B, C)
        return torch.stack([self.predictor(self.projector(view)) for view in cls])


class MoCoLoss(Loss):
    """InfoNCE: find an image's key among those of all images of all processes.

    A key is the teacher's embedding of another view. With queries z and keys k of length 1:

        2 τ · −log( exp(zᵢ·kᵢ / τ) / Σⱼ exp(zᵢ·kⱼ / τ) ),

    summed over the two directions of a pair. With more than two views: twice the mean over pairs.
    """

    def __init__(self, temperature=0.2):
        super().__init__()
        self.temperature = temperature

    def forward(self, student, teacher, teacher_temp=None, boxes=None):
        """Average over pairs and images: student (V, B, K), teacher (G, B, K) -> scalar."""
        B, tau = student.shape[1], self.temperature
        label = world()[0] * B + torch.arange(B, device=student.device)
        queries, keys = F.normalize(student.float(), dim=-1), F.normalize(teacher.float(), dim=-1)
        loss, pairs = 0, 0
        for q in range(len(keys)):
            all_keys = gather_from_processes(keys[q])               # (processes * B, K)
            for v in range(len(queries)):
                if v == q:
                    continue
                loss = loss + 2 * tau * F.cross_entropy(queries[v] @ all_keys.T / tau, label)
                pairs += 1
        return 2 * loss / pairs
