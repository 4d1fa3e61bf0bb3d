"""TD_PARAMS: what TDH.MNG.INIT checks in it, and what it derives from it and from the CPU.

- ``native``: what the module has sampled of the CPU;
- ``checks``: ATTRIBUTES, XFAM, EPTP, and the numbers that follow from them;
- ``cpuid``: the CPUID values that the guest will see;
- ``msrs``: virtual MSR values and the MSR bitmaps;
- ``configure``: all of it in the module's order.
"""

from septum.tdx.td_params.configure import configure_td
from septum.tdx.td_params.native import NativeCpu

__all__ = ["NativeCpu", "configure_td"]
