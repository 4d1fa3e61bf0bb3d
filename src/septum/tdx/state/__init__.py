"""What the TDX Module keeps: platform-wide state, TDs, virtual processors, and the metadata of physical pages."""
