"""TDVMCALLs: what a guest asks its host for.

Source: Linux 6.16, ``arch/x86/kvm/vmx/tdx.c``; the Guest-Host Communication Interface (Intel 348552). Handlers return 1
to go on in the guest and 0 for userspace. There are no devices in the kernel: all I/O goes to userspace.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

from septum.arch.pages import PAGE_2M, PAGE_4K
from septum.kvm.abi import (
    KVM_EXIT_HYPERCALL,
    KVM_EXIT_HYPERCALL_LONG_MODE,
    KVM_EXIT_IO,
    KVM_EXIT_MMIO,
    KVM_EXIT_SYSTEM_EVENT,
    KVM_EXIT_TDX,
    KVM_HC_MAP_GPA_RANGE,
    KVM_MAP_GPA_RANGE_DECRYPTED,
    KVM_MAP_GPA_RANGE_ENCRYPTED,
    KVM_SYSTEM_EVENT_TDX_FATAL,
    TDVMCALL_GET_QUOTE,
    TDVMCALL_GET_TD_VM_CALL_INFO,
    TDVMCALL_MAP_GPA,
    TDVMCALL_REPORT_FATAL_ERROR,
    TDVMCALL_SETUP_EVENT_NOTIFY_INTERRUPT,
    TDVMCALL_STATUS_ALIGN_ERROR,
    TDVMCALL_STATUS_INVALID_OPERAND,
    TDVMCALL_STATUS_RETRY,
    TDVMCALL_STATUS_SUBFUNC_UNSUPPORTED,
    TDVMCALL_STATUS_SUCCESS,
)
from septum.kvm.cpuid import kvm_cpuid
from septum.kvm.events import kvm_vcpu_has_events
from septum.kvm.msrs import tdx_get_msr, tdx_set_msr
from septum.kvm.run_struct import (
    HypercallExit,
    IoExit,
    MmioExit,
    SystemEventExit,
    TdxInfoExit,
    TdxNotifyExit,
    TdxQuoteExit,
)
from septum.kvm.vcpu import MpState
from septum.tdx.registers import GPR_NAMES, Regs

if TYPE_CHECKING:
    from septum.kvm.vcpu import Vcpu

TDX_MAP_GPA_MAX_LEN: Final = PAGE_2M
_KVM_ENOSYS: Final = -1000 & (1 << 64) - 1


def _args(vcpu: Vcpu) -> Regs:
    return Regs.from_tuple(vcpu.vp_enter_args)


def set_args(vcpu: Vcpu, **registers: int) -> None:
    """Changes registers that the next TDH.VP.ENTER passes to the guest."""
    values = list(vcpu.vp_enter_args)
    for name, value in registers.items():
        values[GPR_NAMES.index(name)] = value
    vcpu.vp_enter_args = tuple(values)


def tdvmcall_set_return_code(vcpu: Vcpu, status: int) -> int:
    """``tdvmcall_set_return_code``: what the guest finds in R10. Returns 1."""
    set_args(vcpu, r10=status)
    return 1


# -- MapGPA ------------------------------------------------------------------------------------------------------------


def tdx_map_gpa(vcpu: Vcpu) -> int:
    """``tdx_map_gpa``: shared memory becomes private or the other way round; userspace decides, 2 MiB at a time."""
    kvm, args = vcpu.kvm, _args(vcpu)
    gpa, size = args.r12, args.r13
    width = kvm.shared_gpa_bit.bit_length()
    if not kvm.hypercall_exit_enabled >> KVM_HC_MAP_GPA_RANGE & 1:
        status = TDVMCALL_STATUS_SUBFUNC_UNSUPPORTED
    elif not size or (gpa + size - 1) >> width or kvm.is_private_gpa(gpa) != kvm.is_private_gpa(gpa + size - 1):
        status = TDVMCALL_STATUS_INVALID_OPERAND
    elif gpa % PAGE_4K or size % PAGE_4K:
        status = TDVMCALL_STATUS_ALIGN_ERROR
    else:
        vcpu.map_gpa_end = gpa + size
        vcpu.map_gpa_next = gpa
        return tdx_map_gpa_chunk(vcpu)
    set_args(vcpu, r11=gpa)
    return tdvmcall_set_return_code(vcpu, status)


def tdx_map_gpa_chunk(vcpu: Vcpu) -> int:
    """``__tdx_map_gpa``: the next part goes to userspace."""
    kvm, gpa = vcpu.kvm, vcpu.map_gpa_next
    size = min(vcpu.map_gpa_end - gpa, TDX_MAP_GPA_MAX_LEN)
    attributes = KVM_MAP_GPA_RANGE_ENCRYPTED if kvm.is_private_gpa(gpa) else KVM_MAP_GPA_RANGE_DECRYPTED
    vcpu.complete_userspace_io = tdx_complete_vmcall_map_gpa
    return vcpu.run.leave(
        KVM_EXIT_HYPERCALL,
        HypercallExit(
            nr=KVM_HC_MAP_GPA_RANGE,
            arg0=gpa & ~kvm.shared_gpa_bit,
            arg1=size // PAGE_4K,
            arg2=attributes,
            flags=KVM_EXIT_HYPERCALL_LONG_MODE,
        ),
    )


def tdx_complete_vmcall_map_gpa(vcpu: Vcpu) -> int:
    """``tdx_complete_vmcall_map_gpa``: the next part, unless userspace refused or the guest has an interrupt.

    Another ioctl on the vCPU may have put its own exit into ``kvm_run`` meanwhile (KVM_PRE_FAULT_MEMORY that fails); it
    leaves the word that ``ret`` is in as it was.
    """
    if isinstance(vcpu.run.exit, HypercallExit) and vcpu.run.exit.ret:
        set_args(vcpu, r11=vcpu.map_gpa_next)
        return tdvmcall_set_return_code(vcpu, TDVMCALL_STATUS_INVALID_OPERAND)
    vcpu.map_gpa_next += TDX_MAP_GPA_MAX_LEN
    if vcpu.map_gpa_next >= vcpu.map_gpa_end:
        return 1
    if kvm_vcpu_has_events(vcpu):
        set_args(vcpu, r11=vcpu.map_gpa_next)
        return tdvmcall_set_return_code(vcpu, TDVMCALL_STATUS_RETRY)
    return tdx_map_gpa_chunk(vcpu)


# -- other base TDVMCALLs ----------------------------------------------------------------------------------------------


def tdx_report_fatal_error(vcpu: Vcpu) -> int:
    """``tdx_report_fatal_error``: the guest gives up; userspace gets its registers."""
    args = _args(vcpu)
    registers = (
        vcpu.vp_enter_ret, args.rcx, args.rdx, args.rbx, 0, 0, args.rsi, args.rdi,
        args.r8, args.r9, args.r10, args.r11, args.r12, args.r13, args.r14, args.r15,
    )  # fmt: skip
    details = SystemEventExit(KVM_SYSTEM_EVENT_TDX_FATAL, len(registers), struct.pack("<16Q", *registers))
    return vcpu.run.leave(KVM_EXIT_SYSTEM_EVENT, details)


def tdx_get_td_vm_call_info(vcpu: Vcpu) -> int:
    """``tdx_get_td_vm_call_info``: leaf 0 is answered here, leaf 1 by userspace."""
    match _args(vcpu).r12:
        case 0:
            set_args(vcpu, r11=0, r12=0, r13=0, r14=0)
            return tdvmcall_set_return_code(vcpu, TDVMCALL_STATUS_SUCCESS)
        case 1:
            vcpu.complete_userspace_io = tdx_complete_get_td_vm_call_info
            return vcpu.run.leave(KVM_EXIT_TDX, TdxInfoExit(nr=TDVMCALL_GET_TD_VM_CALL_INFO, leaf=1))
    return tdvmcall_set_return_code(vcpu, TDVMCALL_STATUS_INVALID_OPERAND)


def tdx_complete_get_td_vm_call_info(vcpu: Vcpu) -> int:
    """``tdx_complete_get_td_vm_call_info``."""
    info = vcpu.run.exit
    assert isinstance(info, TdxInfoExit)
    set_args(vcpu, r11=info.r11, r12=info.r12, r13=info.r13, r14=info.r14)
    return tdvmcall_set_return_code(vcpu, info.ret)


def tdx_get_quote(vcpu: Vcpu) -> int:
    """``tdx_get_quote``: the buffer must be shared memory."""
    kvm, args = vcpu.kvm, _args(vcpu)
    if kvm.is_private_gpa(args.r12):
        return tdvmcall_set_return_code(vcpu, TDVMCALL_STATUS_INVALID_OPERAND)
    vcpu.complete_userspace_io = tdx_complete_simple
    quote = TdxQuoteExit(
        nr=TDVMCALL_GET_QUOTE,
        ret=TDVMCALL_STATUS_SUBFUNC_UNSUPPORTED,
        gpa=args.r12 & ~kvm.shared_gpa_bit,
        size_bytes=args.r13,
    )
    return vcpu.run.leave(KVM_EXIT_TDX, quote)


def tdx_setup_event_notify_interrupt(vcpu: Vcpu) -> int:
    """``tdx_setup_event_notify_interrupt``: a vector between 32 and 255, for userspace to use."""
    vector = _args(vcpu).r12
    if not 32 <= vector <= 255:
        return tdvmcall_set_return_code(vcpu, TDVMCALL_STATUS_INVALID_OPERAND)
    vcpu.complete_userspace_io = tdx_complete_simple
    notify = TdxNotifyExit(
        nr=TDVMCALL_SETUP_EVENT_NOTIFY_INTERRUPT, ret=TDVMCALL_STATUS_SUBFUNC_UNSUPPORTED, vector=vector
    )
    return vcpu.run.leave(KVM_EXIT_TDX, notify)


def tdx_complete_simple(vcpu: Vcpu) -> int:
    """``tdx_complete_simple``: the guest gets what userspace answered."""
    assert isinstance(vcpu.run.exit, (TdxQuoteExit, TdxNotifyExit))
    return tdvmcall_set_return_code(vcpu, vcpu.run.exit.ret)


_LEAVES: Final[Mapping[int, Callable[[Vcpu], int]]] = {
    TDVMCALL_MAP_GPA: tdx_map_gpa,
    TDVMCALL_REPORT_FATAL_ERROR: tdx_report_fatal_error,
    TDVMCALL_GET_TD_VM_CALL_INFO: tdx_get_td_vm_call_info,
    TDVMCALL_GET_QUOTE: tdx_get_quote,
    TDVMCALL_SETUP_EVENT_NOTIFY_INTERRUPT: tdx_setup_event_notify_interrupt,
}


def handle_tdvmcall(vcpu: Vcpu) -> int:
    """``handle_tdvmcall``."""
    handler = _LEAVES.get(_args(vcpu).r11)
    return handler(vcpu) if handler else tdvmcall_set_return_code(vcpu, TDVMCALL_STATUS_SUBFUNC_UNSUPPORTED)


# -- TDVMCALLs in the place of instructions ----------------------------------------------------------------------------


def tdx_emulate_cpuid(vcpu: Vcpu) -> int:
    """``tdx_emulate_cpuid``: R12 leaf, R13 sub-leaf; the answer in R12 to R15."""
    args = _args(vcpu)
    eax, ebx, ecx, edx = kvm_cpuid(vcpu, args.r12 & 0xFFFF_FFFF, args.r13 & 0xFFFF_FFFF)
    set_args(vcpu, r12=eax, r13=ebx, r14=ecx, r15=edx)
    return 1


def tdx_emulate_hlt(vcpu: Vcpu) -> int:
    """``kvm_emulate_halt_noskip``: the vCPU sleeps until there is an interrupt for it."""
    if not kvm_vcpu_has_events(vcpu):
        vcpu.mp_state = MpState.HALTED
    return 1


def tdx_emulate_rdmsr(vcpu: Vcpu) -> int:
    """``kvm_emulate_rdmsr``: R12 address; the value in R11."""
    value = tdx_get_msr(vcpu, _args(vcpu).r12)
    if value is None:
        return tdvmcall_set_return_code(vcpu, TDVMCALL_STATUS_INVALID_OPERAND)
    set_args(vcpu, r11=value)
    return 1


def tdx_emulate_wrmsr(vcpu: Vcpu) -> int:
    """``kvm_emulate_wrmsr``: R12 address, R13 value."""
    args = _args(vcpu)
    if not tdx_set_msr(vcpu, args.r12, args.r13):
        return tdvmcall_set_return_code(vcpu, TDVMCALL_STATUS_INVALID_OPERAND)
    return 1


def tdx_emulate_vmcall(vcpu: Vcpu) -> int:
    """``tdx_emulate_vmcall``: a KVM hypercall; none is modelled."""
    return tdvmcall_set_return_code(vcpu, _KVM_ENOSYS)


def tdx_emulate_io(vcpu: Vcpu) -> int:
    """``tdx_emulate_io``: R12 size, R13 direction, R14 port, R15 value."""
    args = _args(vcpu)
    if args.r13 not in (0, 1) or args.r12 not in (1, 2, 4):
        return tdvmcall_set_return_code(vcpu, TDVMCALL_STATUS_INVALID_OPERAND)
    vcpu.run.pio_data = args.r15 & (1 << 8 * args.r12) - 1 if args.r13 else 0
    vcpu.complete_userspace_io = _complete_pio_out if args.r13 else tdx_complete_pio_in
    details = IoExit(args.r13, args.r12, args.r14 & 0xFFFF, count=1, data_offset=PAGE_4K)
    return vcpu.run.leave(KVM_EXIT_IO, details)


def _complete_pio_out(vcpu: Vcpu) -> int:
    """``tdx_complete_pio_out``."""
    return 1


def tdx_complete_pio_in(vcpu: Vcpu) -> int:
    """``tdx_complete_pio_in``."""
    assert isinstance(vcpu.run.exit, IoExit)
    set_args(vcpu, r11=vcpu.run.pio_data & (1 << 8 * vcpu.run.exit.size_bytes) - 1)
    return 1


def tdx_emulate_mmio(vcpu: Vcpu) -> int:
    """``tdx_emulate_mmio``: R12 size, R13 direction, R14 a shared address, R15 value."""
    kvm, args = vcpu.kvm, _args(vcpu)
    size, write, gpa = args.r12, args.r13, args.r14
    if size not in (1, 2, 4, 8) or write not in (0, 1) or kvm.is_private_gpa(gpa) or kvm.is_private_gpa(gpa + size - 1):
        return tdvmcall_set_return_code(vcpu, TDVMCALL_STATUS_INVALID_OPERAND)
    data = (args.r15 & (1 << 8 * size) - 1 if write else 0).to_bytes(8, "little")
    if not write:
        vcpu.complete_userspace_io = tdx_complete_mmio_read
    return vcpu.run.leave(KVM_EXIT_MMIO, MmioExit(gpa & ~kvm.shared_gpa_bit, data, size, write))


def tdx_complete_mmio_read(vcpu: Vcpu) -> int:
    """``tdx_complete_mmio_read``."""
    mmio = vcpu.run.exit
    assert isinstance(mmio, MmioExit)
    set_args(vcpu, r11=int.from_bytes(mmio.data[: mmio.length], "little"))
    return 1
