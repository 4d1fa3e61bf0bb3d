"""Live migration of a TD: what its interface functions are made of.

- ``aes_gcm``: the cipher under which everything leaves one platform and enters another;
- ``mbmd``: the header of a migration bundle;
- ``streams``: migration streams: operands, sessions, interrupted functions;
- ``gpa_list``, ``mac_list``, ``entries``: lists of pages, their MACs, and their Secure EPT entries;
- ``state_lists``: immutable and mutable state of a TD and of its VCPUs as pages of metadata lists.

Recordings say what these functions answer to TDs that do not migrate. Within a session their statuses, locks, states
of TDs and entries, and data follow the module's source; nothing of that was measured, so it is unverified.
"""
