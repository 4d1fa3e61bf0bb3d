"""A TD that migrates: its source and its destination on one machine, and the host's pages for what is on its way."""

from __future__ import annotations

from dataclasses import replace

from septum.arch.leaves import HostLeaf
from septum.arch.pages import PAGE_4K, Level, page_info
from septum.arch.structures import TdAttributes
from septum.tdx.migration.gpa_list import EntryStatus, Operation
from septum.tdx.migration.mbmd import SIZE, Mbmd
from septum.tdx.registers import Regs
from septum.tdx.state.td import Td
from tests.tdx.machines import PARAMS, VCPU_PAGES, Machine

H = HostLeaf
MIGRATABLE = replace(PARAMS, attributes=TdAttributes.MIGRATABLE)
STREAMS = 3
"""The backward stream and two forward ones."""
RESUME = LAST_EPOCH = 1 << 63
INVALID = 1 << 63
"""No page, in a list of pages."""
NO_LIST = (1 << 64) - 1
MBMD, TOKEN, GPAS, BUFFERS, MACS, NEW_PAGES, STATE_PAGES, BUFFER = (0x30_0000 + (n << 16) for n in range(8))
"""Pages of the host: headers, lists, and where state and pages lie on their way."""
CONTENT = {0: b"zero", 0x1000: b"one", 0x2000: b"two"}
"""Pages of the source TD."""


def entry(gpa: int, operation: int = Operation.MIGRATE, *, pending: bool = False) -> int:
    """An entry of a GPA list."""
    return gpa | operation << 52 | pending << 2


def status_of(item: int) -> EntryStatus:
    """What a GPA list says became of an entry."""
    return EntryStatus(item >> 56 & 0x1F)


class Migration(Machine):
    """A source TD with three pages and a VCPU, and a destination TD that has got keys and streams only."""

    def __init__(self) -> None:
        super().__init__()
        self.source = self.td(MIGRATABLE)
        self.add_tables(self.source, 0)
        self.pages = {gpa: self.add_page(self.source, gpa, content) for gpa, content in CONTENT.items()}
        self.tdvpr = self.create_vcpu(self.source)
        self.ok(H.TDH_MR_FINALIZE, rcx=self.source)
        self.target = self.td_with_tdcs()
        for tdr in (self.source, self.target):
            for _ in range(STREAMS):
                self.ok(H.TDH_MIG_STREAM_CREATE, rcx=self.page(), rdx=tdr)
        self.exchange_keys()

    def exchange_keys(self) -> None:
        """What the migration TDs on both sides do."""
        for one, other in ((self.of_source, self.of_target), (self.of_target, self.of_source)):
            one.tdcs.mig_dec_key = other.tdcs.mig_enc_key
            one.tdcs.mig_dec_key_set = True

    @property
    def of_source(self) -> Td:
        return self.module.td(self.source)

    @property
    def of_target(self) -> Td:
        return self.module.td(self.target)

    # -- lists -----------------------------------------------------------------------------------------------------

    def put(self, table: int, *values: int) -> None:
        """Writes a list to the host's memory."""
        for number, value in enumerate(values):
            self.module.memory.write(table + 8 * number, value.to_bytes(8, "little"))

    def get(self, table: int, count: int) -> list[int]:
        """A list in the host's memory."""
        raw = self.module.memory.read(table, 8 * count)
        return [int.from_bytes(raw[i : i + 8], "little") for i in range(0, len(raw), 8)]

    def header(self, pa: int = MBMD) -> Mbmd:
        """A bundle's header in the host's memory."""
        return Mbmd.unpack(self.module.memory.read(pa, SIZE))

    def put_header(self, mbmd: Mbmd, pa: int = MBMD) -> None:
        self.module.memory.write(pa, mbmd.pack())

    # -- state -----------------------------------------------------------------------------------------------------

    def state(self, leaf: HostLeaf, rcx: int, pages: int, *, r10: int = 0, at: int = STATE_PAGES) -> Regs:
        """TDH.EXPORT.STATE or TDH.IMPORT.STATE with a number of pages that follow the page list."""
        self.put(at, *(at + PAGE_4K * (number + 1) for number in range(pages)))
        return self.call(leaf, rcx=rcx, r8=MBMD | SIZE << 52, r9=at | pages - 1 << 55, r10=r10)

    def export_immutable(self) -> int:
        """Begins the session of the source; the number of pages."""
        regs = self.state(H.TDH_EXPORT_STATE_IMMUTABLE, self.source, 3)
        assert regs.rax == 0, regs
        return regs.rdx

    def import_immutable(self, pages: int) -> Regs:
        return self.state(H.TDH_IMPORT_STATE_IMMUTABLE, self.target, pages)

    def begin(self) -> None:
        """Both sides have begun; the destination has tables for the first 2 MiB."""
        regs = self.import_immutable(self.export_immutable())
        assert regs.rax == 0, regs
        self.add_tables(self.target, 0)

    def move_state(self, stream: int = 0) -> None:
        """The mutable state of the TD and of its VCPU."""
        pages = self.state(H.TDH_EXPORT_STATE_TD, self.source, 2)
        assert pages.rax == 0, pages
        regs = self.state(H.TDH_IMPORT_STATE_TD, self.target, pages.rdx)
        assert regs.rax == 0, regs
        self.new_vcpu = self.page()
        self.ok(H.TDH_VP_CREATE, rcx=self.new_vcpu, rdx=self.target)
        for _ in range(VCPU_PAGES):
            self.ok(H.TDH_VP_ADDCX, rcx=self.page(), rdx=self.new_vcpu)
        pages = self.state(H.TDH_EXPORT_STATE_VP, self.tdvpr, 8, r10=stream)
        assert pages.rax == 0, pages
        regs = self.state(H.TDH_IMPORT_STATE_VP, self.new_vcpu, pages.rdx, r10=stream)
        assert regs.rax == 0, regs

    # -- pages -----------------------------------------------------------------------------------------------------

    def on_list(self, leaf: HostLeaf, *items: int, tdr: int | None = None) -> Regs:
        """TDH.EXPORT.BLOCKW or TDH.EXPORT.RESTORE on the entries of a list."""
        self.put(GPAS, *items)
        return self.call(leaf, rcx=GPAS | len(items) - 1 << 55, rdx=tdr or self.source)

    def block_writes(self, *gpas: int) -> None:
        assert self.on_list(H.TDH_EXPORT_BLOCKW, *map(entry, gpas)).rax == 0
        self.ok(H.TDH_MEM_TRACK, rcx=self.source)

    def export(self, *items: int, r10: int = 0) -> Regs:
        """TDH.EXPORT.MEM of the entries of a list, each into a buffer of its own."""
        self.put(GPAS, *items)
        self.put(BUFFERS, *(BUFFER + PAGE_4K * number for number in range(len(items))))
        return self.mem(H.TDH_EXPORT_MEM, self.source, len(items), r10=r10)

    def mem(self, leaf: HostLeaf, tdr: int, count: int, *, first: int = 0, r10: int = 0, r13: int = NO_LIST) -> Regs:
        """TDH.EXPORT.MEM or TDH.IMPORT.MEM on the lists as they are."""
        return self.call(
            leaf, rcx=GPAS | first << 3 | count - 1 << 55, rdx=tdr, r8=MBMD | SIZE << 52, r9=BUFFERS, r10=r10,
            r11=MACS, r12=NO_LIST, r13=r13,
        )  # fmt: skip

    def import_(self, count: int, *, r10: int = 0) -> Regs:
        """TDH.IMPORT.MEM of what was exported last, into new pages."""
        self.new_pages = [self.page() for _ in range(count)]
        self.put(NEW_PAGES, *self.new_pages)
        return self.mem(H.TDH_IMPORT_MEM, self.target, count, r10=r10, r13=NEW_PAGES)

    def move_pages(self, *gpas: int) -> None:
        """Pages that were blocked for writing."""
        regs = self.export(*map(entry, gpas))
        assert regs.rax == 0, regs
        regs = self.import_(len(gpas))
        assert regs.rax == 0, regs

    def track(self, command: int = 0) -> None:
        """The next epoch begins on both sides."""
        self.ok(H.TDH_EXPORT_TRACK, rcx=self.source, r8=TOKEN | SIZE << 52, r10=command)
        self.ok(H.TDH_IMPORT_TRACK, rcx=self.target, r8=TOKEN | SIZE << 52)

    def sept(self, tdr: int, gpa: int) -> tuple[int, int]:
        """A Secure EPT entry as the host sees it, and its state."""
        regs = self.ok(H.TDH_MEM_SEPT_RD, rcx=page_info(gpa, Level.PT), rdx=tdr)
        return regs.rcx, regs.rdx >> 8

    def interrupt(self, pending: bool) -> None:
        """An interrupt for the host is pending on LP 0."""
        self.module.hardware.msrs.store((0, 0x9A), int(pending) or None)
