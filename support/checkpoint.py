"""Write whole files, lock a run's folder, and check checkpoints."""

import contextlib
import errno
import os
import pickle
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

OTHER_FOLDER = "use another --output_dir"

# How a disk says that nothing more can be written.
UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO}


@contextlib.contextmanager
def output_folder(path, is_main):
    """Make the folder that a run writes to, and lock it in the first process.

    Raises UserError where it can't be written to, now or later, or another run is in it. The lock
    is on a file `.lock`, as network disks don't lock folders, and ends with its process, even a
    killed one.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        lock = os.open(Path(path) / ".lock", os.O_RDWR | os.O_CREAT, 0o666) if is_main else None
    except OSError as error:
        raise UserError(f"the output folder {path}/ can't be written to: {error.strerror}; "
                        f"{OTHER_FOLDER}") from error
    try:
        with contextlib.nullcontext() if lock is None else locked(lock, path):
            yield
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        where = error.filename or f"the output folder {path}/"
        raise UserError(f"{where} can't be written to: {error.strerror}") from error


@contextlib.contextmanager
def locked(lock, path):
    """Hold a lock on an open file of the folder `path`, and close it afterwards."""
    LOCKS.add(lock)
    try:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        LOCKS.remove(lock)
        os.close(lock)
        raise UserError(f"another run is at work in {path}/; give this one another --output_dir"
                        ) from error
    except OSError:    # a file system without locks
        pass
    try:
        yield
    finally:
        LOCKS.remove(lock)
        os.close(lock)


@contextlib.contextmanager
def replacing(path):
    """Open a binary file that replaces `path` once it is whole."""
    temporary = path.with_name(path.name + ".part")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    if os.name == "posix":    # the new name has to reach the disk too
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def save(state, path):
    """Save like torch.save, but leave either the old file or the new one, whole.

    Raises UserError where it could not be written.
    """
    try:
        with replacing(path) as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:
        cause = error    # PyTorch's writer hides the disk's word behind one of its own
        while not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
            if cause is None:
                raise
        before = "; the file from before is whole" if path.exists() else ""
        raise UserError(f"{path} could not be written: {cause.strerror}{before}") from error


# --- what a run may go on from --------------------------------------------------------------------

# What else would change, beside the number itself.
CONSEQUENCES = {
    "epochs": "the schedules", "processes": "the batch of all",
    "batch_size_per_gpu": "the steps of an epoch", "grad_accum_steps": "the steps of an epoch",
}


def read_checkpoint(path):
    """Return what torch.save wrote to `path`, None without a file.

    Raises UserError for a file that can't be read or is damaged.
    """
    try:
        with open(path, "rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}; {OTHER_FOLDER}") from error
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is not a checkpoint of this program, or is damaged; "
                        f"{OTHER_FOLDER}") from error
    except Exception as error:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise
        raise UserError(f"{path} is damaged, or no checkpoint; {OTHER_FOLDER}") from error


def find_checkpoint(path, arguments, remedy=f"{OTHER_FOLDER}, or --overwrite to delete that run"):
    """Return the checkpoint at `path`, or None where there is none.

    remedy: for a run with other arguments, which are listed. Raises UserError for it, and for a
    file that is damaged or another program's.
    """
    checkpoint = read_checkpoint(path)
    if checkpoint is None:
        return None
    before = checkpoint.get("arguments") if isinstance(checkpoint, dict) else None
    if not isinstance(before, dict):
        raise UserError(f"{path} is not a checkpoint of this program; {OTHER_FOLDER}")
    if before.keys() != arguments.keys():
        odd = ", ".join(sorted(map(str, before.keys() ^ arguments.keys())))
        raise UserError(f"{path} is of another program or version: not both know {odd}; "
                        f"{OTHER_FOLDER}")
    if before.get("recipe") != arguments.get("recipe"):
        recipes = f"{before['recipe']}, not {arguments['recipe']}"
        raise UserError(f"{path} is of a run with --recipe {recipes}; {remedy}")
    different = [f"{name} was {before[name]}, is {value}" +
                 (f" (which changes {CONSEQUENCES[name]})" if name in CONSEQUENCES else "")
                 for name, value in arguments.items() if before[name] != value]
    if different:
        listed = "; ".join(different)
        raise UserError(f"{path} is of a run with other arguments: {listed}; {remedy}")
    return checkpoint


def restore(parts, checkpoint, path, counter, most):
    """Load the state of parts, once all of it is found to fit.

    parts: {name: module, optimizer, scaler, or a dict of numbers}. Returns checkpoint[counter]: how
    much is done, at most `most`. Raises UserError.
    """
    done = checkpoint.get(counter)
    faults = [fault for name, part in parts.items()
              if (fault := misfit(part, checkpoint.get(name), name))]
    if type(done) is not int or not 0 <= done <= most:
        faults.append(f"{counter} is {done}, not 0 to {most}")
    if faults:
        raise UserError(f"{path} does not fit: {'; '.join(faults)}; {OTHER_FOLDER}")
    for name, part in parts.items():
        load = part.update if isinstance(part, dict) else part.load_state_dict
        load(checkpoint[name])
    return done


def misfit(part, state, name):
    """Say in a few words why a state does not fit `part`, None if it does."""
    if not isinstance(part, torch.optim.Optimizer):
        return difference(part if isinstance(part, dict) else part.state_dict(), state, name)
    try:
        groups = [group["params"] for group in part.param_groups]
        if [len(group) for group in groups] != [len(g["params"]) for g in state["param_groups"]]:
            return f"{name} has other groups of parameters"
        for index, parameter in enumerate(sum(groups, [])):
            for key, value in state["state"].get(index, {}).items():
                if getattr(value, "ndim", 0) and value.shape != parameter.shape:
                    shapes = f"{tuple(value.shape)}, not {tuple(parameter.shape)}"
                    return f"{name}'s {key} of parameter {index} is {shapes}"
    except (AttributeError, KeyError, TypeError):
        return f"{name} is not an optimizer's"
    return None


def difference(own, found, name):
    """Return where `found` differs from `own` in keys, kinds or shapes, or None."""
    if not isinstance(found, dict):
        return f"{name} is missing"
    if odd := sorted(map(str, own.keys() ^ found.keys())):
        return f"{name} has no {odd[0]}" if odd[0] in own else f"{name} has {odd[0]} too"
    for key, value in own.items():
        kind, wanted = (tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
                        for x in (found[key], value))
        if kind != wanted:
            return f"{name}'s {key} is {kind}, not {wanted}"
    return None
