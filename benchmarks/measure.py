"""How long Septum takes to measure a firmware image, against hashlib alone over the same bytes in the same chunks.

    python benchmarks/measure.py [FIRMWARE] [--order page|section] [--repeat N]

Without FIRMWARE it measures the built-in payload. Both sides are timed in turns in one run; the best of each counts.
"""

import argparse
import hashlib
import sys
import time
from collections.abc import Callable, Iterator
from itertools import chain, zip_longest
from typing import get_args

from septum.arch.errors import UsageError
from septum.vmm.measure import CHUNK_SIZE, Order, measure_image, page_add_record, page_extend_records
from septum.vmm.payload import builtin_payload
from septum.vmm.sections import PAGE_SIZE
from septum.vmm.tdvf import TdvfImage, load_image, parse_image


def records(image: TdvfImage, order: str) -> Iterator[bytes]:
    """What MRTD is the hash of, one piece for each TDH.MEM.PAGE.ADD and each TDH.MR.EXTEND."""
    size = 128 + CHUNK_SIZE
    for section in filter(lambda s: s.added, image.sections):
        adds = [page_add_record(gpa) for gpa in range(section.memory_address, section.memory_end, PAGE_SIZE)]
        extends = [page_extend_records(*page) for page in image.pages(section)] if section.measured else []
        pairs = zip_longest(adds, extends, fillvalue=b"")
        for piece in (*adds, *extends) if order == "section" else chain.from_iterable(pairs):
            yield from (piece[at : at + size] for at in range(0, len(piece), size))


def hash_pieces(pieces: list[bytes]) -> bytes:
    """SHA-384 over the pieces, and nothing else."""
    digest = hashlib.sha384()
    for piece in pieces:
        digest.update(piece)
    return digest.digest()


def seconds(work: Callable[[], bytes]) -> float:
    """The time one call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> int:
    """Run the comparison; exit status 1 when the two sides don't agree on MRTD, 2 for a wrong use."""
    parser = argparse.ArgumentParser(description="Septum's MRTD against hashlib alone")
    parser.add_argument("firmware", nargs="?", help="TDVF image, plain or xz (default: the built-in payload)")
    parser.add_argument("--order", choices=get_args(Order), default="page")
    parser.add_argument("--repeat", type=int, default=20)
    options = parser.parse_args()
    try:
        image = load_image(options.firmware) if options.firmware else parse_image(builtin_payload(), "built-in payload")
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    pieces = list(records(image, options.order))
    mrtd = measure_image(image, options.order)
    if hash_pieces(pieces) != mrtd:
        print(f"{image.name}: septum measures {mrtd.hex()}, hashlib {hash_pieces(pieces).hex()}", file=sys.stderr)
        return 1
    times = [
        (seconds(lambda: measure_image(image, options.order)), seconds(lambda: hash_pieces(pieces)))
        for _ in range(max(1, options.repeat))
    ]
    septum, alone = (min(column) for column in zip(*times, strict=True))
    print(f"{image.name}: MRTD {mrtd.hex()} ({options.order} order)")
    print(f"{len(pieces)} calls, {sum(map(len, pieces))} bytes hashed; best of {len(times)}")
    print(f"septum {septum * 1e3:.3f} ms, hashlib alone {alone * 1e3:.3f} ms, ratio {septum / alone:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
