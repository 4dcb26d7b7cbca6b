// examples/storage-adapter.ts at work: two processes' worth of clients, on a pool that is smaller than they are many.
import assert from 'node:assert/strict'
import { setTimeout as sleep } from 'node:timers/promises'
import pg from 'pg'
import {
  codeOf, createPostgresFloor, createStorage, getAgent, listAgentVersions, publishAgentVersion, rollbackAgentVersion, subscribeInvalidations,
} from './storage-adapter.js'

const org = process.env.ORG_ID!
const pool = new pg.Pool({ connectionString: process.env.DATABASE_URL, max: 8 })
const { events, runs, messages, scratchpad } = createStorage(pool, { org })
const code = (promise: Promise<unknown>) => promise.then(() => 'done', codeOf)
async function until(what: string, condition: () => boolean | Promise<boolean>) {
  const deadline = Date.now() + 20_000
  while (!(await condition())) {
    assert.ok(Date.now() < deadline, `waited in vain: ${what}`)
    await sleep(5)
  }
}

// Agents, and a cache that hears of changes.
const ann = { type: 'user', id: 'ann' }
assert.equal(await publishAgentVersion(pool, 'old', { instructions: 'nobody asks' }, { org }), 1)
const heard: string[] = []
const errors: unknown[] = []
const stop = await subscribeInvalidations(pool, (slug) => heard.push(slug), { org, everyMs: 5, onError: (error) => errors.push(error) })
assert.equal(await publishAgentVersion(pool, 'sage', { instructions: 'one', modelId: 'small' }, { org, actor: ann }), 1)
await until('sage is heard of', () => heard.length === 1)
// An agent that is published in a transaction which commits late, while the log goes on.
const late = await pool.connect()
await late.query('begin')
await late.query(`select nightowls.publish_agent_version('late', '{}', org => $1)`, [org])
for (let n = 0; n < 20; n++) await events.append('noise', 'n', [{ event_type: 'made' }])
assert.equal(await publishAgentVersion(pool, 'sage', { instructions: 'two' }, { org, version: 2 }), 2)
const second = await subscribeInvalidations(pool, (slug) => heard.push(`second ${slug}`), { org, everyMs: 5, onError: (error) => errors.push(error) })
await late.query('commit')
late.release()
await until('late is heard of by both', () => heard.includes('late') && heard.includes('second late'))
await until('the second sage is heard of', () => heard.filter((slug) => slug === 'sage').length === 2)
assert.deepEqual(await rollbackAgentVersion(pool, 'sage', 1, { org, actor: ann }), { version: 3, restored_from: 1 })
await until('the rollback is heard of', () => heard.filter((slug) => slug === 'sage').length === 3)
await stop()
await second()
assert.deepEqual(heard.filter((slug) => slug === 'old'), [])
assert.deepEqual(errors, [])
const versions = await listAgentVersions(pool, 'sage', { org })
assert.deepEqual(versions.map((row) => [row.version, row.is_head, row.content.instructions]), [[1, false, 'one'], [2, false, 'two'], [3, true, 'one']])
assert.deepEqual(versions[0].actor, ann)
assert.equal((await getAgent(pool, 'sage', { org })).content.model_id, 'small')
assert.deepEqual(await listAgentVersions(pool, 'nobody', { org }), [])
assert.equal(await code(publishAgentVersion(pool, 'sage', {}, { org, actor: { type: 'agent', id: 'sage' } })), 'NW004')
assert.equal(await code(publishAgentVersion(pool, 'sage', {}, { org, version: 3 })), 'NW001')
assert.equal(await code(rollbackAgentVersion(pool, 'sage', 9, { org })), 'NW007')

// Floors: never two at a time, and a late word is refused.
const floor = createPostgresFloor(pool, { org, maxHoldMs: 10_000, pollMs: 50 })
let inside = 0
const served: string[] = []
await Promise.all(['a', 'b', 'c', 'd'].map((name) => floor.withFloor('room', name, async (held) => {
  assert.equal(++inside, 1)
  served.push(name)
  await events.append('room', 'room', [{ event_type: 'said', payload: { by: name } }], held)
  inside--
})))
assert.deepEqual([...served].sort(), ['a', 'b', 'c', 'd'])
assert.deepEqual((await events.of('room', 'room')).map((event) => event.payload.by), served)
const first = await floor.acquire('room', 'e', { requestId: 'r1' })
assert.deepEqual(await floor.acquire('room', 'e', { requestId: 'r1' }), first)
const impatient = new AbortController()
const waiting = floor.acquire('room', 'f', { signal: impatient.signal })
await until('f waits', async () => (await pool.query(`select waiting from nightowls.floor_status where container = 'room' and org_id = $1`, [org])).rows[0].waiting === '1')
impatient.abort(new Error('enough'))
await assert.rejects(waiting, /enough/)
assert.equal(await floor.heartbeat(first), true)
assert.equal(await floor.release(first), true)
assert.equal(await floor.release(first), false)
assert.equal(await code(events.append('room', 'room', [{ event_type: 'said' }], first)), 'NW003')
const quick = createPostgresFloor(pool, { org, maxHoldMs: 100 })
await quick.withFloor('other', 'g', async (held) => {
  await pool.query('select nightowls.release_floor($1, $2, $3, org => $4)', ['other', 'g', held.fence, org])
  await until('the holder learns that the floor is lost', () => held.signal.aborted)
})

// Events.
assert.deepEqual((await events.append('order', '1', [{ event_type: 'placed', payload: { total: '19.90' } }, { event_type: 'paid' }], { expectedVersion: 0 })).map((e) => e.version), [1, 2])
assert.equal(await code(events.append('order', '1', [{ event_type: 'sent' }], { expectedVersion: 1 })), 'NW001')
const seen: number[] = []
for (let after = 0, page; (page = await events.after(after, 7)).length > 0; after = page.at(-1)!.position) seen.push(...page.map((event) => event.position))
assert.equal(new Set(seen).size, seen.length)
assert.deepEqual((await events.after(0, 10, { event_types: ['paid'] })).map((event) => event.aggregate_id), ['1'])

// Runs, suspended and resumed; messages; scratchpads.
assert.equal(await messages.createThread({ id: 't', title: 'A refund' }), 't')
assert.equal(await runs.start({ id: 'r', threadId: 't', agent: 'sage', input: 'a text is JSON too', runner: 'one' }), 'r')
await runs.setStatus('r', 'running')
await runs.suspend('r', { step: 3 }, { metadata: { waits_for: 'ann' } })
assert.equal(await code(runs.suspend('r', { step: 4 })), 'NW005')
assert.deepEqual(await runs.resume('r', 'two'), { step: 3 })
const told = runs.events('r', (await runs.events('r')).at(-1)!.position, { waitMs: 20_000 })
await runs.setStatus('r', 'completed', { output: 'paid' })
assert.deepEqual((await told).map((event) => event.event_type), ['run_completed'])
assert.equal(await code(runs.setStatus('r', 'running')), 'NW005')
assert.equal(await messages.append('t', { text: 'hello' }, { author: ann, id: 'm1' }), 1)
assert.equal(await messages.append('t', { text: 'hello' }, { author: ann, id: 'm1' }), 1)
assert.equal(await messages.append('t', 'yes', { role: 'assistant', author: { type: 'agent', id: 'sage' }, runId: 'r' }), 2)
assert.deepEqual((await messages.list('t', { after: 1 })).map((message) => message.content), ['yes'])
assert.equal(await scratchpad.put('run:r', 'plan', ['ask', 'pay'], 0), 1)
assert.equal(await code(scratchpad.put('run:r', 'plan', null, 0)), 'NW001')
assert.equal(await scratchpad.put('run:r', 'plan', null, 1), 2)
assert.deepEqual(await scratchpad.get('run:r', 'plan').then((entry) => [entry!.value, entry!.version]), [null, 2])
assert.equal((await scratchpad.list('run:r')).length, 1)
assert.equal(await scratchpad.delete('run:r', 'plan', 2), true)
assert.equal(await scratchpad.get('run:r', 'plan'), undefined)

// Another org's storage sees none of it.
const elsewhere = createStorage(pool, { org: '00000000-0000-4000-8000-000000000002' })
assert.deepEqual(await elsewhere.events.after(0), [])
assert.deepEqual(await elsewhere.messages.list('t'), [])
assert.equal(await elsewhere.scratchpad.put('run:r', 'plan', 1, 0), 1)
console.log('stored')
await pool.end()
