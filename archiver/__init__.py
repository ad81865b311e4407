"""The archiver: partitions ahead of the clock, a verified cold archive behind it, and queries over both."""
