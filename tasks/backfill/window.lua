-- Law: each change of the hints of a backfill is one step, by Redis' own clock.
--
-- KEYS  1 queued (zset: chunk → ms when it was issued)   2 running (zset: chunk → ms until its claim ends)
--       3 owners (hash: chunk → owner)   4 cursors (hash: chunk → the rows it was about to run)
-- ARGV  1 what   2 seconds the keys are kept   3… its arguments, see below
local queued, running, owners, cursors = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
for _, chunk in ipairs(redis.call('ZRANGEBYSCORE', running, '-inf', now)) do
  redis.call('HDEL', owners, chunk)
end
redis.call('ZREMRANGEBYSCORE', running, '-inf', now)

local what, reply = ARGV[1], 0
if what == 'issue' then  -- 3 most   4… candidates, in order
  reply = {}
  for i = 4, #ARGV do
    if #reply >= tonumber(ARGV[3]) then break end
    if not redis.call('ZSCORE', running, ARGV[i]) and redis.call('ZADD', queued, 'NX', now, ARGV[i]) == 1 then
      reply[#reply + 1] = ARGV[i]
    end
  end
elseif what == 'claim' then  -- 3 chunk   4 owner   5 ms
  local owner = redis.call('HGET', owners, ARGV[3])
  if not owner or owner == ARGV[4] then
    redis.call('ZADD', running, now + tonumber(ARGV[5]), ARGV[3])
    redis.call('HSET', owners, ARGV[3], ARGV[4])
    redis.call('ZREM', queued, ARGV[3])
    reply = 1
  end
elseif what == 'release' then  -- 3 chunk   4 owner
  if redis.call('HGET', owners, ARGV[3]) == ARGV[4] then
    redis.call('HDEL', owners, ARGV[3])
    redis.call('ZREM', running, ARGV[3])
    redis.call('HDEL', cursors, ARGV[3])
  end
elseif what == 'expect' then  -- 3 chunk
  redis.call('ZADD', queued, now, ARGV[3])
elseif what == 'forget' then  -- 3 chunk
  redis.call('ZREM', queued, ARGV[3])
elseif what == 'count' then
  reply = {redis.call('ZCARD', queued), redis.call('ZCARD', running)}
end
for _, key in ipairs(KEYS) do redis.call('EXPIRE', key, ARGV[2]) end
return reply
