-- Writes the states that are newer than what stands, and publishes exactly those, in the order in which they stand.
-- KEYS: counters, records, ends. ARGV: channel, head of the message, entries, life of the keys in milliseconds, seconds
-- for which a final state stays readable, seconds for which it is remembered. Entries are laid out as in
-- redis_packing.py. Returns the ids whose stored state is newer, and those of counters alone where no state of the same
-- owner stands that they could go with.
local function newer(state, stored)
  local final, high, low, revision, owner, owner_low = struct.unpack('>BI4I4I4I4I4', state)
  local final_stored, high_stored, low_stored, revision_stored, owner_stored, owner_low_stored =
    struct.unpack('>BI4I4I4I4I4', stored)
  if final ~= final_stored then return final > final_stored end
  if high ~= high_stored then return high > high_stored end
  if low ~= low_stored then return low > low_stored end
  if revision ~= revision_stored then return revision > revision_stored end
  if owner ~= owner_stored then return owner > owner_stored end
  return owner_low > owner_low_stored
end

local entries = ARGV[3]
local ids, states, records, begins = {}, {}, {}, {}
local count, place = 0, 1
while place <= #entries do
  count = count + 1
  begins[count] = place
  ids[count], states[count], records[count], place = struct.unpack('>I2c0c46I4c0', entries, place)
end
begins[count + 1] = place

local stored = redis.call('HMGET', KEYS[1], unpack(ids))
local written, described, taken, refused = {}, {}, {}, {}
local now = tonumber(redis.call('TIME')[1])
for index = 1, count do
  local id, state = ids[index], states[index]
  local alone = records[index] == ''
  if alone and not (stored[index] and string.sub(state, 14, 21) == string.sub(stored[index], 14, 21)) then
    refused[#refused + 1] = id
  elseif not stored[index] or newer(state, stored[index]) then
    written[#written + 1] = id
    written[#written + 1] = state
    if not alone then
      described[#described + 1] = id
      described[#described + 1] = records[index]
    end
    taken[#taken + 1] = index
    if string.byte(state) == 1 then
      redis.call('ZADD', KEYS[3], now + ARGV[5], 'r' .. id, now + ARGV[6], 'c' .. id)
    end
  elseif string.sub(state, 1, 21) ~= string.sub(stored[index], 1, 21) then
    -- The same order is what stands.
    refused[#refused + 1] = id
  end
end
if #taken == 0 then return refused end

redis.call('HSET', KEYS[1], unpack(written))
if #described > 0 then redis.call('HSET', KEYS[2], unpack(described)) end
for _, key in ipairs(KEYS) do redis.call('PEXPIRE', key, ARGV[4]) end
if #refused > 0 then
  local parts = {}
  for place, index in ipairs(taken) do
    parts[place] = string.sub(entries, begins[index], begins[index + 1] - 1)
  end
  entries = table.concat(parts)
end
redis.call('PUBLISH', ARGV[1], ARGV[2] .. entries)
return refused
