-- What SubmitResults writes. All are bound to one organization and run in the transaction that ends the leases.

-- name: readmit_late
-- Expired allocations whose result came late and counts. $1 organization, $2 days, $3 keys, $4 statuses, $5 recorded at.
-- Index: primary key.
UPDATE work_allocations a SET status = u.status, late = true, ended_at = $5, recorded_at = $5
FROM unnest($2::date[], $3::uuid[], $4::smallint[]) AS u (work_date, key, status)
WHERE a.organization_id = $1 AND a.work_date = u.work_date AND a.allocation_key = u.key AND a.status = 5
  AND a.work_date BETWEEN (SELECT min(d) FROM unnest($2::date[]) d) AND (SELECT max(d) FROM unnest($2::date[]) d);

-- name: quarantine
-- Expired allocations whose result came too late to count. $1 organization, $2 days, $3 keys, $4 slots, $5 clients,
-- $6 the results as JSON, $7 recorded at. Index: primary key.
WITH kept AS (
  INSERT INTO quarantined_results (organization_id, allocation_key, work_date, slot_id, client_id, quarantined_at, result)
  SELECT $1, u.key, u.work_date, u.slot_id, u.client_id, $7, u.result::jsonb
  FROM unnest($2::date[], $3::uuid[], $4::uuid[], $5::text[], $6::text[])
    AS u (work_date, key, slot_id, client_id, result)
)
UPDATE work_allocations a SET quarantined = true, recorded_at = $7
FROM unnest($2::date[], $3::uuid[]) AS u (work_date, key)
WHERE a.organization_id = $1 AND a.work_date = u.work_date AND a.allocation_key = u.key AND a.status = 5
  AND a.work_date BETWEEN (SELECT min(d) FROM unnest($2::date[]) d) AND (SELECT max(d) FROM unnest($2::date[]) d);

-- name: clock
-- The database's clock, for rows of one batch.
SELECT statement_timestamp();

-- name: insert_results
-- $1 organization, $2 created at, $3 keys, $4 days, $5 slots, $6 exits, $7 personas, $8 clients, $9 addresses,
-- $10 instances, $11 outcomes, $12 block types, $13 milliseconds, $14 applied settings, $15 exit addresses,
-- $16 retry after in ms, $17 errors, $18 persona used, $19 product counts, $20 late, $21 traceparents.
INSERT INTO work_results (organization_id, created_at, allocation_key, work_date, slot_id, exit_id, persona_id,
  client_id, client_ip, instance_number, outcome, is_blocked, block_type, execution_time_ms, applied_settings, exit_ip,
  retry_after_ms, error_message, persona_used, product_count, late, traceparent)
SELECT $1, $2, key, work_date, slot_id, exit_id, persona_id, client_id, client_ip, instance_number, outcome,
  outcome = 4, block_type, milliseconds, settings::jsonb, exit_ip, retry_after, error, persona_used, products, late, trace
FROM unnest($3::uuid[], $4::date[], $5::uuid[], $6::uuid[], $7::uuid[], $8::text[], $9::text[], $10::integer[],
  $11::smallint[], $12::text[], $13::integer[], $14::text[], $15::text[], $16::integer[], $17::text[], $18::boolean[],
  $19::integer[], $20::boolean[], $21::text[])
  AS u (key, work_date, slot_id, exit_id, persona_id, client_id, client_ip, instance_number, outcome, block_type,
    milliseconds, settings, exit_ip, retry_after, error, persona_used, products, late, trace);

-- name: insert_products
-- $1 organization, $2 created at, $3 keys, $4 positions, $5 slots, $6 ids, $7 titles, $8 addresses, $9 ranks,
-- $10 attributes.
INSERT INTO product_results (organization_id, created_at, allocation_key, position, slot_id, product_id, title, url,
  rank, attributes)
SELECT $1, $2, key, position, slot_id, product_id, title, url, rank, attributes::jsonb
FROM unnest($3::uuid[], $4::smallint[], $5::uuid[], $6::text[], $7::text[], $8::text[], $9::bigint[], $10::text[])
  AS u (key, position, slot_id, product_id, title, url, rank, attributes);

-- name: insert_activity
-- $1 organization, $2 reported at, $3 keys, $4 clients, $5 addresses, $6 instances, $7 user folders, $8 milliseconds,
-- $9 statuses.
INSERT INTO client_activity_logs (organization_id, reported_at, allocation_key, client_id, client_ip, instance_number,
  user_folder_number, execution_time_ms, status)
SELECT $1, $2, key, client_id, client_ip, instance_number, user_folder_number, milliseconds, status
FROM unnest($3::uuid[], $4::text[], $5::text[], $6::integer[], $7::integer[], $8::integer[], $9::smallint[])
  AS u (key, client_id, client_ip, instance_number, user_folder_number, milliseconds, status);
