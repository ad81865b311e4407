"""Runs the whole suite on one machine: an embedded PostgreSQL and one supervised process per service."""
