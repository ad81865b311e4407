"""Organizations and API keys: who may call the suite. Owns the schema "identity"."""
