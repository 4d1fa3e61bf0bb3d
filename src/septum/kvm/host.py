"""A host: the machine, its TDX Module, and what the kernel keeps for all VMs together.

Source: Linux 6.16, ``arch/x86/virt/vmx/tdx/tdx.c``, ``arch/x86/kvm/vmx/tdx.c``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from errno import ENOSPC
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from septum.core.cells import Fixed, Shared, SharedMap
from septum.core.interrupts import Cpu
from septum.core.klocks import Mutex, RwSem
from septum.core.run import run_solo
from septum.core.steps import Program, Task
from septum.kvm.ipi import Ipis
from septum.kvm.kernel import Kernel
from septum.kvm.kernel_log import KernelLog
from septum.kvm.pages import HostPages
from septum.kvm.returns import SeamcallReturns
from septum.kvm.seamcall import Injection, Seamcalls
from septum.kvm.sysinfo import SysInfo
from septum.tdx.module import Module

if TYPE_CHECKING:
    from septum.arch.platform import Platform
    from septum.kvm.files import File
    from septum.kvm.vcpu import Vcpu

T = TypeVar("T")

MODULE_FEATURES: Final = frozenset({"vp_init_v1"})
"""What Linux 6.16 needs of a module beyond 1.5.01."""
HUGE_PAGE_FEATURES: Final = MODULE_FEATURES | {"enhanced_demote"}
"""What it needs to map private memory 2 MiB at a time."""


class Global(Shared):
    """Global variables of the kernel.

    ``keyids``: bit n is set while private KeyID n is in use (``tdx_guest_keyid_pool``). ``num_vms`` numbers VMs.
    """

    keyids: int = 0
    nr_configured_hkid: int = 0
    num_vms: int = 0
    enable_tdx_huge_page: bool = False
    """The module parameter ``tdx_huge_page``, as it is once the TDX Module was asked what it can do."""


class Host(Fixed):
    """A machine that runs Linux. :meth:`boot` enables TDX; until then no TD can be created."""

    def __init__(
        self,
        platform: Platform,
        kernel: Kernel | None = None,
        *,
        module: Module | None = None,
        injections: Iterable[Injection] = (),
    ) -> None:
        self.platform = platform
        self.kernel = kernel or Kernel()
        features = HUGE_PAGE_FEATURES if self.kernel.has("huge-pages") else MODULE_FEATURES
        self.module = module or Module(platform, features=features)
        self.log = KernelLog()
        self.pages = HostPages(self.module)
        self.seamcall_returns = SeamcallReturns("SEAMCALL waitqueue")
        sleepers = self.seamcall_returns if "waitqueue" in self.kernel.policies.values() else None
        self.seamcalls = Seamcalls(self.module, injections, sleepers)
        self.cpus = [Cpu(f"CPU{index}", index=index) for index in range(platform.num_lps)]
        self.ipis = Ipis(self.cpus)
        self.state = Global("kernel")
        self.sysinfo: SysInfo | None = None
        self.tdx_lock = Mutex("tdx_lock")
        """Serialises SEAMCALLs that lock the key ownership table (``tdx_lock``)."""
        self.cpu_hotplug_lock = RwSem("cpu_hotplug_lock")
        self.task_work: SharedMap[str, tuple[File, ...]] = SharedMap("task work", ())
        """Per task, files that it is to release on its way to userspace."""
        self.signals: SharedMap[str, bool] = SharedMap("signals", False)
        """Tasks that a signal is pending for."""
        self.need_resched: SharedMap[int, bool] = SharedMap("need_resched", False)
        """Per CPU, whether its thread should make way (TIF_NEED_RESCHED)."""
        self._made: dict[tuple[Any, ...], Any] = {}
        self.associated_tdvcpus: SharedMap[int, tuple[Vcpu, ...]] = SharedMap("associated_tdvcpus", ())
        """Per CPU, the vCPUs that may have state in it."""

    def boot(self) -> None:
        """Boots Linux with ``kvm_intel.tdx=1``: brings the module up and learns what it can do.

        :raises Violation: when the module refuses.
        """
        from septum.kvm import bringup, interrupts  # noqa: PLC0415 -- they need hosts

        interrupts.register_functions(self)
        task = Task("boot", cpu=0)

        async def main() -> None:
            self.sysinfo = info = await bringup.tdx_bringup(self)
            can_split = info.supports_demote_nointerrupt() or self.kernel.has("demote-loops")
            self.state.enable_tdx_huge_page = self.kernel.has("huge-pages") and can_split

        run_solo([Program(task, main), *self.interrupt_contexts()])

    def once(self, key: tuple[Any, ...], make: Callable[[], T]) -> T:
        """The object that ``make`` returns for ``key``, made when it is first asked for.

        Objects that the kernel allocates while tasks run are made this way: a task that is brought to a place again,
        by running it again, finds the same object there.
        """
        found = self._made.get(key)
        if found is None:
            found = self._made[key] = make()
        return cast(T, found)

    def interrupt_contexts(self) -> list[Program]:
        """Programs that belong to every run: what CPUs do when others interrupt them."""
        return self.ipis.interrupt_contexts()

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """How many SEAMCALLs were made: leaf name to status name to number."""
        return self.seamcalls.counts()

    def online_cpus(self) -> list[int]:
        """Indices of the CPUs that are online."""
        return [cpu.index for cpu in self.cpus if cpu.online]

    def first_online_cpus(self) -> list[int]:
        """The first online CPU of each package."""
        first: dict[int, int] = {}
        for index in self.online_cpus():
            first.setdefault(self.platform.lp_package[index], index)
        return list(first.values())

    # -- KeyIDs of TDs ---------------------------------------------------------------------------------------------

    def tdx_guest_keyid_alloc(self) -> int:
        """``tdx_guest_keyid_alloc``: a private KeyID, or -ENOSPC."""
        private = self.platform.private_hkids
        for keyid in range(self.platform.global_private_hkid + 1, private.stop):
            if not self.state.keyids >> keyid & 1:
                self.state.keyids |= 1 << keyid
                return keyid
        return -ENOSPC

    def keyids_in_use(self) -> list[int]:
        """KeyIDs that TDs have, or had when they ended without giving them back."""
        return [keyid for keyid in self.platform.private_hkids if self.state.keyids >> keyid & 1]

    def tdx_guest_keyid_free(self, keyid: int) -> None:
        """``tdx_guest_keyid_free``."""
        self.state.keyids &= ~(1 << keyid)
