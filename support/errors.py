"""One class for what a user did wrong, and one line for it. A bug keeps its stack."""

import contextlib
import sys

import torch


class UserError(Exception):
    """Something that the user can put right; one line that says what and how."""


@contextlib.contextmanager
def one_line_errors(program, rank=0, processes=1, status=2):
    """Exit with one line where the user can help: for a UserError, a full GPU, Ctrl-C.

    status: of the exit, by this project's convention 2 before work has begun and 1 after. Every
    process that fails says so, with its rank if there are several.
    """
    who = f"{program}: error (process {rank})" if processes > 1 else f"{program}: error"
    try:
        yield
    except UserError as error:
        sys.stderr.write(f"{who}: {error}\n")
        sys.exit(status)
    except torch.OutOfMemoryError as error:
        sys.stderr.write(f"{who}: {str(error).splitlines()[0]} Lower --batch_size_per_gpu\n")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.stderr.write("\nstopped\n" if rank == 0 else "")
        sys.exit(130)
