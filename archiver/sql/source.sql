-- Statements that run in the database a policy names. Those called *_statement return a statement: whatever goes into it is
-- quoted by format() with %I and %L there, or is one of the expressions that table_columns returns.

-- name: table_shape
-- What kind of table it is; no row when there is none. $1 schema, $2 table. Index: pg_class_relname_nsp_index.
SELECT coalesce(c.relkind = 'p' AND p.partstrat = 'r' AND p.partnatts = 1, false) AS by_range,
       a.attname AS partition_column,
       a.atttypid::regtype::text AS partition_type
FROM pg_class c
JOIN pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN pg_partitioned_table p ON p.partrelid = c.oid
LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = p.partattrs[0]
WHERE n.nspname = $1 AND c.relname = $2;

-- name: table_columns
-- The columns in order, with the kind each has in a file (see columns.py) and the expressions that read and hash it.
-- $1 schema, $2 table. Index: pg_attribute_relid_attnum_index.
WITH columns AS (
  SELECT a.attnum, a.attname AS name, t.typname, t.typcategory, (a.atttypmod - 4) & 2047 AS scale,
         CASE WHEN t.typname = 'numeric' AND a.atttypmod >= 4 THEN (a.atttypmod - 4) >> 16 & 65535 END AS precision
  FROM pg_attribute a
  JOIN pg_type t ON t.oid = a.atttypid
  WHERE a.attrelid = to_regclass(format('%I.%I', $1::text, $2::text)) AND a.attnum > 0 AND NOT a.attisdropped
), kinds AS (
  SELECT *,
    CASE
      WHEN typname = 'int2' THEN 'int16' WHEN typname = 'int4' THEN 'int32' WHEN typname = 'int8' THEN 'int64'
      WHEN typname = 'float4' THEN 'float32' WHEN typname = 'float8' THEN 'float64'
      WHEN typname = 'bool' THEN 'bool' WHEN typname = 'bytea' THEN 'bytes' WHEN typname = 'date' THEN 'date'
      WHEN typname = 'timestamptz' THEN 'instant' WHEN typname = 'timestamp' THEN 'moment'
      -- Up to 18 digits fit the 64 bits of a hash; wider and unbounded ones travel as text, exactly as they stand.
      WHEN precision <= 18 AND scale <= precision THEN format('decimal(%s,%s)', precision, scale)
      WHEN typname = 'uuid' THEN 'uuid'
      ELSE 'text'
    END AS kind
  FROM columns
), readings AS (
  SELECT *,
    CASE
      WHEN typcategory = 'A' THEN format('array_to_json(%I)::text', name)
      WHEN typname = 'inet' THEN format('abbrev(%I)', name)
      WHEN kind IN ('text', 'uuid') OR kind LIKE 'decimal%' THEN format('%I::text', name)
      ELSE format('%I', name)
    END AS read_sql
  FROM kinds
)
SELECT name, kind, typname AS type, read_sql,
  CASE
    WHEN kind IN ('int16', 'int32', 'int64') THEN format('%I::bigint', name)
    WHEN kind = 'bool' THEN format('%I::int::bigint', name)
    WHEN kind = 'date' THEN format('(%I - DATE ''1970-01-01'')::bigint', name)
    WHEN kind IN ('instant', 'moment') THEN format('(extract(epoch FROM %I) * 1000000)::bigint', name)
    WHEN kind IN ('float32', 'float64') THEN
      format('(''x'' || encode(float8send(%I::float8), ''hex''))::bit(64)::bigint', name)
    WHEN kind LIKE 'decimal%' THEN format('(%I * 1%s)::bigint', name, repeat('0', scale))
    ELSE format('(''x'' || left(md5(%s), 16))::bit(64)::bigint', read_sql)
  END AS hash_sql
FROM readings
ORDER BY attnum;

-- name: table_partitions
-- The partitions with their bounds as PostgreSQL prints them. $1 schema, $2 table. Index: pg_inherits_parent_index.
SELECT n.nspname AS schema_name, child.relname AS name, child.relkind = 'r' AS plain,
       pg_get_expr(child.relpartbound, child.oid) AS bound,
       pg_total_relation_size(child.oid) AS size_bytes,
       -- An empty table still has the pages of its TOAST.
       CASE WHEN pg_relation_size(child.oid) = 0 THEN 0 ELSE pg_table_size(child.oid) END AS table_bytes,
       greatest(child.reltuples, 0)::bigint AS estimated_rows
FROM pg_inherits
JOIN pg_class child ON child.oid = inhrelid
JOIN pg_namespace n ON n.oid = child.relnamespace
WHERE inhparent = to_regclass(format('%I.%I', $1::text, $2::text)) AND NOT inhdetachpending
ORDER BY child.relname;

-- name: try_lock
-- One run per table at a time, for as long as the session lasts. $1 the table with its schema.
SELECT pg_try_advisory_lock(hashtextextended('muster archive of ' || $1, 0));

-- name: relation_state
-- Whether a relation is a partition, and the mark that the detach of an archive left; no row when it does not exist.
-- $1 schema, $2 name. Index: pg_class_relname_nsp_index.
SELECT c.relispartition AS attached, coalesce(obj_description(c.oid, 'pg_class'), '') AS mark
FROM pg_class c
JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = $1 AND c.relname = $2;

-- name: begin_copy
-- Before anything is read, so that copy and fingerprint see the same rows.
SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY;

-- name: session_settings
-- What the text form of values depends on.
SELECT set_config('timezone', 'UTC', true), set_config('datestyle', 'ISO', true),
       set_config('intervalstyle', 'iso_8601', true), set_config('extra_float_digits', '1', true),
       set_config('bytea_output', 'hex', true);

-- name: copy_statement
-- Reads a partition, sorted by organization and key. $1 schema, $2 partition, $3 what reads each column, $4 their names,
-- $5 the organization column, $6 the key column or ''.
SELECT format('SELECT %s FROM %I.%I ORDER BY %I%s',
  (SELECT string_agg(format('%s AS %I', read_sql, name), ', ' ORDER BY n)
   FROM unnest($3::text[], $4::text[]) WITH ORDINALITY AS items (read_sql, name, n)),
  $1::text, $2::text, $5::text, CASE WHEN $6::text = '' THEN '' ELSE format(', %I', $6::text) END);

-- name: hot_statement
-- Reads one organization's rows of some days. $1 schema, $2 table, $3 what reads each column, $4 their names,
-- $5 the organization column, $6 the organization, $7 the partition column, $8 first day or NULL, $9 day after the last or NULL.
SELECT format('SELECT %s FROM %I.%I WHERE %I = %L::uuid%s%s',
  (SELECT string_agg(format('%s AS %I', read_sql, name), ', ' ORDER BY n)
   FROM unnest($3::text[], $4::text[]) WITH ORDINALITY AS items (read_sql, name, n)),
  $1::text, $2::text, $5::text, $6::uuid,
  CASE WHEN $8::date IS NULL THEN '' ELSE format(' AND %I >= %L', $7::text, $8::date) END,
  CASE WHEN $9::date IS NULL THEN '' ELSE format(' AND %I < %L', $7::text, $9::date) END);

-- name: fingerprint_statement
-- Computes rows and, for each column, present, total, tie, least and greatest by organization (see fingerprints.py). OFFSET 0
-- keeps the planner from evaluating a hash once for each aggregate. $1 schema, $2 partition, $3 what hashes each column,
-- $4 what reads it, $5 whether its extremes are those of its text, $6 the organization column, $7 what hashes the tie.
SELECT format(
  'SELECT organization, count(*) AS rows, ARRAY[%s] AS sums FROM '
  '(SELECT %I::text AS organization, coalesce(%s, 0) & 2147483647 AS tie, %s FROM %I.%I OFFSET 0) AS hashed GROUP BY organization',
  string_agg(format('count(h%1$s)::text, sum(h%1$s)::text, sum(((h%1$s # (h%1$s >> 31) # (h%1$s >> 62)) & 2147483647) * tie + tie)::text, '
                    'left((min(e%1$s))::text, 128), left((max(e%1$s))::text, 128)', n), ', ' ORDER BY n),
  $6::text, $7::text,
  string_agg(format('%s AS h%s, %s AS e%s', hash_sql, n,
                    CASE WHEN by_text THEN format('(%s) COLLATE "C"', read_sql) ELSE hash_sql END, n), ', ' ORDER BY n),
  $1::text, $2::text)
FROM unnest($3::text[], $4::text[], $5::bool[]) WITH ORDINALITY AS items (hash_sql, read_sql, by_text, n);

-- name: lock_readers_out_statement
-- Keeps every partition attached for the rest of the transaction. $1 schema, $2 table.
SELECT format('LOCK TABLE %I.%I IN ACCESS SHARE MODE', $1::text, $2::text);

-- name: lock_writers_out_statement
-- Readers go on. $1 schema, $2 partition.
SELECT format('LOCK TABLE %I.%I IN SHARE MODE', $1::text, $2::text);

-- name: detach_statement
-- $1 schema of the table, $2 table, $3 schema of the partition, $4 partition.
SELECT format('ALTER TABLE %I.%I DETACH PARTITION %I.%I', $1::text, $2::text, $3::text, $4::text);

-- name: mark_statement
-- Says, in the transaction that detaches it, on whose behalf. $1 schema, $2 partition, $3 the mark.
SELECT format('COMMENT ON TABLE %I.%I IS %L', $1::text, $2::text, $3::text);

-- name: drop_statement
-- $1 schema, $2 partition.
SELECT format('DROP TABLE %I.%I', $1::text, $2::text);

-- name: lock_timeout
-- For the transaction. Shorter than deadlock_timeout (1 s): whoever meets us in a circle goes on, and we try again.
-- $1 milliseconds.
SELECT set_config('lock_timeout', $1::text || 'ms', true);
