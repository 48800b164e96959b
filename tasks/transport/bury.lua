-- Law: a message nobody can run leaves the queue with its bytes and the reason, in the step that ends its lease.
--
-- KEYS  unacked, unacked_index, leases, deliveries, dead (by time), messages of the dead, what is known of them
-- ARGV  for each: lease id, id among the dead, what is known (JSON)
-- Reply the number of messages buried
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local buried = 0
redis.call('ZREM', KEYS[3], '')  -- the first write: see fetch.lua
for k = 1, #ARGV, 3 do
  local id, dead = ARGV[k], ARGV[k + 1]
  if redis.call('ZSCORE', KEYS[3], id) then
    local kept = redis.call('HGET', KEYS[1], id)
    if kept then
      local wrapping = tonumber(string.match(id, '^[^|]*%.(%d+)|'))
      local message = string.sub(kept, 2, -(wrapping + 1))
      redis.call('HSET', KEYS[6], dead, message)
      redis.call('HSET', KEYS[7], dead, ARGV[k + 2])
      redis.call('ZADD', KEYS[5], string.format('%.0f', now), dead)
      redis.call('HDEL', KEYS[4], redis.sha1hex(message))
      buried = buried + 1
    end
    redis.call('HDEL', KEYS[1], id)
    redis.call('ZREM', KEYS[2], id)
    redis.call('ZREM', KEYS[3], id)
  end
end
return buried
