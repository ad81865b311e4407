"""The persona store: personas, their bundles, and the leases on both."""
