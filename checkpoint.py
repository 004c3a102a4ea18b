"""What stops a run, and what it goes on from: signals, files that are whole or not there, and the log."""

import contextlib
import json
import os
import signal
import sys

import numpy as np
import torch
from PIL import Image


@contextlib.contextmanager
def stop_requests():
    """A list that a SIGTERM or Ctrl-C is put into; a second one ends the process at once."""
    requests, before = [], {}

    def note(number, frame):
        requests.append(number)
        sys.stderr.write("\nstopping after this step, with a checkpoint; once more to stop at once\n")
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, note)
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def save(state, path):
    """torch.save that leaves either the old file or the new one, whole, whatever happens. Raises OSError."""
    temporary = path.with_name(path.name + ".part")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name == "posix":    # the new name has to reach the disk too
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except (OSError, RuntimeError) as error:    # PyTorch's writer turns a full disk into a RuntimeError
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written ({error}); the file from before, if there is one, is whole") from error


def find_checkpoint(path, arguments, remedy="Use another --output_dir, or --overwrite"):
    """The checkpoint at `path`, or None. Raises OSError where it is damaged or comes from other training arguments."""
    if not path.exists():
        return None
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        before = checkpoint["arguments"]
    except Exception as error:
        raise OSError(f"{path} is damaged, or no checkpoint. {remedy}") from error
    if before.keys() != arguments.keys():
        raise OSError(f"{path} was written by another version of this program. {remedy}")
    if before.get("recipe") != arguments.get("recipe"):
        raise OSError(f"{path} is of a run with --recipe {before['recipe']}, not {arguments['recipe']}. {remedy}")
    different = [f"{name} was {before[name]}, is {value}" for name, value in arguments.items() if before[name] != value]
    if different:
        raise OSError(f"{path} is of a run with other arguments: {'; '.join(different)}. {remedy}")
    return checkpoint


class Log:
    """log.jsonl, a JSON object a line, its kind "step" (values of that step) or "epoch" (means over it). Lines after
    `step`, of a run that was cut off later than its checkpoint, are removed, and so is what is no such line.

    tensorboard: the same goes to a folder of that name beside it, as kind/name. Raises OSError where TensorBoard is not installed.
    """

    def __init__(self, path, step, tensorboard=False):
        self.board = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter    # an extra, asked for by name
            except ImportError as error:
                raise OSError("--tensorboard needs it installed: pip install tensorboard") from error
            self.board = SummaryWriter(path.parent / "tensorboard", purge_step=step + 1 if step else None)
        kept, self.epochs = [], set()    # epochs: the steps at whose end an epoch has its line
        for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
            with contextlib.suppress(ValueError, TypeError, KeyError):    # a line cut short by a kill
                values = json.loads(line)
                if 0 < step >= values["step"]:
                    kept.append(line + "\n")
                    self.epochs |= {values["step"]} if values["kind"] == "epoch" else set()
        temporary = path.with_name(path.name + ".part")
        temporary.write_text("".join(kept))
        os.replace(temporary, path)
        self.file = open(path, "a", buffering=1)

    def write(self, *, kind, step, **values):
        self.file.write(json.dumps({"kind": kind, "step": step} | values) + "\n")
        if self.board:
            for name, value in values.items():
                if value is not None:
                    self.board.add_scalar(f"{kind}/{name}", value, step)
            self.board.flush()

    def picture(self, path, step):
        """Show a PNG file in TensorBoard too."""
        if self.board:
            with Image.open(path) as image:
                self.board.add_image(path.stem, np.asarray(image.convert("RGB")), step, dataformats="HWC")
            self.board.flush()
