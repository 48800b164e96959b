-- Law: a run is given to one who asks, and to the next one only when so much time has passed since, by Redis' own clock.
--
-- KEYS  the list of each model (zset: run → ms when somebody last looked at it)
-- ARGV  1 what   2 seconds after which a run that nobody could look at is forgotten   3… its arguments, see below
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local text = string.format('%.0f', now)

local what, reply = ARGV[1], {text}
if what == 'put' then  -- 3 run
  redis.call('ZADD', KEYS[1], text, ARGV[3])
  redis.call('EXPIRE', KEYS[1], ARGV[2])
elseif what == 'take' then  -- 3 ms   4 most
  for index, key in ipairs(KEYS) do
    redis.call('ZREMRANGEBYSCORE', key, '-inf', now - 1000 * tonumber(ARGV[2]))
    local due = redis.call('ZRANGEBYSCORE', key, '-inf', now - tonumber(ARGV[3]), 'WITHSCORES', 'LIMIT', 0, ARGV[4])
    for i = 1, #due, 2 do
      redis.call('ZADD', key, text, due[i])
      reply[#reply + 1] = {index - 1, due[i], due[i + 1]}
    end
  end
elseif what == 'settle' then  -- 3 run   4 ms when it was taken   5 ms when it was looked at before; none to forget it
  local score = redis.call('ZSCORE', KEYS[1], ARGV[3])
  if score and tonumber(score) == tonumber(ARGV[4]) then
    if ARGV[5] then
      redis.call('ZADD', KEYS[1], ARGV[5], ARGV[3])
    else
      redis.call('ZREM', KEYS[1], ARGV[3])
    end
  end
end
return reply
