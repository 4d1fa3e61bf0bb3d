"""``septum measure``: what a TD built from a firmware image reports as MRTD."""

from __future__ import annotations

from typing import Annotated

import typer

from septum.cli.main import GOOD
from septum.cli.options import Firmware, Json, Memory, Quiet, show_size
from septum.cli.output import show


def measure(
    firmware: Firmware,
    memory: Memory = "2G",
    order: Annotated[
        str, typer.Option("--order", metavar="page|section", help="Measure each page, or each section, once added.")
    ] = "page",
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Compute the MRTD of a firmware image without building a TD.

    MRTD depends on the image and on the order in which the VMM adds and measures pages: mainline KVM measures each page
    as it adds it, older ones a section at a time. It does not depend on the size of the memory, which only has to hold
    the image's sections.
    """
    from septum.report.tables import Table
    from septum.vmm.layout import parse_size, plan_layout
    from septum.vmm.measure import measure_image
    from septum.vmm.sections import PAGE_SIZE
    from septum.vmm.tdvf import load_image

    image = load_image(firmware)
    size = parse_size(memory)
    plan_layout(image, size)
    mrtd = measure_image(image, order).hex()
    added = sum(section.memory_data_size for section in image.sections if section.added)
    measured = sum(section.memory_data_size for section in image.sections if section.measured)
    record = {
        "mrtd": mrtd,
        "firmware": str(firmware),
        "image_size": len(image.data),
        "memory": size,
        "order": order,
        "sections": [
            {
                "type": section.type.name,
                "address": section.memory_address,
                "size": section.memory_data_size,
                "added": section.added,
                "measured": section.measured,
            }
            for section in image.sections
        ],
        "pages_added": added // PAGE_SIZE,
        "bytes_measured": measured,
    }
    rows = tuple(
        (
            section.type.name,
            f"{section.memory_address:#x}",
            show_size(section.memory_data_size),
            section.added,
            section.measured,
        )
        for section in image.sections
    )
    sections = Table(rows, ("section", "address", "size", "added", "measured"))
    summary = f"{added // PAGE_SIZE:,} pages added, {show_size(measured)} measured, {order} order"
    show(record, mrtd, [sections, summary, f"MRTD\n  {mrtd}"], as_json=as_json, quiet=quiet)
    return GOOD
