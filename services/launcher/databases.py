"""What a server must have before migrations can run: the database, and a role with a schema of its own per service."""

import contextlib
from collections.abc import Mapping

import psycopg
from psycopg import sql


def ensure_database(superuser_dsn: str, database: str, roles: Mapping[str, str]) -> None:
    """Make a database whose login roles each own one schema, as far as any of it is missing.

    Each role's search_path is its schema; it can use no other role's, and nobody but the superuser can create in
    `public`. Safe to repeat and to run twice at once. Roles belong to the whole server: the same role has the same
    schema name in every database. A role gets no password here.

    Args:
        superuser_dsn: Of any database on the server, as a superuser.
        database: Its name.
        roles: Schema by login role.

    Raises:
        psycopg.Error: The server refused; what was made so far stays, and the next call goes on from there.
    """
    name = sql.Identifier(database)
    with psycopg.connect(superuser_dsn, autocommit=True) as connection:
        found = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [database]).fetchone()
        if found is None:
            # Two at once: the loser sees either the name or, a moment earlier, the index entry.
            with contextlib.suppress(psycopg.errors.DuplicateDatabase, psycopg.errors.UniqueViolation):
                connection.execute(sql.SQL("CREATE DATABASE {}").format(name))
        for role in roles:
            known = connection.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", [role]).fetchone()
            if known is None:
                with contextlib.suppress(psycopg.errors.DuplicateObject, psycopg.errors.UniqueViolation):
                    connection.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(role)))
    with psycopg.connect(superuser_dsn, dbname=database) as connection:
        # Held to the commit: ALTER ROLE and GRANT fail ("tuple concurrently updated") when two run at once.
        connection.execute("SELECT pg_advisory_xact_lock(hashtextextended('muster.ensure_database', 0))")
        connection.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
        connection.execute(sql.SQL("REVOKE ALL ON DATABASE {} FROM PUBLIC").format(name))
        for role, schema in roles.items():
            names = {"database": name, "role": sql.Identifier(role), "schema": sql.Identifier(schema)}
            for statement in (
                "GRANT CONNECT, TEMPORARY ON DATABASE {database} TO {role}",
                "CREATE SCHEMA IF NOT EXISTS {schema} AUTHORIZATION {role}",
                "ALTER ROLE {role} SET search_path TO {schema}",
            ):
                connection.execute(sql.SQL(statement).format(**names))
