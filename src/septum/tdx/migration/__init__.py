"""Live migration of a TD: what its interface functions are made of.

- ``aes_gcm``: the cipher under which everything leaves one platform and enters another;
- ``mbmd``: the header of a migration bundle;
- ``streams``: migration streams: operands, sessions, interrupted functions;
- ``gpa_list``: lists of pages to export, import or unblock;
- ``state_lists``: immutable and mutable state of a TD and of its VCPUs as pages of metadata lists.

Recordings exist for statuses and lock order of these functions, not for their data: what bundles hold is unverified.
"""
