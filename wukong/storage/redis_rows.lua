-- The rows of one job on Redis, and what both scripts do with them: `rows.py` and the inner part of
-- `state.py` and `values.py` in Lua. `redis_state.lua`, `redis_oversight.lua` and
-- `redis_extension.lua` are each sent with this text before their own; a call of a script is one
-- atomic operation.
--
-- Keys, all in the job's hash slot; PREFIX is "wukong:" unless configured:
--
--   PREFIX{JOB}:j   string   the job's row
--   PREFIX{JOB}:t   hash     token -> row
--   PREFIX{JOB}:a   hash     strand -> part of a piece; opaque
--   PREFIX{JOB}:w   hash     strand -> waiting row
--   PREFIX{JOB}:e   hash     export -> row: counters, and the blobs of its entries
--   PREFIX{JOB}:v   hash     export -> its entries; opaque, one after the other
--   PREFIX{JOB}:r   hash     spent token -> receipt
--   PREFIX{JOB}:p   hash     strand -> entry of its program, "manifest", "error"; opaque
--   PREFIX{JOB}:l   hash     strand -> live pieces of it but one; of an open job
--   PREFIX{JOB}:n   hash     name -> note; of an open job
--   PREFIX{JOB}:x   list     packed traces, in the order of the commits; opaque
--   PREFIX{JOB}:g   zset     blobs that are garbage, in the order in which they became it
--   PREFIX{JOB}:d   set      strands of an earlier generation that are not to run again
--   PREFIX{JOB}:s   zset     running tokens, by their last heartbeat
--   PREFIX{JOB}:q   zset     queued tokens, by the time when they are to be invoked again
--
-- Beside them `redis.py` and `redis_blobs.py` keep PREFIXjobs, PREFIX{JOB}:b and PREFIXb:BLOB, and
-- watchers listen to the channels PREFIX{JOB}:end and PREFIX{JOB}:all, and pools to PREFIXpools.
--
-- Every key holds the member "" as long as the job may use it, so that no key vanishes and loses
-- its time to live. Rows are MessagePack maps. What is opaque is not looked into here, but for entries
-- and parts in some operations of open jobs. Absent values are false: a nil would end a table.

local J, T, A, W, E, V, R, P, L, N, X, G, D, S, Q = unpack(KEYS)
local call, pack, load = redis.call, cmsgpack.pack, cmsgpack.unpack
local request = load(ARGV[1])

local RUNNING, DONE, FAILED, CANCELLED = 1, 2, 3, 4
local SPENT, HELD, OVER, UNKNOWN_JOB, GONE = 1, 2, 3, 4, 5
local GRANTED, REFUSED, APPLIED = 1, 2, 3
local BACKOFF_S, BACKOFF_MAX_S, GARBAGE_MAX, REINVOKE_MAX = 2, 60, 64, 64
local DUE_MAX, AT_ONCE = 1000, 1000 -- unpack() fails near 8,000

local now = request.now
if not now then
  local time = call('TIME')
  now = tonumber(time[1]) + tonumber(time[2]) / 1e6
end

-- ------------------------------------------------------------------ rows

local function get(key, id)
  local packed = call('HGET', key, id)
  return packed and load(packed)
end

local function put(key, id, row)
  call('HSET', key, id, pack(row))
end

local function get_job()
  local packed = call('GET', J)
  return packed and load(packed)
end

-- Renews the lease of all rows, now and then.
local function put_job(job)
  if now >= job.renew_at then
    job.renew_at = now + job.lease_s / 4
    for _, key in ipairs(KEYS) do
      call('PEXPIRE', key, math.floor(job.lease_s * 1000))
    end
    job.is_renewed = true
  end
  local is_renewed = job.is_renewed
  job.is_renewed = nil
  call('SET', J, pack(job), 'PX', math.floor(job.lease_s * 1000))
  return is_renewed and 1 or 0
end

-- Makes the keys that clear_work() has removed, with a time to live.
local function place_work(job)
  for _, key in ipairs({T, A, W, R}) do
    call('HSET', key, '', '')
  end
  for _, key in ipairs({S, Q}) do
    call('ZADD', key, '+inf', '')
  end
  for _, key in ipairs({T, A, W, R, S, Q}) do
    call('PEXPIRE', key, math.floor(job.lease_s * 1000))
  end
end

local function clear_work()
  call('UNLINK', T, A, W, R, S, Q)
end

local function announce(job)
  local channel = string.sub(J, 1, -2)
  call('PUBLISH', channel .. 'all', job.version)
  if job.status ~= RUNNING or #job.lost > 0 or job.news_version == job.version then
    call('PUBLISH', channel .. 'end', job.version)
  end
end

-- The ids of a hash, ascending.
local function ids_of(key)
  local ids = {}
  for _, id in ipairs(call('HKEYS', key)) do
    if id ~= '' then
      ids[#ids + 1] = id
    end
  end
  table.sort(ids)
  return ids
end

-- ------------------------------------------------------------------ tokens

local function backoff_s(n_invokes)
  return math.min(BACKOFF_S * 2 ^ math.min(n_invokes, 16), BACKOFF_MAX_S)
end

-- Writes a token that is to be queued, or stays so.
local function put_queued(token, row)
  put(T, token, row)
  call('ZREM', S, token)
  call('ZADD', Q, row.stamped_at + backoff_s(row.n_invokes), token)
end

local function put_running(token, row, was_queued)
  put(T, token, row)
  if was_queued then
    call('ZREM', Q, token)
  end
  call('ZADD', S, row.stamped_at, token)
end

-- Replies name tokens with their priorities, one after the other.
local function add_invocation(invoke, token, row)
  invoke[#invoke + 1] = token
  invoke[#invoke + 1] = row.priority
end

local function new_token(strand, waiting, minted_by)
  return {
    strand = strand,
    base = waiting.base,
    is_piece = waiting.is_piece,
    inputs = waiting.inputs,
    priority = waiting.priority,
    minted_by = minted_by,
    n_deaths = waiting.n_deaths,
    stamped_at = now,
    running = false,
    attempt = '',
    holder = '',
    n_starts = 0,
    n_invokes = 1,
    cause = '',
  }
end

local function count_death(job, row)
  row.running = false
  row.n_deaths = row.n_deaths + 1
  if row.cause == '' then
    row.cause = string.format('no heartbeat for %g s', job.silence_s)
  end
  job.n_deaths = job.n_deaths + 1
end

-- Finds silent tokens, the longest silent first, and sets when to look again.
local function sweep_tokens(job, limit)
  job.sweep_at = now + job.silence_s / 2
  local found = {}
  local function look(key, before, n)
    for _, token in ipairs(call('ZRANGEBYSCORE', key, '-inf', before, 'LIMIT', 0, n)) do
      local row = get(T, token)
      found[#found + 1] = {row.stamped_at, token, row}
    end
  end
  look(S, now - job.silence_s, limit)
  look(Q, now, DUE_MAX)
  table.sort(found, function(a, b)
    return a[1] < b[1] or (a[1] == b[1] and a[2] < b[2])
  end)
  local invoke = {}
  for i = 1, math.min(limit, #found) do
    local token, row = found[i][2], found[i][3]
    if row.running then
      count_death(job, row)
    else
      row.n_invokes = row.n_invokes + 1
      row.stamped_at = now
    end
    put_queued(token, row)
    add_invocation(invoke, token, row)
  end
  return invoke
end

local function static_strand(strand, n_missing, inputs, priority)
  return {
    base = strand,
    is_piece = false,
    n_missing = n_missing,
    inputs = inputs,
    n_deaths = 0,
    priority = priority,
  }
end

-- Tokens of strands that no commit has minted carry the job and its generation.
local function entry_token(job, strand)
  return request.name .. '.' .. job.generation .. '.' .. strand
end

local function mint_entry(job, strand, waiting, invoke)
  local token, row = entry_token(job, strand), new_token(strand, waiting, '')
  put_queued(token, row)
  add_invocation(invoke, token, row)
end

local function mint_entries(job, entries)
  local invoke = {}
  for _, entry in ipairs(entries) do
    mint_entry(job, entry[1], static_strand(entry[1], 0, entry[2], job.priority), invoke)
  end
  return invoke
end

-- A minted token has been seen by its executor: its receipt has one less to wait for.
local function confirm(row)
  if row.minted_by == '' then
    return
  end
  local receipt = get(R, row.minted_by)
  if receipt then
    receipt.n_unstarted = receipt.n_unstarted - 1
    if receipt.n_unstarted > 0 then
      put(R, row.minted_by, receipt)
    else
      call('HDEL', R, row.minted_by)
    end
  end
  row.minted_by = ''
end

-- ------------------------------------------------------------------ exports

local function discard(job, export, row)
  call('HDEL', E, export)
  call('HDEL', V, export)
  for _, blob in ipairs(row.blobs) do
    job.n_garbage = job.n_garbage + 1
    call('ZADD', G, job.n_garbage, blob)
  end
end

-- The tasks of entries that stand one after the other.
local function tasks_of(entries)
  local tasks = {}
  for _, entry in ipairs({load(entries)}) do
    for _, task in ipairs(entry[1]) do
      tasks[task] = true
    end
  end
  return tasks
end

local function without(tasks, recorded)
  local missing = {}
  for _, task in ipairs(tasks) do
    if not recorded[task] then
      missing[#missing + 1] = task
    end
  end
  return missing
end

-- Takes recorded values off the late edges of an export; those that miss none arrive.
local function lower_late(late, output, arrivals)
  local kept, entries, n_bytes = {}, {}, 0
  for i, entry in ipairs(output[2]) do
    entries[i] = entry[1]
    n_bytes = n_bytes + entry[4]
  end
  local recorded = tasks_of(table.concat(entries))
  for _, edge in ipairs(late) do
    local missing = without(edge[2], recorded)
    if #missing > 0 then
      kept[#kept + 1] = {edge[1], missing}
    else
      arrivals[#arrivals + 1] = {{edge[1], 0, n_bytes}, output[1]}
    end
  end
  return kept
end

-- Adds values to an export, and notes whom they feed. Returns whether the client waits for them.
local function record(job, output, arrivals)
  local export = output[1]
  local row = get(E, export)
  local entries = row and row.n_entries > 0 and call('HGET', V, export) or ''
  row = row or {
    n_left = output[3],
    n_consumers = output[4],
    requested = output[5],
    n_entries = 0,
    blobs = {},
  }
  local parts = {entries}
  for _, entry in ipairs(output[2]) do
    parts[#parts + 1] = entry[1]
    row.n_left = row.n_left - entry[2]
    row.n_entries = row.n_entries + 1
    if entry[3] then
      row.blobs[#row.blobs + 1] = entry[3]
    end
  end
  if row.n_left < 0 then
    error('export ' .. export .. ': a value was recorded twice')
  end
  if row.late then
    row.late = lower_late(row.late, output, arrivals)
  end
  call('HSET', V, export, table.concat(parts))
  put(E, export, row)
  if row.n_left == 0 then
    if row.requested then
      job.n_requested = job.n_requested - 1
    end
    for _, feed in ipairs(output[6]) do
      if not (job.has_done and call('SISMEMBER', D, feed[1]) == 1) then
        arrivals[#arrivals + 1] = {feed, export}
      end
    end
    if row.n_consumers <= 0 then
      discard(job, export, row)
    end
  end
  return row.requested
end

-- Changes the number of consumers; a complete export without any is discarded.
local function count_consumers(job, export, n_more)
  local row = get(E, export)
  if not row then
    error('export ' .. export .. ' was discarded before its last consumer')
  end
  row.n_consumers = row.n_consumers + n_more
  if row.n_consumers <= 0 and row.n_left == 0 then
    discard(job, export, row)
  else
    put(E, export, row)
  end
end

-- The row of a strand that is fed, and whether it is a new one; nil: in an open job, it waits no
-- longer.
local function get_waiting(job, feed)
  local row = get(W, feed[1])
  if row then
    return row, false
  end
  if job.is_open then
    return nil, false
  end
  return static_strand(feed[1], feed[2], {}, job.priority), true
end

-- Counts an input of a strand as there. Returns the strand when it was the last one.
local function arrive(job, feed, export)
  local strand = feed[1]
  local row, is_new = get_waiting(job, feed)
  if not row then
    return nil
  end
  row.n_missing = row.n_missing - 1
  if not row.is_piece and not job.is_open then
    row.inputs[#row.inputs + 1] = export
  end
  if row.n_missing > 0 then
    put(W, strand, row)
    return nil
  end
  if not is_new then
    call('HDEL', W, strand)
  end
  return row
end

local function is_complete(export)
  local row = get(E, export)
  return row and row.n_left == 0
end

-- Exports and their entries, one after the other.
local function locate(exports)
  local located = {}
  for first = 1, #exports, AT_ONCE do
    local some = {unpack(exports, first, math.min(first + AT_ONCE - 1, #exports))}
    for i, entries in ipairs(call('HMGET', V, unpack(some))) do
      if not entries and call('HEXISTS', E, some[i]) == 0 then
        error('export ' .. some[i] .. ' was discarded before its last consumer')
      end
      located[#located + 1] = some[i]
      located[#located + 1] = entries or ''
    end
  end
  return located
end

-- ------------------------------------------------------------------ the end

-- No token outlives the job, so nothing of it can be committed any more.
local function end_job(job, status, failure)
  job.status = status
  job.version = job.version + 1
  if failure then
    call('HSET', P, 'error', failure)
  end
  clear_work()
  put_job(job)
  announce(job)
end
