-- Law: the first terminal state of a job wins; a result that comes later changes nothing and tells nobody.
--
-- Stores many results in one step, each as Celery's Redis backend does: SETEX, then PUBLISH to whoever waits.
--
-- KEYS  the results' keys (the channels have the same names)
-- ARGV  1 seconds a result is kept, 0 for ever   then for each key: the encoded result
-- Reply the number of results that were stored
local ttl = tonumber(ARGV[1])
local stored = 0
for k, key in ipairs(KEYS) do
  local known = redis.call('GET', key)
  local done = false
  if known then
    local ok, meta = pcall(cjson.decode, known)
    local status = ok and type(meta) == 'table' and meta.status
    done = status == 'SUCCESS' or status == 'FAILURE' or status == 'REVOKED'
  end
  if not done then
    if ttl > 0 then
      redis.call('SETEX', key, ttl, ARGV[k + 1])
    else
      redis.call('SET', key, ARGV[k + 1])
    end
    redis.call('PUBLISH', key, ARGV[k + 1])
    stored = stored + 1
  end
end
return stored
