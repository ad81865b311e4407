"""The session tracker: live sessions in memory, and their final results. Owns the schema "session_tracker"."""
