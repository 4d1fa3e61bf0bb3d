"""Logs of a real TDX host: what dmesg, ftrace and bpftrace print, read line by line, counted and judged.

``lines`` takes a line apart into when, who and what; ``formats`` knows what the TDX code of different kernels prints;
``faults`` follows the page-fault tracepoints; ``report`` counts, and says what is suspicious.
"""
