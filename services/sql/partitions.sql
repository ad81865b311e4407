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
-- The statement that makes a partition, or NULL when it stands by now. Only quoted identifiers and literals go into it.
-- $1 schema, $2 table, $3 partition, $4 first day, $5 the day after the last.
SELECT CASE WHEN to_regclass(format('%I.%I', $1::text, $3::text)) IS NULL THEN
  format('CREATE TABLE %I.%I PARTITION OF %I.%I FOR VALUES FROM (%L) TO (%L)', $1::text, $3::text, $1::text, $2::text, $4::date, $5::date)
END;
