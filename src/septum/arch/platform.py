"""The shape of a machine: processors, KeyIDs, memory and how TDX uses it.

Built-in profiles are files under ``data/platforms``. Those named after a processor hold facts that the owners of real
machines published; what a report leaves out is listed in the profile's ``assumed``.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Final

from septum.arch.errors import UsageError
from septum.arch.pages import PaFormat, align_up
from septum.arch.tdmr import MemoryRange, Tdmr, build_tdmrs

_FOUR_GIB: Final = 1 << 32
_SEAMRR_SIZE: Final = 128 << 20
_SMRR_SIZE: Final = 8 << 20


@dataclass(frozen=True, slots=True)
class Platform:
    """A machine that TDX can be enabled on. Logical processors (LPs) and packages are numbered from 0."""

    name: str
    cmrs: tuple[MemoryRange, ...]
    """Convertible memory ranges, lowest first."""
    tdmrs: tuple[Tdmr, ...]
    lp_package: tuple[int, ...]
    """Package of each LP."""
    x2apic_ids: tuple[int, ...]
    """x2APIC id of each LP."""
    seamrr: MemoryRange
    """Where the TDX Module itself lives."""
    smrr: MemoryRange
    max_pa: int = 52
    """Physical address width of the CPU in bits, KeyID bits included."""
    keyid_bits: int = 6
    num_mktme_keyids: int = 31
    """KeyIDs 1 to this are for the host's own use (KeyID 0 is no KeyID)."""
    num_tdx_keyids: int = 32
    """Private KeyIDs; they follow the host's."""
    global_private_hkid: int = 32
    """The KeyID that the host gives to the module itself: Linux takes the first private one."""
    tsc_hz: int = 2_000_000_000
    tsc_start: int = 0x1_0000_0000
    """Time-stamp counter when the machine starts."""
    tsc_step: int = 1000
    """Ticks that pass at each reading of the counter, where nothing else moves it."""
    wbinvd_blocks: int = 16
    """Parts in which a package's cache is written back; TDH.PHYMEM.CACHE.WB can be interrupted between them."""
    usable_memory: tuple[MemoryRange, ...] = ()
    """What the firmware's map calls usable, where it is known; else empty."""
    module_version: str = "1.5.01"
    cpu: str = ""
    description: str = ""
    source: str = ""
    assumed: tuple[str, ...] = ()
    """Properties that the source does not state."""

    @property
    def num_lps(self) -> int:
        """Logical processors in all."""
        return len(self.lp_package)

    @property
    def num_packages(self) -> int:
        """Processor packages."""
        return max(self.lp_package) + 1

    @property
    def pa_format(self) -> PaFormat:
        """Where the KeyID sits in a physical address."""
        return PaFormat(self.max_pa, self.keyid_bits)

    @property
    def private_hkids(self) -> range:
        """All private KeyIDs, the module's own among them."""
        first = self.num_mktme_keyids + 1
        return range(first, first + self.num_tdx_keyids)

    @property
    def pamt_size(self) -> int:
        """Bytes of all PAMT areas."""
        return sum(tdmr.pamt_size for tdmr in self.tdmrs)

    @property
    def private_memory(self) -> int:
        """Bytes that may hold private pages."""
        return sum(part.size for tdmr in self.tdmrs for part in tdmr.available)

    @classmethod
    def from_vector_header(cls, header: Mapping[str, Any]) -> "Platform":
        """The machine that a file of recorded vectors describes in its first line.

        Raises UsageError when the line is no header or lacks something.
        """
        try:
            if header["op"] != "header":
                raise UsageError(f"the first line of recorded vectors must be a header, not {header['op']!r}")
            return cls(
                name="recorded",
                cmrs=_ranges(header["cmrs"]),
                tdmrs=tuple(_recorded_tdmr(tdmr) for tdmr in header["tdmrs"]),
                lp_package=tuple(header["lp_package"]),
                x2apic_ids=tuple(header["x2apic_ids"]),
                seamrr=_range(header["seamrr"]),
                smrr=_range(header["smrr"]),
                max_pa=header["max_pa"],
                keyid_bits=header["keyid_bits"],
                num_mktme_keyids=header["num_mktme_keyids"],
                num_tdx_keyids=header["num_tdx_keyids"],
                global_private_hkid=header["global_private_hkid"],
                tsc_hz=header["tsc_hz"],
                wbinvd_blocks=header["wbinvd_blocks"],
                description="the machine of the recorded vectors",
                source=header["source"],
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UsageError(f"the header of the recorded vectors is not complete: {error!r}") from None


def profile_names() -> tuple[str, ...]:
    """Names of the built-in platforms."""
    files = (resources.files("septum.arch") / "data" / "platforms").iterdir()
    return tuple(sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml")))


@cache
def profile(name: str = "default") -> Platform:
    """A built-in platform, its TDMRs laid between the CMRs.

    Raises UsageError when there is none of that name.
    """
    file = resources.files("septum.arch") / "data" / "platforms" / f"{name}.toml"
    if name not in profile_names():
        raise UsageError(f"no platform is named {name!r}; there are {', '.join(profile_names())}")
    facts = tomllib.loads(file.read_text(encoding="utf-8"))
    cmrs = tuple(MemoryRange.between(first, end) for first, end in facts["cmrs"])
    packages, lps = facts["packages"], facts["lps_per_package"]
    first_keyid, end_keyid = facts["private_keyids"]
    low_end = max(cmr.end for cmr in cmrs if cmr.base < _FOUR_GIB)
    return Platform(
        name=name,
        cmrs=cmrs,
        tdmrs=build_tdmrs(cmrs, cmrs=cmrs),
        lp_package=tuple(lp // lps for lp in range(packages * lps)),
        x2apic_ids=tuple(lp // lps << 7 | lp % lps << 1 for lp in range(packages * lps)),
        seamrr=MemoryRange(align_up(max(cmrs[-1].end, _FOUR_GIB), _SEAMRR_SIZE), _SEAMRR_SIZE),
        smrr=MemoryRange(align_up(low_end, _SMRR_SIZE), _SMRR_SIZE),
        max_pa=facts["max_pa"],
        keyid_bits=(end_keyid - 1).bit_length(),
        num_mktme_keyids=first_keyid - 1,
        num_tdx_keyids=end_keyid - first_keyid,
        global_private_hkid=first_keyid,
        tsc_hz=facts["tsc_hz"],
        usable_memory=tuple(MemoryRange.between(low, high + 1) for low, high in facts.get("e820_usable", ())),
        module_version=facts.get("module_version", "1.5.01"),
        cpu=facts.get("cpu", ""),
        description=facts["description"],
        source=facts.get("source", ""),
        assumed=tuple(facts.get("assumed", ())),
    )


def _range(pair: Sequence[str | int]) -> MemoryRange:
    """A range from base and size, each a number or a hexadecimal string."""
    base, size = (int(number, 16) if isinstance(number, str) else number for number in pair)
    return MemoryRange(base, size)


def _ranges(pairs: Sequence[Sequence[str | int]]) -> tuple[MemoryRange, ...]:
    return tuple(_range(pair) for pair in pairs)


def _recorded_tdmr(tdmr: Mapping[str, Any]) -> Tdmr:
    return Tdmr(
        base=int(tdmr["base"], 16),
        size=int(tdmr["size"], 16),
        pamt_1g=_range(tdmr["pamt_1g"]),
        pamt_2m=_range(tdmr["pamt_2m"]),
        pamt_4k=_range(tdmr["pamt_4k"]),
        reserved=_ranges(tdmr["reserved"]),
    )
