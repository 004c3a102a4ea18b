"""Train a Vision Transformer without labels, with SERE: L = L_I + α L_p + β L_c.

L_I is an existing method's loss, L_p and L_c are those of feature self-relations (Eq. 6).

    python train.py                                     the demo: drawn images, minutes on a CPU
    python train.py --data_path /path/to/imagenet       DINO + SERE on one GPU
    torchrun --standalone --nproc_per_node=8 train.py --data_path ...    the paper's Sec. 4.1

From the top: networks, losses, one step, the loop. The command line is in support/options.py; what
a run writes, and how it resumes, in support/run.py.

B batch of a process, V views, G global views, S side of a view, N patches
"""

import contextlib
import sys
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function
from torch.utils.data import DataLoader

from augment import BOX, BlockMask, MultiCrop, Photometric
from baselines import DINOHead, DINOLoss, IBOTHead, IBOTLoss, Loss, MoCoHead, MoCoLoss
from data import Batches, NoSplit, ViewsOfImages, build_dataset, labeled
from model import Network, Output, build_encoder, update_teacher
from relations import RelationHead, SelfRelationLoss
from support.checkpoint import output_folder
from support.distributed import Processes, check_alike, check_compiler, configure
from support.errors import UserError
from support.optim import clip_gradients, cosine_schedule, parameter_groups
from support.options import parse_train_args
from support.run import Run
from support.weights import load_encoder
from support.workers import check_shared_memory, ignore_signals

# --- networks -------------------------------------------------------------------------------------


def build_mask(args):
    """Return the BlockMask of iBOT; None where nothing is hidden from the student."""
    if args.baseline == "ibot" and args.li_weight:
        grid = args.global_crops_size // args.patch_size
        return BlockMask(grid, args.pred_ratio, args.pred_ratio_var)
    return None


def build_head(args, dim, student):
    """Return the head P of L_I for one of the networks; None for --li_weight 0."""
    if args.li_weight == 0:
        return None
    if args.baseline == "mocov3":
        return MoCoHead(dim, args.out_dim, predictor=student, hidden_dim=args.hidden_dim)
    options = dict(norm_last_layer=args.norm_last_layer, hidden_dim=args.hidden_dim)
    if args.baseline == "dino":
        return DINOHead(dim, args.out_dim, **options)
    options["patch_out_dim"] = None if args.shared_head else args.patch_out_dim
    if args.baseline == "ibot":
        most = build_mask(args).most
        return IBOTHead(dim, args.out_dim, most=most, teacher=not student, **options)
    from extras.ablations import DINOPlusHead
    return DINOPlusHead(dim, args.out_dim, **options)


def build_network(args, student, initial=None):
    """Return the student, or the teacher: without g, local heads and masks.

    initial: an encoder whose weights it takes.
    """
    backbone = build_encoder(
        args.arch, args.global_crops_size, args.patch_size,
        drop_path_rate=args.drop_path_rate if student else 0.0,
        masked=student and build_mask(args) is not None,
        heads=args.heads or (initial and initial.heads),
    )
    if initial:
        backbone.load_state_dict(backbone.state_dict() | initial.state_dict())
    if args.stop_grad_conv1:
        if not initial:    # MoCo v3's scale, which matters, as it stays
            torch.nn.init.xavier_uniform_(backbone.patch_embed.proj.weight.flatten(1))
        backbone.patch_embed.requires_grad_(False)
    head = build_head(args, backbone.dim, student)
    resolutions = 2 if student and args.local_crops_number else 1
    g = student and not args.symmetric
    spatial = [RelationHead(backbone.dim, g) for _ in range(resolutions if args.alpha else 0)]
    channel = [RelationHead(backbone.dim, g) for _ in range(resolutions if args.beta else 0)]
    return Network(backbone, head, spatial, channel)


def build_networks(args):
    """Return (student, teacher) with the same weights."""
    initial = None
    if args.init_from:
        size = args.global_crops_size
        initial = load_encoder(args.init_from, args.arch, heads=args.heads, image_size=size)
        if initial.patch_size != args.patch_size:
            wrong = f"--init_from {args.init_from} has --patch_size {initial.patch_size}"
            raise UserError(f"{wrong}, not {args.patch_size}")
    student = build_network(args, True, initial)
    teacher = build_network(args, False, initial)
    weights = student.state_dict()
    teacher.load_state_dict({name: weights[name] for name in teacher.state_dict()})
    return student, teacher.requires_grad_(False)


# --- losses ---------------------------------------------------------------------------------------


def build_embedding_loss(args):
    """Return the loss R of L_I (Eq. 1)."""
    out_dims = (args.out_dim, args.out_dim if args.shared_head else args.patch_out_dim)
    if args.li_weight == 0:
        return Loss()
    if args.baseline == "dino":
        return DINOLoss(args.out_dim)
    if args.baseline == "ibot":
        return IBOTLoss(*out_dims)
    if args.baseline == "mocov3":
        return MoCoLoss(args.moco_t)
    from extras.ablations import DINOPlusLoss
    return DINOPlusLoss(*out_dims, args.overlap_global, args.overlap_local)


def build_relation_loss(args):
    """Return the loss of L_p and L_c (Eq. 3 and 5)."""
    kind = SelfRelationLoss
    if args.channel_relation == "batch":
        from extras.ablations import BatchRelationLoss as kind
    return kind(
        args.relation_heads, args.temperature_spatial, args.temperature_channel, args.sharpen,
        args.overlap_global, args.overlap_local,
    )


def teacher_temperatures(args):
    """Return the teacher's temperatures, (epochs,), or for cls and patch (epochs, 2)."""
    def warm_up(low, high):
        n = args.warmup_teacher_temp_epochs
        rise = torch.linspace(min(low, high), high, n)
        return torch.cat([rise, torch.full((args.epochs - n,), high)])

    temperature = warm_up(args.warmup_teacher_temp, args.teacher_temp)
    if args.baseline not in ("ibot", "dino+"):
        return temperature
    patches = warm_up(args.warmup_teacher_patch_temp, args.teacher_patch_temp)
    return torch.stack([temperature, patches], dim=1)


# --- one step -------------------------------------------------------------------------------------


class StepOutput(NamedTuple):
    """Outputs of one step, for logging; but for losses, of the last micro-batch."""

    losses: torch.Tensor    # (4,): L, L_I, L_p, L_c, means over micro-batches
    views: list             # by resolution, global first, (V, B, 3, S, S)
    boxes: torch.Tensor     # (views, B, 5)
    teacher: Output


class Training:
    """What learns, and one step of it.

    Raises UserError where there are fewer images than a batch, and for a bad --init_from.
    """

    def __init__(self, args, processes, num_images):
        self.args, self.processes = args, processes
        self.effective_batch = args.batch_size_per_gpu * processes.size * args.grad_accum_steps
        self.steps_per_epoch = num_images // self.effective_batch
        if self.steps_per_epoch == 0:
            most = num_images // (processes.size * args.grad_accum_steps)
            lower = f"lower --batch_size_per_gpu to at most {most}"
            raise UserError(f"{args.data_path} has {num_images} images, fewer than a batch of "
                            f"{self.effective_batch}; {lower if most else 'take fewer processes'}")
        torch.manual_seed(args.seed)
        self.student, self.teacher = (net.to(processes.device) for net in build_networks(args))
        args.heads = self.student.backbone.heads    # as found
        self.network = self.student    # as it is called: in DDP, see distribute()
        self.embedding_loss = build_embedding_loss(args).to(processes.device)
        self.relation_loss, self.photometric = build_relation_loss(args), Photometric()
        named = self.student.named_parameters()
        self.last_layer = [parameter for name, parameter in named if "last_layer" in name]
        groups = parameter_groups(self.student)
        adamw = args.optimizer == "adamw"
        self.optimizer = (torch.optim.AdamW(groups, fused=True) if adamw
                          else torch.optim.SGD(groups, momentum=0.9))
        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
        self.dtype = dtypes[args.precision]
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=args.precision == "fp16")

        # A value a step, on the CPU, where asking for one waits for nothing.
        steps = args.epochs * self.steps_per_epoch
        warmup = args.warmup_epochs * self.steps_per_epoch
        self.top_lr = args.lr * self.effective_batch / 256
        self.lr = cosine_schedule(self.top_lr, args.min_lr, steps, warmup)
        self.weight_decay = cosine_schedule(args.weight_decay, args.weight_decay_end, steps)
        self.momentum = cosine_schedule(args.momentum_teacher, 1.0, steps)
        # A tensor on the device: torch.compile would take each new number for a new graph.
        self.teacher_temp = teacher_temperatures(args).to(processes.device)

    def parts(self):
        """Return what has a state, by the name it has in a checkpoint."""
        return {"student": self.student, "teacher": self.teacher, "optimizer": self.optimizer,
                "scaler": self.scaler, "baseline": self.embedding_loss}

    def distribute(self):
        """Compile and wrap in DDP, after any state is loaded."""
        modules = (self.student, self.teacher, self.photometric, self.embedding_loss,
                   self.relation_loss)
        for module in modules if self.args.compile else ():
            module.compile(dynamic=False)
        if self.processes.distributed:
            self.network = DistributedDataParallel(self.student, gradient_as_bucket_view=True)

    def to_views(self, batch):
        """Bring a batch (augment.Views) to the device and color it: (views, boxes, mask)."""
        device = self.processes.device
        crops = [x.to(device, non_blocking=True).transpose(0, 1) for x in batch.crops]
        params = batch.params.to(device, non_blocking=True).transpose(0, 1)      # (views, B, 16)
        mask = batch.mask.to(device, non_blocking=True).transpose(0, 1)          # (G, B, N)
        parts = params.split([len(x) for x in crops])
        views = [self.photometric(x.flatten(0, 1), r.flatten(0, 1)).unflatten(0, x.shape[:2])
                 for x, r in zip(crops, parts)]                                  # (V, B, 3, S, S)
        return views, params[..., BOX], mask

    def step(self, step, batches):
        """Train on the next batches of an iterator; `step` steps were done before."""
        args, epoch = self.args, step // self.steps_per_epoch
        stochastic_depth = np.random.SeedSequence((args.seed, step, self.processes.rank))
        torch.manual_seed(int(stochastic_depth.generate_state(1)[0]))
        losses = 0
        for micro_step in range(args.grad_accum_steps):
            batch = next(batches)
            with record_function("views"):
                views, boxes, mask = self.to_views(batch)
            with self.synchronization(micro_step):
                with self.autocast():
                    with record_function("teacher"), torch.no_grad():
                        t = self.teacher(views[:1], mask)
                    with record_function("student"):
                        s = self.network(views, mask)
                with record_function("losses"):
                    temp = self.teacher_temp[epoch]
                    L_I = self.embedding_loss(s.embedding, t.embedding, temp, boxes)    # Eq. 1
                    L_p, L_c = self.relation_loss(                                      # Eq. 3, 5
                        p1=t.p, c1=t.c, g_p2=s.p, g_c2=s.c, boxes=boxes)
                    loss = args.li_weight * L_I + args.alpha * L_p + args.beta * L_c    # Eq. 6
                with record_function("backward"):
                    self.scaler.scale(loss / args.grad_accum_steps).backward()
            losses += torch.stack([loss, L_I, L_p, L_c]).detach() / args.grad_accum_steps
        with record_function("update"):
            self.update(step, epoch)
        return StepOutput(losses, views, boxes, t)

    def autocast(self):
        """Encode in half precision, if asked; losses stay in float32."""
        return torch.autocast(self.processes.device.type, self.dtype, self.dtype != torch.float32)

    def synchronization(self, micro_step):
        """Average gradients over processes once a step, in its last backward pass."""
        if self.processes.distributed and micro_step < self.args.grad_accum_steps - 1:
            return self.network.no_sync()
        return contextlib.nullcontext()

    def update(self, step, epoch):
        """Update the student by its gradients, then the teacher and its center."""
        decayed, _ = self.optimizer.param_groups
        decayed["weight_decay"] = self.weight_decay[step].item()
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr[step].item()
        self.scaler.unscale_(self.optimizer)
        for parameter in self.last_layer if epoch < self.args.freeze_last_layer else ():
            parameter.grad = None
        if self.args.clip_grad:
            clip_gradients(self.student.parameters(), self.args.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        update_teacher(self.student, self.teacher, self.momentum[step].item())
        self.embedding_loss.update_center()


# --- the loop -------------------------------------------------------------------------------------


def build_loader(args, images, processes, start=0):
    """Return endless batches (Views, complaints) of this process, after `start` steps."""
    multicrop = MultiCrop(
        args.global_crops_size, args.global_crops_scale,
        args.local_crops_number, args.local_crops_size, args.local_crops_scale, build_mask(args),
    )
    # Shared memory may hold kNN's crops at the same time.
    pixels = 3 * args.global_crops_size**2 + args.local_crops_number * args.local_crops_size**2
    check_shared_memory(3 * args.batch_size_per_gpu * pixels, args.num_workers)
    batches = Batches(
        len(images), args.batch_size_per_gpu, args.grad_accum_steps, processes.rank, processes.size,
        args.seed, start,
    )
    return DataLoader(
        ViewsOfImages(images, multicrop, args.seed), batch_sampler=batches,
        num_workers=args.num_workers, worker_init_fn=ignore_signals,
        pin_memory=processes.device.type == "cuda",
        generator=torch.Generator(),    # or it would draw from the one of stochastic depth
    )


def train(args, training, run, images):
    """Train from the run's step to the last one, or until it is asked to stop."""
    run.begin()
    training.distribute()
    batches = run.watch(build_loader(args, images, training.processes, run.step))
    stopping, output = run.stop_asked(), None
    while run.step < run.last_step and not stopping:
        step, output = run.step, None    # free the previous step's outputs first
        output = training.step(step, batches)
        run.add(output.losses)
        stopping, ends = run.stop_asked(), run.step == run.last_step
        epoch_ends = run.step % training.steps_per_epoch == 0
        if step == 0:
            run.draw_views(output.views, output.boxes)
        if run.step % args.log_every == 0 or ends:
            run.log(output)
        due = args.checkpoint_steps and run.step % args.checkpoint_steps == 0
        if epoch_ends or stopping or ends or due:
            run.save()
        if epoch_ends and not stopping:
            run.end_epoch()
            stopping = run.stop_asked()
    run.finish()


def build_datasets(args):
    """Return training images, and those for kNN, or None where there are no labels."""
    labels, val = (args.label_depth, args.classes), None
    images = build_dataset(args.data_path, "train", *labels)
    if args.knn_every and len(labeled(images)):
        with contextlib.suppress(NoSplit):
            val = build_dataset(args.data_path, "val", *labels)
            val = val if len(labeled(val)) else None
    return images, val


def main(argv=None):
    """Train as the command line says: a list of str, or sys.argv if None."""
    args = parse_train_args(argv)
    with Processes("train.py") as processes:
        configure(args, processes.device)
        check_compiler(args, processes.device)
        images, val = build_datasets(args)
        check_alike(vars(args), train=images, val=val)
        training = Training(args, processes, len(images))
        with (
            output_folder(args.output_dir, processes.rank == 0),
            Run(args, processes, training, images, val) as run,
        ):
            processes.working = True
            train(args, training, run, images)
    if run.requests:
        sys.exit(128 + run.requests[0])    # as a shell reports a process that a signal ended


if __name__ == "__main__":
    main()
