"""Userspace: reads TDVF firmware, lays out a VM's memory, predicts what the TD will measure and builds the TD."""
