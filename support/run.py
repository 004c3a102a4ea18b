"""The output folder of a training run, and what happens beside its steps.

Resuming, checkpoints, the log, pictures, signals, and kNN at its times.

What train.py's loop says to it: `run.add(losses)` after every step, `run.log(...)`, `run.save(...)`
and `run.end_epoch(...)` when they are due, and `run.stop_asked()`.
"""

import hashlib
import json
import math
import platform
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from tqdm import tqdm

from augment import normalize
from baselines import entropy
from data import Readable, labeled
from evaluate import knn_accuracy
from model import ARCHITECTURES
from relations import spatial_relation
from sampler import overlap
from support.checkpoint import find_checkpoint, replacing, restore, save
from support.distributed import average_over_processes
from support.errors import UserError
from support.inputs import evaluation_crop
from support.log import Log, summary_writer
from support.progress import say

TERMS = ("loss", "L_I", "L_p", "L_c")

# A run may be resumed with other values of these.
NOT_TRAINING = {
    "output_dir", "overwrite", "num_workers", "max_steps", "checkpoint_steps",
    "knn_every", "log_every", "compile", "deterministic", "tensorboard",
    "data_path", "classes", "label_depth",    # but the same images
}

LOWER_LR = "Try a lower --lr, a longer --warmup_epochs, or --precision bf16 or fp32"


def digest(state):
    """Return a short hash of the tensors in a state dict."""
    content = hashlib.sha256()
    for value in state.values():
        content.update(value.cpu().numpy().tobytes())
    return content.hexdigest()[:12]


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or "cpu"


class Run:
    """A training run in its folder. Enter it to catch signals.

    `step` is how many steps are done. training: train.Training, whose state is resumed here.
    images, val: data sets; val may be None. Raises UserError where the folder holds a run that this
    one can't go on from.
    """

    def __init__(self, args, processes, training, images, val):
        self.args, self.processes, self.training = args, processes, training
        self.images, self.val = images, val
        self.folder, self.is_main = Path(args.output_dir), processes.rank == 0
        self.steps = args.epochs * training.steps_per_epoch    # of the schedules
        self.last_step = min(self.steps, args.max_steps or self.steps)    # of this command
        self.step, self.history = 0, []
        self.sums = dict.fromkeys(TERMS, 0.0)    # over the epoch so far
        self.requests, self.unreadable, self.named = [], 0, set()
        self.arguments = self.compared()
        board = summary_writer() if args.tensorboard and self.is_main else None
        self.resume()
        if self.is_main:    # from here on files are deleted and written
            if args.overwrite:
                self.delete()
            self.write_arguments()
            self.lines = Log(self.folder / "log.jsonl", self.step, board)
        self.bar = tqdm(total=max(self.step, self.last_step), initial=self.step, unit="step",
                        disable=None if self.is_main else True, dynamic_ncols=True)
        self.start_window()

    def compared(self):
        """Return the arguments that a run and its checkpoint must share.

        Files stand in it by what is in them: they may have moved.
        """
        values = {name: value for name, value in vars(self.args).items()
                  if name not in NOT_TRAINING}
        values |= {"processes": self.processes.size, "images": len(self.images),
                   "names of images": self.images.identity}
        if self.args.init_from:
            values["init_from"] = digest(self.training.student.backbone.state_dict())
        return values

    def resume(self):
        """Take the state of the checkpoint in the folder, unless it is to be deleted."""
        path = self.folder / "checkpoint.pth"
        checkpoint = None if self.args.overwrite else find_checkpoint(path, self.arguments)
        if checkpoint:
            parts = self.training.parts() | {"sums": self.sums}
            self.step = restore(parts, checkpoint, path, "step", self.steps)
        if self.processes.sum(self.step) != self.step * self.processes.size:
            raise UserError(f"the processes found different checkpoints in {self.folder}/; it must "
                            "be one folder for all machines")

    def delete(self):
        """Delete the run in the folder."""
        for name in ("checkpoint.pth", "backbone.pth", "views.png", "attention.png"):
            (self.folder / name).unlink(missing_ok=True)
        shutil.rmtree(self.folder / "tensorboard", ignore_errors=True)

    def write_arguments(self):
        """Write args.json: all arguments, and what they became here."""
        facts = {
            "processes": self.processes.size, "effective_batch": self.training.effective_batch,
            "effective_lr": self.training.top_lr, "device": device_name(self.processes.device),
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "torchvision": torchvision.__version__},
        }
        text = json.dumps(vars(self.args) | facts, indent=2) + "\n"
        with replacing(self.folder / "args.json") as file:
            file.write(text.encode())

    def say(self, text):
        """Print a line, in the first process, above the progress bar."""
        if self.is_main:
            say(text)

    # --- signals ----------------------------------------------------------------------------------

    def __enter__(self):
        """Note a SIGTERM or Ctrl-C from here on; a second one ends the process at once."""
        def note(number, frame):
            self.requests.append(number)
            sys.stderr.write("\nstopping after this step, with a checkpoint; again: at once\n")
            signal.signal(number, signal.SIG_DFL)    # which ends it even where Python waits

        numbers = (signal.SIGINT, signal.SIGTERM)
        self.handlers = {number: signal.signal(number, note) for number in numbers}
        return self

    def __exit__(self, *error):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.bar.close()

    def stop_asked(self):
        """Return whether any process was asked to stop; all call it together, and agree."""
        return self.processes.sum(len(self.requests)) > 0

    # --- what a step leaves -----------------------------------------------------------------------

    def start_window(self):
        """Begin to measure images/s and how long batches are waited for."""
        self.window, self.waited = (self.step, time.perf_counter()), 0.0

    def watch(self, loader):
        """Yield the loader's batches, time the waiting, and pass on its complaints."""
        batches = iter(loader)
        while True:
            asked = time.perf_counter()
            batch, complaints = next(batches)
            self.waited += time.perf_counter() - asked
            for complaint in "\n".join(filter(None, complaints)).splitlines():
                self.unreadable += 1
                self.complain(complaint)
            yield batch

    def complain(self, line):
        """Print "an image can't be read: why; what is done", once an image and process."""
        fault = line.rpartition(";")[0]
        if fault not in self.named:
            self.named.add(fault)
            say(line, sys.stderr)

    def add(self, losses):
        """Note the losses of a step, (TERMS,), without waiting for the device."""
        self.history.append(losses)
        self.step += 1
        self.bar.update()

    def collect(self):
        """Average the losses noted over processes; return those of the last step.

        Raises UserError naming the first step and the terms in it that are not finite.
        """
        if self.history:
            values = average_over_processes(torch.stack(self.history)).tolist()    # waits here
            for step, row in enumerate(values, start=self.step - len(values) + 1):
                terms = zip(TERMS, row)
                if faults := [f"{name} is {x}" for name, x in terms if not math.isfinite(x)]:
                    raise UserError(f"{', '.join(faults)} in step {step}. {self.kept()}")
            for name, column in zip(TERMS, zip(*values)):
                self.sums[name] += sum(column)
            self.history, self.last = [], dict(zip(TERMS, values[-1]))
        return self.last

    def kept(self):
        """Say what there is to go on from, and how, after numbers that are not finite."""
        saved = (self.folder / "checkpoint.pth").exists()
        return f"{'The last checkpoint is whole' if saved else 'Nothing was saved'}. {LOWER_LR}"

    def log(self, output):
        """Write a line about the last step, whose train.StepOutput is given, and show it."""
        losses, (first, start) = self.collect(), self.window
        lr = self.training.lr[self.step - 1].item()
        values = {"lr": lr} | diagnostics(self.training, output, self.step - 1)
        seconds = time.perf_counter() - start
        images_per_s = (self.step - first) * self.training.effective_batch / seconds
        cuda, unreadable = self.processes.device.type == "cuda", self.processes.sum(self.unreadable)
        if self.is_main:
            self.lines.write(
                kind="step", step=self.step, epoch=self.step / self.training.steps_per_epoch,
                **losses, **values, images_per_s=images_per_s, data_wait=self.waited / seconds,
                peak_memory_gib=torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
                unreadable=unreadable,
            )
        self.show(losses, lr, images_per_s)
        self.unreadable = 0
        self.start_window()

    def show(self, losses, lr, images_per_s):
        """Show where the run is, in the bar, or in a line where there is no terminal."""
        args, epoch = self.args, self.step / self.training.steps_per_epoch
        weights = {"L_I": args.li_weight, "L_p": args.alpha, "L_c": args.beta}
        shown = {name: f"{value:.3f}" for name, value in losses.items() if weights.get(name, 1)}
        shown |= {"lr": f"{lr:.2g}", "images/s": f"{images_per_s:.0f}"}
        self.bar.set_description(f"epoch {epoch:.2f}/{args.epochs}", refresh=False)
        self.bar.set_postfix(shown)
        if self.bar.disable:    # no terminal
            listed = ", ".join(f"{name} {value}" for name, value in shown.items())
            self.say(f"step {self.step}/{self.last_step}, epoch {epoch:.2f}: {listed}")

    # --- checkpoints and epochs -------------------------------------------------------------------

    def save(self):
        """Write checkpoint.pth and backbone.pth; refuse weights that are not finite."""
        self.collect()
        names, parameters = zip(*self.training.student.named_parameters())
        norms = torch.stack(torch._foreach_norm(parameters)).tolist()
        faults = [name for name, norm in zip(names, norms) if not math.isfinite(norm)]
        if faults:    # a finite loss can have gradients that are not
            raise UserError(f"{len(faults)} parameters are not finite after step {self.step}, "
                            f"{faults[0]} among them. {self.kept()}")
        if self.is_main:
            save(self.training.teacher.backbone.state_dict(), self.folder / "backbone.pth")
            state = {name: part.state_dict() for name, part in self.training.parts().items()}
            state |= {"step": self.step, "sums": self.sums, "arguments": self.arguments}
            save(state, self.folder / "checkpoint.pth")
        self.start_window()

    def end_epoch(self):
        """Write the line of an epoch into the log, with kNN if it is due.

        It follows the checkpoint: a kill during kNN costs the line alone, and `begin` makes up for
        it.
        """
        epoch = self.step // self.training.steps_per_epoch
        steps = self.training.steps_per_epoch
        values = {name: total / steps for name, total in self.sums.items()} if epoch else {}
        if self.val is not None and (epoch % self.args.knn_every == 0 or self.step == self.steps):
            accuracy = self.knn(epoch)
            if accuracy is None:    # stopped
                return
            values |= accuracy
        if self.is_main and values:
            self.lines.write(kind="epoch", step=self.step, epoch=epoch, **values)
        self.sums = dict.fromkeys(TERMS, 0.0)
        self.start_window()

    def describe(self):
        """Say what is trained on what."""
        args, size = self.args, self.processes.size
        terms = [(args.li_weight, f"L_I({args.baseline})"), (args.alpha, "L_p"), (args.beta, "L_c")]
        loss = " + ".join(f"{weight:g} {name}" for weight, name in terms if weight)
        labels = f"{self.images.classes} classes; labels are for kNN only"
        labels = labels if len(labeled(self.images)) else f"no labels: {self.images.unlabeled}"
        compiled = ", compiled" if args.compile else ""
        self.say(f"{args.recipe}: {args.arch}/{args.patch_size}, L = {loss}")
        self.say(f"{len(self.images)} images of {args.data_path} ({labels})")
        self.say(f"{size} process(es) on {self.processes.device.type}, {args.precision}{compiled}")
        part = f", of which --max_steps does {self.last_step}" if args.max_steps else ""
        self.say(f"{args.epochs} epochs of {self.training.steps_per_epoch} steps{part}; effective "
                 f"batch {self.training.effective_batch}, learning rate "
                 f"{self.training.top_lr:.2g}; results go to {self.folder}/")

    def begin(self):
        """Say what is trained or resumed, and write an epoch's line that is due."""
        args = self.args
        self.describe()
        if self.step:
            finished = f"{self.folder}/ holds a finished run; for another use another --output_dir"
            self.say(f"going on after step {self.step}" if self.step < self.steps
                     else f"{finished}, or --overwrite")
        if args.knn_every and self.val is None:
            path = args.data_path
            self.say(f"no kNN while training: it needs a folder a class in {path}/train and "
                     f"{path}/val")
        if self.step % self.training.steps_per_epoch == 0:
            if self.processes.sum(int(self.is_main and self.step not in self.lines.epochs)):
                self.end_epoch()
            self.sums = dict.fromkeys(TERMS, 0.0)
        if args.compile and self.step < self.last_step:
            self.say("the first step compiles, which takes a minute or more")

    def knn(self, epoch):
        """Return {"kNN": accuracy of the teacher in %}, or None where the run is to stop.

        Images that can't be read are named and left out; {} if no others are left.
        """
        if epoch == 0:
            self.say("kNN before training, to compare with; --knn_every 0 does without")
        encoder, args = self.training.teacher.backbone, self.args
        accuracy = knn_accuracy(
            encoder.eval(), self.images, self.val, args.global_crops_size,
            self.processes.device, most=20_000, batch_size=args.batch_size_per_gpu,
            num_workers=args.num_workers, stop_asked=self.stop_asked, leave_out=self.leave_out,
        )
        encoder.train()    # a ResNet's batch norms
        if accuracy is None:
            return None
        when = f"epoch {epoch}" if epoch else "before training"
        if not accuracy:
            self.say(f"{when}: no kNN, as no image can be read")
            return {}
        self.say(f"{when}: kNN {accuracy[20]:.1f} %")
        return {"kNN": accuracy[20]}

    def leave_out(self, images, index):
        """Name an image that kNN could not read."""
        try:
            images[index]    # in this process, to have the error
        except UserError as error:
            self.complain(f"{error}; kNN does without it")

    # --- pictures ---------------------------------------------------------------------------------

    def draw_views(self, views, boxes):
        """Draw views.png: the views of four images, their overlaps and sampling points."""
        if self.is_main:
            from extras.visualize import draw_views
            points = (self.args.overlap_global, self.args.overlap_local)
            path = self.folder / "views.png"
            draw_views(path, [v[:, :4].cpu() for v in views], boxes[:, :4].cpu(), points)
            self.lines.picture(path, self.step)

    def draw_attention(self, number=6):
        """Draw attention.png: what the class token attends to (Fig. 4); none for a ResNet."""
        encoder, images = self.training.teacher.backbone, Readable(self.val or self.images)
        if self.is_main and encoder.heads:
            from extras.visualize import draw_attention
            chosen = np.random.default_rng(0).permutation(len(images))[:number]
            crop = evaluation_crop(self.args.global_crops_size)
            crops = torch.stack([crop(images[int(i)][0]) for i in chosen])
            path = self.folder / "attention.png"
            crops = normalize(crops.to(self.processes.device).float() / 255)
            draw_attention(path, [encoder], [f"step {self.step}"], crops)
            self.lines.picture(path, self.step)

    def finish(self):
        """Say how the run ended, and draw attention.png unless it was stopped."""
        if self.stop_asked():
            name = signal.Signals(self.requests[0]).name if self.requests else "a signal"
            self.say(f"stopped by {name} after step {self.step} of {self.steps}; rerun the same "
                     "command to resume")
            return
        self.draw_attention()
        self.summarize()
        if self.step < self.steps:
            end = (f"stopped after step {self.step} of {self.steps}" if self.step == self.last_step
                   else f"nothing to do: step {self.step} of {self.steps} was done before")
            self.say(f"{end}, as --max_steps is {self.args.max_steps}; rerun with a larger one, or "
                     "without, to go on")
        elif len(labeled(self.images)):
            self.say(f"done. What it is worth: {self.evaluation()}")
        else:
            self.say(f"done: {self.folder}/backbone.pth")

    def summarize(self):
        """Say what kNN and the losses were, epoch by epoch, and where the pictures are."""
        if self.is_main:
            measured = [line for line in self.lines.epochs.values() if "kNN" in line]
            names = [name for name in ("kNN", *TERMS) if any(line.get(name) for line in measured)]
            header = [" epoch", *(f"{name:>8}" for name in names)]
            rows = [[f"{line['epoch']:6}", *(f"{line[name]:8.2f}" if name in line else 8 * " "
                                             for name in names)] for line in measured]
            for row in [header, *rows] if len(rows) > 1 else []:
                self.say("".join(row))
            pictures = [self.folder / name for name in ("views.png", "attention.png")]
            self.say(f"pictures: {', '.join(str(path) for path in pictures if path.exists())}")

    def evaluation(self):
        """Return the command that measures the encoder by kNN."""
        args, heads = self.args, self.training.teacher.backbone.heads
        command = ["python", "evaluate.py", "knn", "--pretrained_weights",
                   f"{self.folder}/backbone.pth", "--data_path", args.data_path]
        if heads != ARCHITECTURES[args.arch]["heads"]:
            command += ["--heads", str(heads)]
        if args.label_depth:
            command += ["--label_depth", str(args.label_depth)]
        if args.classes:
            command += ["--classes", args.classes]
        return shlex.join(command)


@torch.no_grad()
def diagnostics(training, output, step):
    """Return what shows a collapse, or relations that say nothing: {name: number}.

    Entropies are in nats, at most ln K, ln N and ln C; feature_std is 1 for features that are
    spread out and 0 for constant ones; overlap is the share of pairs that L_p sees.
    """
    teacher, boxes, loss = output.teacher, output.boxes, training.relation_loss
    G, C = len(teacher.cls), teacher.cls.shape[-1]
    pairs = [(q, v) for q in range(G) for v in range(len(boxes)) if v != q]
    valid = [overlap(boxes[q], boxes[v])[1] for q, v in pairs]
    spread = F.normalize(teacher.cls.float(), dim=-1).std(dim=1, correction=0).mean() * C**0.5
    values = {"feature_std": spread.item(), "overlap": torch.stack(valid).float().mean().item()}
    if teacher.p:
        A_p = spatial_relation(teacher.p[0], loss.heads, loss.t_p1).softmax(dim=-1)
        values["spatial_entropy"] = entropy(A_p)
    if teacher.c:
        A_c = loss.channel_relation(teacher.c[0], loss.t_c1).softmax(dim=-1)
        values["channel_entropy"] = entropy(A_c)
    temp = training.teacher_temp[step // training.steps_per_epoch]
    return values | training.embedding_loss.diagnostics(teacher.embedding, temp)
