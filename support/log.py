"""log.jsonl, and the same for TensorBoard."""

import contextlib
import json

import numpy as np
from PIL import Image

from support.checkpoint import replacing
from support.errors import UserError


def summary_writer():
    """Return TensorBoard's SummaryWriter. Raises UserError where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--tensorboard needs it: pip install tensorboard") from error
    return SummaryWriter


class Log:
    """log.jsonl: a JSON object a line, of kind "step" or, with means over it, "epoch".

    Lines after `step`, of a run that was cut off later than its checkpoint, are removed, and so is
    what is no such line. `epochs`: {step at its end: the epoch's line}. board: TensorBoard's
    SummaryWriter, to write the same to a folder `tensorboard` beside it, or None.
    """

    def __init__(self, path, step, board=None):
        purge = step + 1 if step else None
        self.board = board and board(path.parent / "tensorboard", purge_step=purge)
        kept, self.epochs = [], {}
        for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
            with contextlib.suppress(ValueError, TypeError, KeyError):    # cut short by a kill
                values = json.loads(line)
                if 0 < step >= values["step"]:
                    kept.append(line + "\n")
                    if values["kind"] == "epoch":
                        self.epochs[values["step"]] = values
        with replacing(path) as file:
            file.write("".join(kept).encode())
        self.file = open(path, "a", buffering=1)

    def write(self, *, kind, step, **values):
        if kind == "epoch":
            self.epochs[step] = values
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
                pixels = np.asarray(image.convert("RGB"))
            self.board.add_image(path.stem, pixels, step, dataformats="HWC")
            self.board.flush()
