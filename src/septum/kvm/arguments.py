"""Arguments of ioctls, as Python programs like to give and get them."""

from __future__ import annotations

from dataclasses import dataclass

from septum.arch.cpuid import CpuModel
from septum.kvm.abi import (
    KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
    Cpuid2,
    CpuidEntry2,
    TdxCapabilities,
    TdxInitMemRegion,
    TdxInitVm,
    unpack_cpuid2,
)
from septum.kvm.sysinfo import GUEST_PHYS_BITS


@dataclass(frozen=True, slots=True)
class InitVm:
    """What KVM_TDX_INIT_VM is told."""

    attributes: int = 0
    xfam: int = 0
    cpuid: tuple[CpuidEntry2, ...] = ()
    mrconfigid: bytes = bytes(48)
    mrowner: bytes = bytes(48)
    mrownerconfig: bytes = bytes(48)

    def pack(self) -> bytearray:
        """``struct kvm_tdx_init_vm`` with its entries."""
        head = TdxInitVm(
            attributes=self.attributes,
            xfam=self.xfam,
            mrconfigid=self.mrconfigid,
            mrowner=self.mrowner,
            mrownerconfig=self.mrownerconfig,
            cpuid=Cpuid2(nent=len(self.cpuid)),
        )
        return bytearray(head.pack() + b"".join(entry.pack() for entry in self.cpuid))


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What KVM_TDX_CAPABILITIES tells."""

    supported_attrs: int
    supported_xfam: int
    user_tdvmcallinfo_1_r11: int
    cpuid: tuple[CpuidEntry2, ...]
    """Configurable leaves, each with the bits that may be chosen."""

    @classmethod
    def buffer(cls, nent: int) -> bytearray:
        """``struct kvm_tdx_capabilities`` with room for ``nent`` entries."""
        return bytearray(TdxCapabilities(cpuid=Cpuid2(nent=nent)).pack() + bytes(CpuidEntry2.size() * nent))

    @classmethod
    def unpack(cls, data: bytes) -> Capabilities:
        """From ``struct kvm_tdx_capabilities`` with its entries."""
        caps = TdxCapabilities.unpack(data)
        entries = unpack_cpuid2(data, TdxCapabilities.offset_of("cpuid"))
        return cls(caps.supported_attrs, caps.supported_xfam, caps.user_tdvmcallinfo_1_r11, entries)

    def choose(self, cpu: CpuModel, *, gpa_width: int = 52) -> InitVm:
        """A TD with everything that can be had on a CPU, as QEMU asks for by default (``-cpu host``)."""
        return InitVm(self.supported_attrs, self.supported_xfam, tuple(_native(cpu, e, gpa_width) for e in self.cpuid))


def _native(cpu: CpuModel, bits: CpuidEntry2, gpa_width: int) -> CpuidEntry2:
    """The CPU's own values, as far as they may be chosen."""
    eax, ebx, ecx, edx = cpu.cpuid(bits.function, bits.index)
    if bits.function == 0x8000_0008:
        eax = eax & ~GUEST_PHYS_BITS | gpa_width << 16
    flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX if len(cpu.leaves.get(bits.function, ())) > 1 else 0
    return CpuidEntry2(bits.function, bits.index, flags, eax & bits.eax, ebx & bits.ebx, ecx & bits.ecx, edx & bits.edx)


class Region:
    """What is left to do of KVM_TDX_INIT_MEM_REGION or KVM_PRE_FAULT_MEMORY: source, address, pages of 4 KiB."""

    __slots__ = ("gpa", "nr_pages", "source_addr")

    def __init__(self, source_addr: int, gpa: int, nr_pages: int) -> None:
        self.source_addr = source_addr
        self.gpa = gpa
        self.nr_pages = nr_pages

    def pack(self) -> bytearray:
        """``struct kvm_tdx_init_mem_region``."""
        return bytearray(TdxInitMemRegion(self.source_addr, self.gpa, self.nr_pages).pack())

    def update(self, data: bytes | bytearray) -> None:
        """From ``struct kvm_tdx_init_mem_region``."""
        region = TdxInitMemRegion.unpack(bytes(data))
        self.source_addr, self.gpa, self.nr_pages = region.source_addr, region.gpa, region.nr_pages
