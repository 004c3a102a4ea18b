"""L_I of Eq. 1: the methods that SERE is added to, each a head and a loss side by side.

DINO (Caron et al. 2021): the student predicts the teacher's soft cluster assignment of another view.

B batch, V views, G global views, K outputs (out_dim)
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


class DINOHead(nn.Module):
    """3-layer MLP with GELU, a bottleneck, L2 normalisation, and a last layer whose rows are unit vectors times `scale`.

    (B, in_dim) -> (B, out_dim). norm_last_layer keeps every scale at 1, so that logits are cosines; else scales are learned.
    """

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

    def forward(self, x):
        return self.last_layer(F.normalize(self.mlp(x).float(), dim=-1))


class UnitRowLinear(nn.Module):
    """A linear layer with weight normalisation: row k is scale_k times a unit vector. Its state is plain parameters,
    which compile, copy and synchronise like any other."""

    def __init__(self, in_dim, out_dim, learn_scale):
        super().__init__()
        self.weight = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(out_dim, in_dim), a=5**0.5))
        self.scale = nn.Parameter(torch.ones(out_dim), requires_grad=learn_scale)

    def forward(self, x):
        return F.linear(x, F.normalize(self.weight, dim=-1) * self.scale[:, None])


class DINOLoss(nn.Module):
    """Cross-entropy of the student's outputs with the teacher's centred and sharpened ones, over pairs of different views.

    The centre, a running mean of the teacher's outputs, and the teacher's temperature keep outputs from collapsing: one
    makes them uniform, the other peaked. A forward call only notes the batch's mean; call `update_center` once an optimizer step.
    """

    def __init__(self, out_dim, student_temp=0.1, center_momentum=0.9):
        super().__init__()
        self.student_temp, self.center_momentum = student_temp, center_momentum
        self.register_buffer("center", torch.zeros(out_dim))
        self.register_buffer("batch_sum", torch.zeros(out_dim), persistent=False)    # of the batches since the last update
        self.register_buffer("batches", torch.zeros(()), persistent=False)

    def targets(self, teacher, teacher_temp):
        """Assignment probabilities (..., K) of teacher outputs (..., K)."""
        return ((teacher.detach().float() - self.center) / teacher_temp).softmax(dim=-1)

    def forward(self, student, teacher, teacher_temp):
        """student: (V, B, K), teacher: (G, B, K); views of the same index are the same view, and that pair is skipped.

        Returns the mean over pairs and images, a scalar between 0 and about ln K.
        """
        targets = self.targets(teacher, teacher_temp)
        total = 0.0
        pairs = 0
        for v, logits in enumerate(student):
            teachers = [target for q, target in enumerate(targets) if q != v]
            log_p = (logits.float() / self.student_temp).log_softmax(dim=-1)    # (B, K)
            total = total - (sum(teachers) * log_p).sum(dim=-1).mean()          # cross-entropies with all its teachers, added up
            pairs += len(teachers)
        self.batch_sum += teacher.detach().float().mean(dim=(0, 1))
        self.batches += 1
        return total / pairs

    @torch.no_grad()
    def update_center(self):
        """center <- m center + (1 - m) mean of the teacher's outputs since the last call, over all processes."""
        mean = self.batch_sum / self.batches
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        self.center.lerp_(mean, 1 - self.center_momentum)
        self.batch_sum.zero_()
        self.batches.zero_()
