"""The chassis every service stands on, the launcher that runs them all, and the `muster` command.

A service hands the chassis one ``bind`` function (see :mod:`services.chassis`) and gets configuration, logs, metrics,
health, authentication, error mapping, a database pool and an orderly stop. Nothing here knows what a service does.
"""
