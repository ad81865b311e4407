"""The source documents' own reports: their SQL, and our tables under their names."""

from __future__ import annotations

# The documents' statements as they stand, but for the placeholder of one address, which is $1 here.
TODAYS_WORK = """
SELECT * FROM v1_hub_work_dashboard
WHERE work_date = CURRENT_DATE
ORDER BY completion_rate DESC;
"""
CLIENT_PERFORMANCE = """
SELECT
    c.client_ip,
    c.client_name,
    COUNT(DISTINCT al.instance_number) as active_instances,
    COUNT(*) as today_tasks,
    AVG(al.execution_time_ms) as avg_time,
    SUM(CASE WHEN al.status = 'success' THEN 1 ELSE 0 END) as successes
FROM v1_hub_clients c
JOIN v1_hub_client_activity_logs al ON c.client_ip = al.client_ip
WHERE al.reported_at >= CURRENT_DATE
GROUP BY c.client_ip, c.client_name;
"""
SETTINGS_EFFECT = """
SELECT
    applied_cart_click,
    applied_block_mercury,
    applied_block_image_cdn,
    applied_block_img1a_cdn,
    applied_block_thumbnail_cdn,
    COUNT(*) as total,
    AVG(execution_time_ms) as avg_time,
    SUM(CASE WHEN status = 'success' THEN 1 ELSE 0 END)::numeric / COUNT(*) * 100 as success_rate
FROM v1_hub_work_results
WHERE created_at >= CURRENT_DATE - INTERVAL '7 days'
GROUP BY
    applied_cart_click,
    applied_block_mercury,
    applied_block_image_cdn,
    applied_block_img1a_cdn,
    applied_block_thumbnail_cdn
HAVING COUNT(*) >= 10
ORDER BY success_rate DESC;
"""
BLOCKS = """
SELECT
    block_type,
    COUNT(*) as count,
    COUNT(DISTINCT client_ip) as affected_clients
FROM v1_hub_work_results
WHERE is_blocked = true
  AND created_at >= CURRENT_DATE - INTERVAL '1 hour'
GROUP BY block_type;
"""
CLIENT_ACTIVITY = """
SELECT
    client_ip,
    MAX(reported_at) as last_activity,
    COUNT(DISTINCT instance_number) as instances_used,
    COUNT(DISTINCT user_folder_number) as folders_used
FROM v1_hub_client_activity_logs
WHERE client_ip = $1
  AND reported_at >= CURRENT_DATE - INTERVAL '1 hour'
GROUP BY client_ip;
"""

# Our tables under the documents' names. Theirs tell machines apart by address, ours by id, so the id stands for it.
VIEWS = """
CREATE TEMP VIEW v1_hub_work_dashboard AS
  SELECT * FROM allocator.work_dashboard WHERE organization_id = '{organization}';
CREATE TEMP VIEW v1_hub_clients AS
  SELECT client_id AS client_ip, client_name FROM allocator.clients WHERE organization_id = '{organization}';
CREATE TEMP VIEW v1_hub_client_activity_logs AS
  SELECT client_id AS client_ip, instance_number, user_folder_number, execution_time_ms,
    CASE status WHEN 2 THEN 'success' WHEN 3 THEN 'failed' ELSE 'blocked' END AS status,
    reported_at + {shift} AS reported_at
  FROM allocator.client_activity_logs WHERE organization_id = '{organization}';
CREATE TEMP VIEW v1_hub_work_results AS
  SELECT (applied_settings->>'cart_click')::boolean AS applied_cart_click,
    (applied_settings->>'block_mercury')::boolean AS applied_block_mercury,
    (applied_settings->>'block_image_cdn')::boolean AS applied_block_image_cdn,
    (applied_settings->>'block_img1a_cdn')::boolean AS applied_block_img1a_cdn,
    (applied_settings->>'block_thumbnail_cdn')::boolean AS applied_block_thumbnail_cdn,
    execution_time_ms, CASE outcome WHEN 2 THEN 'success' WHEN 3 THEN 'failed' ELSE 'blocked' END AS status,
    is_blocked, block_type, client_id AS client_ip, created_at + {shift} AS created_at
  FROM allocator.work_results WHERE organization_id = '{organization}';
"""
# The documents write "the last hour" as an hour before midnight. Moved on until it is midnight now, they say what they
# mean.
AS_IF_MIDNIGHT = "(CURRENT_DATE::timestamptz - now())"
