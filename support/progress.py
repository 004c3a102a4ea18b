"""How far something is: a bar on a terminal, a line now and then where there is none."""

import sys
import time

from tqdm import tqdm


def progress(items, what, every=10.0, show=True):
    """Yield each of `items`, which have a length, and say how many are done.

    every: seconds between two lines. show: False in all processes but the first.
    """
    terminal = sys.stderr.isatty()
    if not show or terminal:
        yield from tqdm(items, what, disable=not show, leave=False, dynamic_ncols=True)
        return
    tqdm.write(f"{what} ...")
    start = said = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - said > every:
            said = now
            tqdm.write(f"{what}: {100 * done // len(items)} % after {now - start:.0f} s")
        yield item
