"""Files that are whole or not there, one run a folder, and what a run may go on from."""

import contextlib
import os
from pathlib import Path

import torch

from support.errors import UserError

try:
    import fcntl
except ImportError:    # Windows
    fcntl = None


def check_output(flag, path):
    """Raise UserError where a file can't be written to `path`, which may be None."""
    if path and (Path(path).is_dir() or not Path(path).absolute().parent.is_dir()):
        raise UserError(f"--{flag} {path}: it is a folder, or its folder does not exist")


LOCKS = set()    # file descriptors of the folders that this process has locked

if fcntl:    # a loader's worker would hold the lock of a killed run for some seconds more
    os.register_at_fork(after_in_child=lambda: [os.close(lock) for lock in LOCKS])


@contextlib.contextmanager
def output_folder(path, is_main):
    """Make the folder that a run writes to, and lock it in the first process.

    Raises UserError where it can't be made, or another run is in it. The lock ends with its
    process, even a killed one.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the output folder {path} can't be made: {error}") from error
    if not (is_main and fcntl):
        yield
        return
    lock = os.open(path, os.O_RDONLY)
    LOCKS.add(lock)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise UserError(f"another run is at work in {path}/; give this one another --output_dir"
                        ) from error
    finally:
        LOCKS.remove(lock)
        os.close(lock)


def save(state, path):
    """Save like torch.save, but leave either the old file or the new one, whole.

    Raises UserError where it could not be written.
    """
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
    except (OSError, RuntimeError) as error:    # PyTorch's writer makes a full disk a RuntimeError
        temporary.unlink(missing_ok=True)
        before = "the file from before, if there is one, is whole"
        raise UserError(f"{path} could not be written ({error}); {before}") from error


def find_checkpoint(path, arguments, remedy="use another --output_dir, or --overwrite"):
    """Return the checkpoint at `path`, or None where there is none.

    Raises UserError where it is damaged, or of a run with other arguments, which are listed.
    """
    if not path.exists():
        return None
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        before = checkpoint["arguments"]
    except Exception as error:
        raise UserError(f"{path} is damaged, or no checkpoint; {remedy}") from error
    if before.keys() != arguments.keys():
        raise UserError(f"{path} was written by another version of this program; {remedy}")
    if before.get("recipe") != arguments.get("recipe"):
        recipes = f"{before['recipe']}, not {arguments['recipe']}"
        raise UserError(f"{path} is of a run with --recipe {recipes}; {remedy}")
    different = [f"{name} was {before[name]}, is {value}" for name, value in arguments.items()
                 if before[name] != value]
    if different:
        listed = "; ".join(different)
        raise UserError(f"{path} is of a run with other arguments: {listed}; {remedy}")
    return checkpoint
