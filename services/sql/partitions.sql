-- name: partition_names
-- The partitions of a table. $1 schema, $2 table. Index: pg_inherits_parent_index.
SELECT child.relname AS name
FROM pg_inherits
JOIN pg_class parent ON parent.oid = inhparent
JOIN pg_namespace n ON n.oid = parent.relnamespace
JOIN pg_class child ON child.oid = inhrelid
WHERE n.nspname = $1 AND parent.relname = $2;

-- name: lock_table_makers
-- Held to the end of the transaction. $1 the table with its schema.
SELECT pg_advisory_xact_lock(hashtextextended('muster partitions of ' || $1, 0));

-- name: create_partition
-- The statements that make a partition, or NULL when it stands by now. Only quoted identifiers and literals go into
-- them. A table of its own that is then attached lets everybody read and write the others meanwhile: CREATE TABLE
-- PARTITION OF locks the whole table, and would wait for the longest of its readers while all others wait behind. The
-- indexes and constraints that it brings become parts of the table's own; an identity column is made one in the table.
-- $1 schema, $2 table, $3 partition, $4 first day, $5 the day after the last. Index: primary keys.
SELECT CASE WHEN to_regclass(format('%I.%I', $1::text, $3::text)) IS NULL THEN
  format('CREATE TABLE %1$I.%2$I (LIKE %1$I.%3$I INCLUDING ALL EXCLUDING IDENTITY)%4$s; '
      'ALTER TABLE %1$I.%3$I ATTACH PARTITION %1$I.%2$I FOR VALUES FROM (%5$L) TO (%6$L)',
    $1::text, $3::text, $2::text,
    -- Unlike PARTITION OF, LIKE leaves the tablespace out.
    (SELECT ' TABLESPACE ' || quote_ident(s.spcname) FROM pg_class c JOIN pg_tablespace s ON s.oid = c.reltablespace
      WHERE c.oid = to_regclass(format('%I.%I', $1::text, $2::text))),
    $4::date, $5::date)
END;
