"""``arch/x86/kvm/vmx/tdx.c`` of Linux 6.16, piece by piece.

``sept``: hooks of the MMU into the Secure EPT. ``keys``: KeyIDs and pages taken back. ``td``: a TD's life.
``vcpu``: a vCPU's life. ``params``: what userspace asks for. ``build``: initial memory. ``cpuid``: what the guest sees.
``exits``, ``tdvmcall``: what guests leave for.
"""
