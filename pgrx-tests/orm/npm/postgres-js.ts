// Four at once through the other driver.
import { sql } from 'drizzle-orm'
import { db } from './drizzle/postgres-js.js'

const org = process.env.ORG_ID!
await Promise.all(
  [1, 2, 3, 4].map(async (worker) => {
    for (let turn = 1; turn <= 10; turn++) {
      await db.transaction(async (tx) => {
        await tx.execute(sql`select set_config('nightowls.org_id', ${org}, true)`)
        await tx.execute(sql`
          select * from nightowls.append_event(
            aggregate_type => 'other', aggregate_id => ${String(worker)}, event_type => 'counted',
            payload => ${JSON.stringify({ turn })})`)
      })
    }
  }),
)
const [{ number, kind }] = await db.execute<{ number: number; kind: string }>(sql`
  select count(*)::int as number, min(jsonb_typeof(payload)) as kind
    from nightowls.read_events(org => ${org}, filter => '{"aggregate_types": ["other"]}')`)
console.log(`counted: ${number} ${kind}`)
await db.$client.end()
