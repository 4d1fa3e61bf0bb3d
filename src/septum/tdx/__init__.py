"""The TDX Module 1.5.01: what its interface functions do, lock by lock.

``state/`` holds what the module keeps in memory, ``host/`` the SEAMCALL leaves and ``guest/`` the TDCALL leaves and
other TD exits, one file per family. :class:`septum.tdx.module.Module` is the way in.
"""
