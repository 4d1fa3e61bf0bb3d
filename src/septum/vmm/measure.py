"""MRTD of a firmware image, computed from the image alone.

MRTD is the SHA-384 of a record for each TDH.MEM.PAGE.ADD and TDH.MR.EXTEND, in the order of the calls. A record is a
header of 128 bytes (the call's name padded to 16, the guest physical address in 8, zeros); that of TDH.MR.EXTEND is
followed by the 256 bytes it measures.

Sources: TDX Module 1.5 ABI, TDH.MEM.PAGE.ADD and TDH.MR.EXTEND; the orders: Linux 6.16 arch/x86/kvm/vmx/tdx.c
(tdx_vcpu_init_mem_region) and the KVM of QEMU 8.2's time.
"""

import hashlib
import struct
from typing import Literal, get_args

from septum.arch.errors import UsageError
from septum.vmm.sections import PAGE_SIZE
from septum.vmm.tdvf import TdvfImage

Order = Literal["page", "section"]
"""`page`: each page is added, then measured (mainline KVM); `section`: a section is added whole, then measured."""

CHUNK_SIZE = 256
CHUNKS = PAGE_SIZE // CHUNK_SIZE
_PAGE_ADD = b"MEM.PAGE.ADD"
_MR_EXTEND = b"MR.EXTEND"
# Whole pages at a time: putting each record together by itself would cost more than hashing it.
_ADD = struct.Struct("<16sQ104x")
_EXTENDS = struct.Struct("<" + "16sQ104x256s" * CHUNKS)
_PAGE = struct.Struct("256s" * CHUNKS)


def page_add_record(gpa: int) -> bytes:
    """What TDH.MEM.PAGE.ADD of the page at `gpa` adds to MRTD."""
    return _ADD.pack(_PAGE_ADD, gpa)


def page_extend_records(gpa: int, page: bytes) -> bytes:
    """What the 16 TDH.MR.EXTEND over the page at `gpa` with content `page` add to MRTD."""
    fields: list[int | bytes] = [_MR_EXTEND] * (3 * CHUNKS)
    fields[1::3] = range(gpa, gpa + PAGE_SIZE, CHUNK_SIZE)
    fields[2::3] = _PAGE.unpack(page)
    return _EXTENDS.pack(*fields)


def measure_image(image: TdvfImage, order: str = "page") -> bytes:
    """The MRTD (48 bytes) of a TD built from `image` and finalised, its sections in the order of the metadata.

    Memory size and the content of the TD HOB don't change it. Raises UsageError for an unknown order.
    """
    if order not in get_args(Order):
        raise UsageError(f"order {order!r} is unknown; allowed are {' and '.join(get_args(Order))}")
    mrtd = hashlib.sha384()
    for section in image.sections:
        if not section.added:
            continue
        if order == "section" or not section.measured:
            for gpa in range(section.memory_address, section.memory_end, PAGE_SIZE):
                mrtd.update(page_add_record(gpa))
        if section.measured:
            for gpa, page in image.pages(section):
                if order == "page":
                    mrtd.update(page_add_record(gpa))
                mrtd.update(page_extend_records(gpa, page))
    return mrtd.digest()
