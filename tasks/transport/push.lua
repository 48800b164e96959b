-- Law: a message that is in its list has rung.
--
-- One token is enough: whoever takes it and leaves messages behind rings again (fetch.lua), so the bell goes through all
-- idle consumers as long as there is work.
--
-- KEYS  the list, its bell
-- ARGV  1 the message   2 ms a bell is kept
-- Reply the length of the list, or Redis' own refusal
local length = redis.pcall('LPUSH', KEYS[1], ARGV[1])
if type(length) == 'number' and redis.pcall('EXISTS', KEYS[2]) == 0 then
  redis.pcall('LPUSH', KEYS[2], '1')
  redis.pcall('PEXPIRE', KEYS[2], ARGV[2])
end
return length
