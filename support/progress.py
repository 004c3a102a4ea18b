"""Show progress: a bar on a terminal, else a line now and then."""

import sys
import time

from tqdm import tqdm


def say(text, file=None):
    """Print a line above any bar, and flush it."""
    tqdm.write(text, file)
    (file or sys.stdout).flush()


def progress(items, what, show=True, every=10.0):
    """Yield each of `items`, which have a length, and show how many are done.

    show: False in all processes but the first. every: seconds between two lines.
    """
    if not show or sys.stderr.isatty():
        yield from tqdm(items, what, disable=not show, leave=False, dynamic_ncols=True)
        return
    say(f"{what} ...")
    start = said = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - said >= every:
            said = now
            say(f"{what}: {100 * done // len(items)} % after {now - start:.0f} s")
        yield item
