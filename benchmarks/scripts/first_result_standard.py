"""A fresh interpreter to the result of one call in the standard pool, by fork server."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor


def double(number: int) -> int:
    """The least a call can do."""
    return 2 * number


if __name__ == "__main__":
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("forkserver")) as pool:
        print(pool.submit(double, 21).result())
