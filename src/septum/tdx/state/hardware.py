"""What the module gets from the hardware when it asks: time, random numbers, MSRs, the outcome of PCONFIG.

Model code never invents such values. A harness sets them in these cells; as they are at the start, nothing goes wrong.
"""

from __future__ import annotations

from enum import IntEnum

from septum.arch import platform_msrs as msrs
from septum.arch.cpuid import CpuModel
from septum.arch.platform import Platform
from septum.core.cells import Fixed, Shared, SharedMap

U64 = (1 << 64) - 1
IA32_INTR_PENDING = 0x9A
"""Not 0: an interrupt for the host is pending on the LP, so that long-running functions stop to let it in."""


class PconfigStatus(IntEnum):
    """What PCONFIG answers when it is to program a key."""

    SUCCESS = 0
    INVALID_COMMAND = 1
    ENTROPY_ERROR = 2
    INVALID_KEYID = 3
    INVALID_ENCRYPTION = 4
    DEVICE_BUSY = 5


class VerifyReport(IntEnum):
    """What SEAMVERIFYREPORT answers about a report."""

    SUCCESS = 0
    INVALID_CPUSVN = 1
    INVALID_REPORTMACSTRUCT = 2


class HardwareInputs(Shared):
    """Platform-wide inputs."""

    tsc: int
    """What RDTSC read last."""
    tsc_step: int
    """Ticks that go by before each RDTSC of the module."""
    entropy: int = 42
    """State of the stream of random numbers (splitmix64)."""
    entropy_exhausted: bool = False
    """RDSEED and RDRAND have nothing to give."""
    pconfig_error: int = PconfigStatus.SUCCESS
    """What PCONFIG answers: a :class:`PconfigStatus`."""
    xsaves_writes_header: bool = True
    """XSAVES says in the header what it has saved. The recordings replaced it by nothing."""
    verify_report: int = VerifyReport.SUCCESS
    """What SEAMVERIFYREPORT answers: a :class:`VerifyReport`."""


class Hardware(Fixed):
    """The inputs, the CPU model, and MSRs that were changed after power-on, by LP and address."""

    __slots__ = ("_at_power_on", "cpu", "inputs", "msrs")

    def __init__(self, platform: Platform, cpu: CpuModel) -> None:
        self.cpu = cpu
        self._at_power_on = {**cpu.msrs, **_msrs_of_platform(platform, cpu)}
        self.inputs = HardwareInputs("HARDWARE", tsc=platform.tsc_start, tsc_step=platform.tsc_step)
        self.msrs: SharedMap[tuple[int, int], int | None] = SharedMap("MSRS")

    def rdtsc(self) -> int:
        """RDTSC."""
        inputs = self.inputs
        tsc = inputs.tsc
        if inputs.tsc_step:
            tsc = inputs.tsc = (tsc + inputs.tsc_step) & U64
        return tsc

    def random(self) -> int | None:
        """RDSEED or RDRAND: 64 bits, or None without entropy."""
        inputs = self.inputs
        if inputs.entropy_exhausted:
            return None
        state = inputs.entropy = (inputs.entropy + 0x9E37_79B9_7F4A_7C15) & U64
        state = (state ^ state >> 30) * 0xBF58_476D_1CE4_E5B9 & U64
        state = (state ^ state >> 27) * 0x94D0_49BB_1331_11EB & U64
        return state ^ state >> 31

    def random_256(self) -> tuple[int, int, int, int] | None:
        """Four 64-bit random numbers, or None without entropy (``generate_256bit_random``)."""
        words = (self.random(), self.random(), self.random(), self.random())
        return None if None in words else words  # type: ignore[return-value]

    def rdmsr(self, lp: int, address: int) -> int:
        """RDMSR on a logical processor."""
        changed = self.msrs[lp, address]
        return self._at_power_on.get(address, 0) if changed is None else changed

    def interrupt_pending(self, lp: int) -> bool:
        """Whether an interrupt for the host is pending on a logical processor."""
        return self.rdmsr(lp, IA32_INTR_PENDING) != 0


def _msrs_of_platform(platform: Platform, cpu: CpuModel) -> dict[int, int]:
    """The MSRs in which firmware has written down where memory and KeyIDs are."""
    tme_activate = cpu.msr(msrs.IA32_TME_ACTIVATE) & ~msrs.TME_KEYID_BITS_MASK
    private_bits = (platform.num_tdx_keyids - 1).bit_length()
    return {
        msrs.SMRR_BASE: platform.smrr.base | msrs.SMRR_WRITE_BACK,
        msrs.SMRR_MASK: -platform.smrr.size & msrs.SMRR_ADDRESS | msrs.SMRR_LOCK | msrs.SMRR_VALID,
        msrs.IA32_MKTME_KEYID_PARTITIONING: platform.num_tdx_keyids << 32 | platform.num_mktme_keyids,
        msrs.IA32_TME_ACTIVATE: tme_activate | (private_bits << 4 | platform.keyid_bits) << msrs.TME_KEYID_BITS_SHIFT,
        msrs.IA32_WBINVDP: platform.wbinvd_blocks,
        msrs.IA32_WBNOINVDP: platform.wbinvd_blocks,
    }
