"""The TDP MMU: page tables for guest physical addresses, a direct one for shared memory and a mirror for private.

``spte``: values of entries, tables. ``walk``: finding entries. ``mirror``: changing an entry and what hangs on it.
``fault``: mapping. ``zap``: unmapping. ``invalidate``: keeping the two apart. ``roots``: where the tables begin.
"""
