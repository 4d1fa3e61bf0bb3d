"""What runs inside a TD: scripted guests.

A script is a coroutine function that gets a :class:`~septum.guest.vcpu.Vcpu`::

    async def script(vcpu: Vcpu) -> bytes:
        await vcpu.accept(0x20_0000, 0x40_0000)          # TDG.MEM.PAGE.ACCEPT, again after each EPT violation
        await vcpu.touch(0x50_0000)                      # a #VE on a pending page is handled by accepting it
        await vcpu.map_gpa(0x30_0000, 0x1000, shared=True)
        report = await vcpu.report(bytes(64), 0x60_0000)
        return report.td_info.mr_td                      # then the VCPU halts for ever

    vmm.attach_guest(vcpu_fd, ScriptedGuest(script))

It runs under every scheduler and in the explorer: a script asks for instructions and gets their results, and does
nothing else, so what tasks share is in cells and where a script stands can be found again.

==================  ===============================================================================================
``instructions``    TDCALL, loads, stores and fetches, waiting: what the CPU does about them
``vcpu``            a VCPU as a script sees it: calls to the module and to the host, memory, #VE
``scripted``        :class:`~septum.guest.scripted.ScriptedGuest`, a guest that is a script
``tlb``             translations that CPUs may have cached
``hob``             the list of memory that firmware is given
``scripts``         ready scripts by name
==================  ===============================================================================================
"""
