"""The session tracker against what one would use instead: seven ratios, each measured in one run.

`servers` starts PostgreSQL, the tracker and the bare server (`sink`); `load` is the client processes; `baselines` are
what we are measured against; `rows` are the seven measures; `table` prints them.
"""
