"""What ends a program in one line: a user's mistake, and what a machine lacks.

A bug keeps its stack.
"""

import re

import torch


class UserError(Exception):
    """Something that the user can put right; one line that says what and how."""

    def __init__(self, message):
        # A loader's worker passes its error on with the stack before it.
        super().__init__(message.rpartition("UserError: ")[2].strip())


# Words in the errors of PyTorch and the system, and what to say of them: the first that fits.
LACKS = (
    (r"shared memory|Bus error", "the shared memory, /dev/shm, is full: start the container with a "
     "larger --shm-size, or give --num_workers 0"),
    (r"DataLoader worker .*(killed|exited)", "the system ended a loader process, mostly for lack "
     "of memory: lower --num_workers or --batch_size_per_gpu ({})"),
    (r"out of memory|allocate memory|not enough memory|ALLOC_FAILED", "out of memory: lower "
     "--batch_size_per_gpu ({})"),
    (r"by peer|Timed out waiting|ncclRemoteError", "another process has failed, or can't be "
     "reached: look for its own message"),
)


def explain(error):
    """Return the line that says what to do about an error; None for a bug."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, MemoryError):
        return f"out of memory: lower --batch_size_per_gpu ({str(error) or 'MemoryError'})"
    if not isinstance(error, RuntimeError):
        return None
    lines = str(error).strip().splitlines() or [""]
    if isinstance(error, torch.OutOfMemoryError):
        return f"{lines[0]} Lower --batch_size_per_gpu"
    # A loader's worker puts its stack before the error, PyTorch at times one behind it.
    return next((remedy.format(line) for line in (lines[0], lines[-1]) for words, remedy in LACKS
                 if re.search(words, line)), None)
