"""The client of the Muster control plane."""
