"""The TD HOB as a guest reads it."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from septum.guest.hob import hob_digest, read_hob, unaccepted_memory
from septum.guest.vcpu import Vcpu
from septum.vmm.hob import build_td_hob
from septum.vmm.payload import builtin_payload
from septum.vmm.tdvf import load_image, parse_image
from tests.guest.hosts import GuestHost


def test_a_guest_finds_the_memory_that_it_must_accept() -> None:
    hob = build_td_hob(parse_image(builtin_payload()).sections, 3 << 30)
    assert unaccepted_memory(hob) == (
        (0, 0x80_9000),
        (0x80_D000, 0x8000_0000),
        (0x1_0000_0000, 0x1_4000_0000),
    )


@given(st.binary(max_size=200))
def test_a_list_of_nonsense_has_an_end(hob: bytes) -> None:
    for part in unaccepted_memory(hob):
        assert part.end >= part.start


def test_a_guest_reads_the_list_from_memory() -> None:
    hob = build_td_hob(parse_image(builtin_payload()).sections, 1 << 30)
    moved = hob[:48] + (0x1FF8 + len(hob)).to_bytes(8, "little") + hob[56:]

    async def script(vcpu: Vcpu) -> bytes:
        assert await read_hob(vcpu) == b""
        await vcpu.write(0x1FF8, moved)
        vcpu.hob = 0x1FF8
        return await read_hob(vcpu)

    host = GuestHost(script)
    host.run()
    assert host.guests[0].result == moved


def test_the_digest_is_what_real_firmware_measures(shared: Path) -> None:
    runs = json.loads((shared / "firmware" / "known-runs.json").read_text())
    (run,) = [r for r in runs if r["rtmr_extends"]]
    image = load_image(shared / "firmware" / run["image"])
    hob = build_td_hob(image.sections, int(run["ram"], 16))
    assert hob_digest(hob).hex() == run["rtmr_extends"][0][2]
