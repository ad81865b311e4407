-- Removes sessions that their owner forgot, and publishes those: neither one that another replica owns by now, nor a
-- final state, which leaves by `sweep`.
-- KEYS: counters, records, commands. ARGV: channel, head of the message, ids, owner. Ids are laid out as in
-- redis_packing.py.
local place, dropped = 1, {}
while place <= #ARGV[3] do
  local id
  id, place = struct.unpack('>I2c0', ARGV[3], place)
  local stored = redis.call('HGET', KEYS[1], id)
  if stored and string.byte(stored) == 0 and string.sub(stored, 14, 21) == ARGV[4] then
    for _, key in ipairs(KEYS) do redis.call('HDEL', key, id) end
    dropped[#dropped + 1] = struct.pack('>I2c0', #id, id)
  end
end
if #dropped > 0 then redis.call('PUBLISH', ARGV[1], ARGV[2] .. table.concat(dropped)) end
