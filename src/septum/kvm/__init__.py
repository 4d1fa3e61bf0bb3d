"""KVM's TDX support on a modelled host: the kernel's side of everything that happens to a TD.

A scenario builds a host, starts processes on it, and drives TDs through the same ioctls that a VMM uses::

    host = Host(profile("small"), Kernel("v6.16"))
    host.boot()                                    # TDX enabled: SYS.INIT ... TDMR.INIT, run solo
    vmm = Process(host, "qemu")

    async def main() -> int:
        vm = await vmm.create_vm(KVM_X86_TDX_VM)   # a file descriptor, or -errno; never an exception
        caps = await vmm.tdx_capabilities(vm)
        await vmm.enable_cap(vm, KVM_CAP_SPLIT_IRQCHIP, 24)
        await vmm.enable_cap(vm, KVM_CAP_EXIT_HYPERCALL, 1 << KVM_HC_MAP_GPA_RANGE)
        await vmm.tdx_init_vm(vm, caps.choose(host.module.hardware.cpu))
        vcpu = await vmm.create_vcpu(vm, 0)
        await vmm.tdx_init_vcpu(vcpu, hob_address)
        gmem = await vmm.create_guest_memfd(vm, size)
        await vmm.set_user_memory_region2(vm, UserspaceMemoryRegion2(slot=0, ...))
        await vmm.set_memory_attributes(vm, gpa, size, KVM_MEMORY_ATTRIBUTE_PRIVATE)
        region = Region(source_addr, gpa, nr_pages)
        await vmm.tdx_init_mem_region(vcpu, region, KVM_TDX_MEASURE_MEMORY_REGION)
        await vmm.tdx_finalize_vm(vm)
        vmm.attach_guest(vcpu, guest)              # what runs inside: see guest_protocol.Guest
        while (r := await vmm.run(vcpu)) == 0:     # KVM_RUN
            run = vmm.kvm_run(vcpu)                # exit_reason, and what goes with it
            ...
        await vmm.close(vcpu), await vmm.close(gmem), await vmm.close(vm)

    run([Program(Task("vmm", cpu=0), main), *host.interrupt_contexts()], choose)

A thread that calls into the kernel is a task (:class:`septum.core.steps.Task`) pinned to a CPU; the programs of
``host.interrupt_contexts()`` belong to every run, because CPUs send each other interrupts. Source pages of
``tdx_init_mem_region`` live in the process: ``address = vmm.mmap(size)``, ``vmm.write(address, data)``.
``host.counts`` tells SEAMCALLs by leaf and status, ``host.pages`` what is allocated and what leaked and why,
``host.log`` the kernel's messages (WARN_ON, KVM_BUG_ON, pr_warn) with counts.

Rooms inside the package, lowest first:

=================  ================================================================================================
``abi``            numbers and structures of the ioctl interface
``kernel``         which kernel this is: contention policies, locks per ioctl, named fixes
``guest_protocol`` what a guest is to KVM
``host``           CPUs, pages, KeyIDs, ``tdx_enable``
``seamcall``       one wrapper per SEAMCALL, counted, traced, with fault injection
``vm``, ``vcpu``   ``struct kvm``, ``struct kvm_vcpu``: state, locks, requests
``contention``     what is done when the module says BUSY
``memslots``, ``attributes``, ``gmem``, ``mmu``   guest memory
``tdx``            ``arch/x86/kvm/vmx/tdx.c``
``run``            KVM_RUN
``process``        :class:`~septum.kvm.process.Process`: file descriptors and ioctls; ``raw_ioctl``: in bytes
=================  ================================================================================================
"""
