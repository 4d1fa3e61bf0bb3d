"""A module with a TD and a VCPU that are there without having been built, for tests of single fields."""

from __future__ import annotations

from septum.arch.cpuid import CpuModel, cpuid_table
from septum.arch.metadata import Access, Context
from septum.arch.op_state import SysState
from septum.arch.platform import Platform, profile
from septum.core.run import solo_call
from septum.tdx.metadata import Scope, read_element, write_element
from septum.tdx.module import Module
from septum.tdx.outcome import Fail

TDR_PA, TDVPR_PA, TDCX_PA = 0x1000, 0x2000, 0x10000
ALL = (1 << 64) - 1


class Objects:
    """The module on a platform, initialised on all LPs; a TD with CPUID values and some L2 VMs; a VCPU of it."""

    def __init__(
        self,
        platform: Platform | None = None,
        cpu: CpuModel | None = None,
        *,
        l2_vms: int = 0,
        attributes: int = 0,
    ) -> None:
        self.module = Module(platform or profile(), cpu)
        self.module.sys.state = SysState.READY
        for lp in self.module.lps:
            lp.initialised = True
        self.td = self.module.td(TDR_PA)
        self.vp = self.module.vp(TDVPR_PA)
        self.td.tdr.tdcx_pa = tuple(TDCX_PA + 0x1000 * page for page in range(9))
        tdcs = self.td.tdcs
        tdcs.num_l2_vms, tdcs.attributes = l2_vms, attributes
        tdcs.cpuid_values = tuple(range(2 * len(cpuid_table())))
        tdcs.cpuid_valid = (1,) * len(cpuid_table())
        tdcs.xbuff_offsets = (0,) * 19

    def scope(self, context: Context, access: Access) -> Scope:
        """The fields of the module, TD or VCPU for someone."""
        return Scope(self.module, self.module.lps[0], context, access, self.td, self.vp)

    def read(self, context: Context, access: Access, field_id: int) -> int:
        """Reads an element; the status if that fails."""
        try:
            return read_element(self.scope(context, access), field_id)
        except Fail as fail:
            return fail.status

    def write(self, context: Context, access: Access, field_id: int, value: int, mask: int = ALL) -> int:
        """Writes an element and returns its old value; the status if that fails."""
        try:
            return solo_call(write_element(self.scope(context, access), field_id, value, mask))
        except Fail as fail:
            return fail.status
