"""The allocator against what one would use instead: seven ratios, each measured against its baseline in one run.

`servers` starts PostgreSQL, replicas and the bare server; `stock` fills their databases; `load` and `fleet` are the
clients; `baselines` are what we are measured against; `rows` are the seven measures; `table` prints them.
"""
