"""A fleet under faults, the history of what it was told, and the proof that the history is sound."""
