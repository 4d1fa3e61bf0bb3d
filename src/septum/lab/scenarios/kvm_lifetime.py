"""TDs, vCPUs and CPUs that come and go while others use them.

KeyIDs are handed out by one table of the module that nearly every leaf about keys locks exclusively: KVM serialises
them for all TDs with ``tdx_lock``. A vCPU is on the list of the CPU that may hold state of it, which only that CPU
changes, with interrupts off.

Evidence: Linux 1e3a825c9ec9 (6.19), comments in ``tdx_flush_vp`` and ``tdx_mmu_release_hkid`` of 6.16.
"""

from __future__ import annotations

from errno import EBADF, EEXIST, EFAULT, EINTR, EIO

from septum.arch.pages import PAGE_4K
from septum.core.cells import Shared
from septum.core.steps import wait_until
from septum.lab.hosts import KERNEL, VCPUS, TdHost, Thread
from septum.lab.scenario import Built, Parameter, scenario
from septum.lab.scenarios.parts import accepts, running_td


@scenario(KERNEL, Parameter("vms", 2, "TDs that are created at once", 2, 3))
def two_tds_created(kernel: str, vms: int) -> Built:
    """KVM_TDX_INIT_VM of several VMs at once.

    TDH.MNG.CREATE locks the key ownership table exclusively, TDH.MNG.KEY.CONFIG the keys of a package. ``tdx_lock`` and
    the choice of one CPU for each package keep them apart: all TDs are created.
    """
    td = TdHost(kernel, 0, initialised=0)
    threads = [
        td.thread(f"VM {number}", f"KVM_TDX_INIT_VM of VM {number}", td.init_vm(), returns=(0,))
        for number in range(1, vms + 1)
    ]
    return td.setting(threads, built=False, cpus=(0, 2))


@scenario(KERNEL)
def create_vs_destroy(kernel: str) -> Built:
    """A TD is created while another ends.

    TDH.PHYMEM.CACHE.WB holds the key ownership table for as long as it takes, TDH.MNG.VPFLUSHDONE and
    TDH.MNG.KEY.FREEID want it exclusively, as TDH.MNG.CREATE does. The TD is created, and no KeyID is lost.
    """
    td = TdHost(kernel, 0, initialised=0)
    create = td.thread("VM 1", "KVM_TDX_INIT_VM of VM 1", td.init_vm(), returns=(0,))
    destroy = td.thread("VM 0", "close(VM 0)", td.close(td.vm, td.gmem), returns=(0,))
    return td.setting([create, destroy], built=False, cpus=(0, 2))


@scenario(KERNEL)
def two_tds_destroyed(kernel: str) -> Built:
    """Two TDs end at once.

    One write-back of a package's caches serves both: the second finds no KeyID to write back. No KeyID and no page is
    lost.
    """
    td = TdHost(kernel, 0, initialised=0)
    other, init = td.new_vm()
    td.make(lambda: td.vmm.tdx_init_vm(other, init))
    threads = [
        td.thread("VM 0", "close(VM 0)", td.close(td.vm, td.gmem), returns=(0,)),
        td.thread("VM 1", "close(VM 1)", td.close(other), returns=(0,)),
    ]
    return td.setting(threads, built=False, at_end=td.nothing_left, cpus=(0, 2))


@scenario(KERNEL, VCPUS)
def close_vs_run(kernel: str, vcpus: int) -> Built:
    """All files of a TD are closed while its vCPUs fault.

    Whoever lets the last reference go destroys the VM, with or without pages mapped; guest_memfd has to give its pages
    back before the KeyID goes. No KeyID and no page is lost.
    """
    td = running_td(kernel, vcpus)
    faults = [accepts(td, index, index * PAGE_4K, returns=(0, -EBADF, -EFAULT, -EIO)) for index in range(vcpus)]
    end = td.thread("main", "close of all files", td.close(td.vm, td.gmem, *td.vcpus), returns=(0,))
    return td.setting([*faults, end], built=True, at_end=td.nothing_left, cpus=(0, 2))


class Threads(Shared):
    """How many threads of the process have ended."""

    ended: int = 0


@scenario(KERNEL, VCPUS)
def process_exit(kernel: str, vcpus: int) -> Built:
    """The process is killed while its vCPUs fault.

    Its threads leave the guest for the signal; the last one takes memory and files with it: mmu notifiers, guest_memfd,
    the VM. No KeyID and no page is lost.
    """
    td, threads = running_td(kernel, vcpus), Threads("threads")

    def vcpu_thread(index: int) -> Thread:
        run = accepts(td, index, index * PAGE_4K).call

        async def until_killed() -> int:
            result: int = await run()
            threads.ended += 1
            return result

        return td.thread(f"vCPU {index}", f"KVM_RUN of vCPU {index}", until_killed, returns=(0, -EINTR))

    async def exit_group() -> int:
        for index in range(vcpus):
            td.vmm.kill(f"vCPU {index}", index)
        await wait_until(lambda: threads.ended == vcpus, "be the last of", threads)
        await td.vmm.exit()
        return 0

    last = td.thread("main", "exit_group", exit_group, returns=(0,))
    vcpu_threads = [vcpu_thread(index) for index in range(vcpus)]
    return td.setting([*vcpu_threads, last], built=True, at_end=td.nothing_left, cpus=(0, 2))


@scenario(KERNEL, Parameter("same", "yes", "whether both want the same id", choices=("no", "yes")))
def create_vcpu_race(kernel: str, same: str) -> Built:
    """Two vCPUs are created at once, with one id (Linux 1e3a825c9ec9).

    The one that is told -EEXIST was loaded before, and is freed on its CPU's list up to 6.18. No list is corrupted.
    """
    td = TdHost(kernel, 0, initialised=0)
    threads = [
        td.thread(f"thread {number}", "KVM_CREATE_VCPU", td.create_vcpu(0 if same == "yes" else number), cpu=number)
        for number in range(2)
    ]
    return td.setting(threads, built=False)


@scenario(KERNEL)
def vcpu_id_taken(kernel: str) -> Built:
    """KVM_CREATE_VCPU with an id that is taken, while the build ends (Linux 1e3a825c9ec9).

    The failed creation leaves a freed vCPU on its CPU's list, if it is not flushed first; when KVM_TDX_FINALIZE_VM was
    faster, the vCPU does not come so far. No list is corrupted.
    """
    td = TdHost(kernel, 1, initialised=1)
    create = td.thread("main", "KVM_CREATE_VCPU", td.create_vcpu(0), cpu=1, returns=(-EEXIST, -EIO))
    finalize = td.thread("vCPU 0", "KVM_TDX_FINALIZE_VM", td.finalize(), cpu=0)
    return td.setting([create, finalize], built=False)


@scenario(KERNEL, Parameter("runs", "yes", "whether the vCPU also runs", choices=("no", "yes")))
def cpu_offline_vs_vcpu_flush(kernel: str, runs: str) -> Built:
    """A CPU goes offline while its vCPU is loaded elsewhere.

    The CPU flushes all vCPUs on its list; the thread that loads the vCPU on another CPU has it flushed by IPI, which
    may come later, or to a CPU that answers no more. The vCPU is flushed once.
    """
    td = running_td(kernel, 2)
    if runs == "yes":
        load = td.thread("vCPU 1", "KVM_RUN of vCPU 1", accepts(td, 1, 0).call, cpu=2, returns=(0,))
    else:
        load = td.thread("vCPU 1", "KVM_PRE_FAULT_MEMORY", td.pre_fault(0, 1), cpu=2, returns=(0,))
    down = td.thread("main", "CPU 1 goes offline", td.cpu_down(1), cpu=0, returns=(0,))
    return td.setting([load, down], built=True)
