"""The loader's worker processes: signals, and the memory that they share."""

import atexit
import multiprocessing
import os
import shutil
import signal

from support.errors import UserError

SHARED_MEMORY = "/dev/shm"


def ignore_signals(worker):
    """Leave stopping to the trainer: signals reach all processes of a job."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@atexit.register
def end_workers():
    """Kill the workers of a run that failed, as they ignore Python's SIGTERM."""
    workers = [process for process in multiprocessing.active_children() if process.daemon]
    if workers and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)    # PyTorch would take it for an error
    for process in workers:
        process.kill()


def check_shared_memory(batch_bytes, num_workers):
    """Raise UserError where the workers' batches do not fit into /dev/shm.

    Containers often have 64 MB of it. Each worker prepares two batches, and one is in use.
    """
    if num_workers and os.path.isdir(SHARED_MEMORY):
        needed = (2 * num_workers + 1) * batch_bytes
        free = shutil.disk_usage(SHARED_MEMORY).free
        if needed > free:
            raise UserError(
                f"{SHARED_MEMORY} has {free / 1e6:.0f} MB free, and {num_workers} loader workers "
                f"need {needed / 1e6:.0f} MB: start the container with a larger --shm-size, or "
                "give --num_workers 0")
