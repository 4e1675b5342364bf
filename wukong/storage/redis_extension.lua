-- The operations of the client of an open job, as `extension.py` says them; the rules stand there.
--
-- ARGV[1] is a MessagePack map: op, now (false: this server's clock), and what the operation takes.

local NOTES_MAX, OPEN_GARBAGE_MAX = 1000, 1000

local operations = {}

-- Writes the job's row; new garbage is news for its client.
local function put_open_job(job, n_garbage_before)
  if job.n_garbage > n_garbage_before then
    job.version = job.version + 1
    job.news_version = job.version
  end
  put_job(job)
  announce(job)
end

-- ------------------------------------------------------------------ extend

-- The answer to a repetition: what of the extension is still queued.
local function queued_again(job)
  local found = {}
  for _, new in ipairs(request.strands) do
    local token = entry_token(job, new[1])
    local row = get(T, token)
    if row and not row.running then
      add_invocation(found, token, row)
    end
  end
  return found
end

-- Whether everything that an extension builds on is in the store.
local function is_founded()
  local kept, own = {}, {}
  for _, new in ipairs(request.exports) do
    own[new[1]] = true
  end
  if request.restart then
    for _, survivor in ipairs(request.restart[2]) do
      if not is_complete(survivor[1]) then
        return false
      end
      kept[survivor[1]] = true
    end
  end
  for _, new in ipairs(request.strands) do
    for _, edge in ipairs(new[3]) do
      local export = edge[1]
      if not own[export] then
        if request.restart and not kept[export] then
          return false
        end
        if not request.restart and call('HEXISTS', E, export) == 0 then
          return false
        end
      end
    end
  end
  return true
end

-- Clears everything but the survivors, whose readers are counted anew.
local function restart(job)
  local generation, survivors = unpack(request.restart)
  job.generation = generation
  job.lost = {}
  job.n_requested = 0
  clear_work()
  place_work(job)
  for _, strand in ipairs(ids_of(P)) do
    if strand ~= 'manifest' then
      call('HDEL', P, strand)
      call('HDEL', L, strand)
    end
  end
  local pins = {}
  for _, survivor in ipairs(survivors) do
    pins[survivor[1]] = survivor[2]
  end
  for _, export in ipairs(ids_of(E)) do
    local row, n_pins = get(E, export), pins[export]
    if n_pins then
      row.n_consumers = n_pins
      row.requested = n_pins > 0
      put(E, export, row)
    else
      discard(job, export, row)
    end
  end
end

local function begin(job, new, invoke)
  local strand, inputs, earlier, priority = unpack(new)
  local n_missing = 0
  for _, export in ipairs(inputs) do
    if not is_complete(export) then
      n_missing = n_missing + 1
    end
  end
  for _, edge in ipairs(earlier) do
    local export, tasks = edge[1], edge[2]
    local row = get(E, export)
    row.n_consumers = row.n_consumers + 1
    if row.n_left > 0 then
      local entries = row.n_entries > 0 and call('HGET', V, export)
      local missing = entries and without(tasks, tasks_of(entries)) or tasks
      if #missing > 0 then
        n_missing = n_missing + 1
        row.late = row.late or {}
        row.late[#row.late + 1] = {strand, missing}
      end
    end
    put(E, export, row)
    inputs[#inputs + 1] = export
  end
  local waiting = static_strand(strand, n_missing, inputs, priority)
  if n_missing == 0 then
    mint_entry(job, strand, waiting, invoke)
  else
    put(W, strand, waiting)
  end
end

function operations.extend()
  local job = get_job()
  if not job then
    return {REFUSED, UNKNOWN_JOB}
  end
  if job.status ~= RUNNING or not job.is_open then
    return {REFUSED, OVER}
  end
  if request.number <= job.n_extended then
    return {APPLIED, queued_again(job)}
  end
  if request.number ~= job.n_extended + 1 or not is_founded() then
    return {REFUSED, GONE}
  end
  job.n_extended = request.number
  job.n_tasks = job.n_tasks + request.n_tasks
  job.n_strands = job.n_strands + #request.strands
  if request.restart then
    restart(job)
  end
  for _, program in ipairs(request.programs) do
    call('HSET', P, program[1], program[2])
  end
  for _, new in ipairs(request.exports) do
    local export, n_values, n_consumers, requested = unpack(new)
    put(E, export, {
      n_left = n_values,
      n_consumers = n_consumers,
      requested = requested,
      n_entries = 0,
      blobs = {},
    })
    job.n_requested = job.n_requested + (requested and 1 or 0)
  end
  for _, output in ipairs(request.sources) do
    job.n_requested = job.n_requested + (output[5] and 1 or 0)
    record(job, output, {})
  end
  local invoke = {}
  for _, new in ipairs(request.strands) do
    begin(job, new, invoke)
  end
  for _, survivor in ipairs(request.restart and request.restart[2] or {}) do
    count_consumers(job, survivor[1], 0)
  end
  put_job(job)
  return {APPLIED, invoke}
end

-- ------------------------------------------------------------------ giving up

function operations.unpin()
  local job = get_job()
  if not job then
    return 0
  end
  local n_garbage = job.n_garbage
  for _, export in ipairs(request.exports) do
    local row = get(E, export)
    if row and row.requested then
      row.requested = false
      if row.n_left > 0 then
        job.n_requested = job.n_requested - 1
      end
      put(E, export, row)
      count_consumers(job, export, -1)
    end
  end
  put_open_job(job, n_garbage)
  return 1
end

-- Reads a dropped strand's inputs no more, and notes what it, if it is a piece, was to write.
local function give_back(job, strand, row, doomed)
  for _, export in ipairs(row.inputs) do
    if call('HEXISTS', E, export) == 1 then
      count_consumers(job, export, -1)
    end
  end
  if row.is_piece then
    for _, spec in ipairs(load(call('HGET', A, strand))[3]) do
      doomed[#doomed + 1] = spec[1]
    end
    call('HDEL', A, strand)
  end
end

function operations.drop()
  local job = get_job()
  if not job then
    return 0
  end
  local n_garbage, unwritten, doomed = job.n_garbage, {}, {}
  for _, named in ipairs(request.strands) do
    unwritten[named[1]] = true
    for _, export in ipairs(named[2]) do
      doomed[#doomed + 1] = export
    end
  end
  for _, token in ipairs(ids_of(T)) do
    local row = get(T, token)
    if unwritten[row.base] then
      confirm(row)
      call('HDEL', T, token)
      call('ZREM', row.running and S or Q, token)
      give_back(job, row.strand, row, doomed)
    end
  end
  for _, strand in ipairs(ids_of(W)) do
    local row = get(W, strand)
    if unwritten[row.base] then
      call('HDEL', W, strand)
      give_back(job, strand, row, doomed)
    end
  end
  for _, export in ipairs(doomed) do
    local row = get(E, export)
    if row and not row.requested then
      discard(job, export, row)
    end
  end
  for strand in pairs(unwritten) do
    call('HDEL', P, strand)
    call('HDEL', L, strand)
  end
  put_open_job(job, n_garbage)
  return 1
end

-- ------------------------------------------------------------------ news

function operations.news()
  for _, name in ipairs(request.acknowledged) do
    call('HDEL', N, name)
  end
  for _, blob in ipairs(request.collected) do
    call('ZREM', G, blob)
  end
  local notes, names = {}, ids_of(N)
  for i = 1, math.min(NOTES_MAX, #names) do
    local note = get(N, names[i])
    notes[i] = {names[i], note.recorded, note.trace}
  end
  local garbage = call('ZRANGE', G, 0, OPEN_GARBAGE_MAX - 1)
  if garbage[#garbage] == '' then
    garbage[#garbage] = nil
  end
  return {notes, garbage}
end

function operations.located()
  local there = {}
  for _, export in ipairs(request.exports) do
    if call('HEXISTS', E, export) == 1 then
      there[#there + 1] = export
    end
  end
  return locate(there)
end

return operations[request.op]()
