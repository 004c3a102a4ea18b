"""The loader's worker processes and signals."""

import atexit
import multiprocessing
import signal


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
