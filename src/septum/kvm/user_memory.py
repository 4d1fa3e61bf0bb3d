"""A process's memory, as the kernel sees it: ``copy_from_user``, ``copy_to_user``, ``get_user_pages_fast``.

Anonymous private mappings, whose pages come with the first access.
"""

from __future__ import annotations

from errno import EFAULT, ENOMEM
from typing import TYPE_CHECKING, Final

from septum.arch.pages import PAGE_4K, PAGES_4K_IN_2M, align_up
from septum.core.cells import Fixed, Shared, SharedMap
from septum.core.klocks import RwSem

if TYPE_CHECKING:
    from septum.kvm.host import Host
    from septum.kvm.vm import Vm

FIRST_MAPPING: Final = 0x7F00_0000_0000
TASK_SIZE: Final = 1 << 47
"""First address that userspace cannot have."""

#: Where userspace's data for an ioctl are: an address in its memory, or bytes that only the caller has.
UserPtr = int | bytearray


class AddressSpace(Shared):
    """``struct mm_struct``: mapped ranges, ascending, where the next one goes, and the VMs that must know when pages
    are taken away (``mmu_notifier``)."""

    areas: tuple[tuple[int, int], ...] = ()
    next: int = FIRST_MAPPING
    vms: tuple[Vm, ...] = ()


class UserMemory(Fixed):
    """The address space of one process."""

    def __init__(self, host: Host, name: str) -> None:
        self.host = host
        self.name = name
        self.space = AddressSpace(f"{name}.mm")
        self.mmap_lock = RwSem(f"mmap_lock[{name}]")
        self._pages: SharedMap[int, int] = SharedMap(f"{name}.pages", 0)
        self._blocks: SharedMap[int, int] = SharedMap(f"{name}.blocks", 0)
        """Which pages of each 2 MiB are there, so that large mappings that are nearly empty go fast."""

    def mmap(self, size: int) -> int:
        """``mmap`` of anonymous memory; returns its address."""
        space, start = self.space, self.space.next
        end = align_up(start + size, PAGE_4K)
        space.areas = (*space.areas, (start, end))
        space.next = end + PAGE_4K
        return start

    def unmap(self, start: int, end: int) -> None:
        """Takes mappings and their pages away, whole areas at a time."""
        self.space.areas = tuple(area for area in self.space.areas if not start <= area[0] < end)
        self.discard(start, end)

    def discard(self, start: int, end: int) -> None:
        """Takes pages away; the mappings stay, and are zero when they are used again."""
        first, last = start // PAGE_4K, end // PAGE_4K
        for block in range(first // PAGES_4K_IN_2M, -(-last // PAGES_4K_IN_2M)):
            present = self._blocks[block]
            base = block * PAGES_4K_IN_2M
            while present:
                page = base + present.bit_length() - 1
                present &= ~(1 << page - base)
                if first <= page < last:
                    self.host.pages.put(self._pages.pop(page))
                    self._blocks.store(block, self._blocks[block] & ~(1 << page - base))

    def is_mapped(self, start: int, size: int) -> bool:
        """Whether a range lies within one mapping."""
        return any(low <= start and start + size <= high for low, high in self.space.areas)

    def present(self, address: int) -> int:
        """The page behind an address if it is there without a fault; else 0."""
        return self._pages[address // PAGE_4K]

    def fault_in(self, address: int) -> int:
        """A page fault: the page behind an address, or -EFAULT, -ENOMEM."""
        page = address // PAGE_4K
        if pa := self._pages[page]:
            return pa
        if not self.is_mapped(address, 1):
            return -EFAULT
        pa = self.host.pages.alloc()
        if not pa:
            return -ENOMEM
        self._pages[page] = pa
        block, bit = divmod(page, PAGES_4K_IN_2M)
        self._blocks[block] = self._blocks[block] | 1 << bit
        return pa

    def register(self, kvm: Vm) -> None:
        """``mmu_notifier_register``."""
        self.space.vms = (*self.space.vms, kvm)

    def unregister(self, kvm: Vm) -> None:
        """``mmu_notifier_unregister``."""
        self.space.vms = tuple(vm for vm in self.space.vms if vm is not kvm)

    # -- userspace itself ------------------------------------------------------------------------------------------

    def write(self, address: int, data: bytes | bytearray) -> bool:
        """Stores data; False where nothing is mapped (``copy_to_user``)."""
        if not self.is_mapped(address, len(data)):
            return False
        memory = self.host.module.memory
        view, done = bytes(data), 0
        while done < len(view):
            size = min(PAGE_4K - address % PAGE_4K, len(view) - done)
            pa = self.fault_in(address)
            if pa < 0:
                return False
            memory.write(pa + address % PAGE_4K, view[done : done + size])
            address, done = address + size, done + size
        return True

    def read(self, address: int, size: int) -> bytes | None:
        """Loads data; None where nothing is mapped (``copy_from_user``). Pages that nobody wrote stay absent."""
        if not self.is_mapped(address, size):
            return None
        memory, out = self.host.module.memory, b""
        while size:
            part = min(PAGE_4K - address % PAGE_4K, size)
            pa = self.present(address)
            out += memory.read(pa + address % PAGE_4K, part) if pa else bytes(part)
            address, size = address + part, size - part
        return out

    # -- the kernel on behalf of userspace ---------------------------------------------------------------------------

    def copy_from_user(self, pointer: UserPtr, size: int, offset: int = 0) -> bytes | None:
        """``copy_from_user``: None for -EFAULT."""
        if isinstance(pointer, int):
            return self.read(pointer + offset, size)
        return bytes(pointer[offset : offset + size]) if offset + size <= len(pointer) else None

    def copy_to_user(self, pointer: UserPtr, data: bytes, offset: int = 0) -> bool:
        """``copy_to_user``: False for -EFAULT."""
        if isinstance(pointer, int):
            return self.write(pointer + offset, data)
        if offset + len(data) > len(pointer):
            return False
        pointer[offset : offset + len(data)] = data
        return True

    async def get_user_pages_fast(self, address: int) -> int:
        """``get_user_pages_fast`` for one page: its address with a reference taken, or -EFAULT, -ENOMEM.

        Without a lock when the page is there, else under ``mmap_lock``.
        """
        pa = self.present(address)
        if not pa:
            async with self.mmap_lock.read():
                pa = self.fault_in(address)
        if pa > 0:
            self.host.pages.get(pa)
        return pa
