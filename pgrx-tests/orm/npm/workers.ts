// Four at once on one aggregate: every append must arrive, by way of the retry loop.
import { change, inOrg, history, pool } from './drizzle/owls.js'

const org = process.env.ORG_ID!
await Promise.all(
  [1, 2, 3, 4].map(async (worker) => {
    for (let turn = 1; turn <= 10; turn++) {
      await change(org, 'counter', 'c', (events) => ({
        eventType: 'counted', payload: { worker, turn, before: events.length },
      }))
    }
  }),
)
const events = await inOrg(org, (tx) => history(tx, 'counter', 'c'))
console.log(`counted: ${events.length}, in order: ${events.every((event, i) => event.payload.before === i)}`)
await pool.end()
