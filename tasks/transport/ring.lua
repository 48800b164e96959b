-- Law: as push.lua, for messages that reached their lists another way (kombu's batches, queues that expire).
--
-- KEYS  the bells
-- ARGV  1 ms a bell is kept
for _, bell in ipairs(KEYS) do
  if redis.pcall('EXISTS', bell) == 0 then
    redis.pcall('LPUSH', bell, '1')
    redis.pcall('PEXPIRE', bell, ARGV[1])
  end
end
return #KEYS
