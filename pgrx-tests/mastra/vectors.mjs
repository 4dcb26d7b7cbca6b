// What a program does with Mastra's vectors, in an index that is there already. Arguments: the index, what its ids begin with.
import { PgVector } from '@mastra/pg';

const [indexName, p = ''] = process.argv.slice(2);
const vectors = new PgVector({ id: 'v', connectionString: process.env.DATABASE_URL, schemaName: 'nightowls', disableInit: true, max: 3 });
async function show(what, answer) {
  try {
    console.log(`${what}: ${JSON.stringify((await answer) ?? null).replaceAll(p || '\0', '')}`);
  } catch (error) {
    console.log(`${what}: refused: ${error.id ?? error}`);
  }
}
const near = (hits) => hits.map((h) => [h.id, Math.round(h.score * 1000) / 1000, h.metadata]);

await show('listIndexes', vectors.listIndexes());
await show('createIndex', vectors.createIndex({ indexName, dimension: 3 }));
await show('describeIndex', vectors.describeIndex({ indexName }));
await show('upsert', vectors.upsert({
  indexName, ids: ['x', 'y', 'z'].map((id) => p + id), vectors: [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
  metadata: [{ kind: 'axis', n: 1 }, { kind: 'axis', n: 2 }, { kind: 'other', thread_id: `${p}t1` }],
}));
await show('upsert again', vectors.upsert({ indexName, ids: [`${p}y`], vectors: [[0.5, 0.5, 0]], metadata: [{ kind: 'axis', n: 22 }] }));
await show('query', vectors.query({ indexName, queryVector: [1, 0, 0], topK: 2 }).then(near));
await show('query with a filter', vectors.query({ indexName, queryVector: [1, 0, 0], topK: 5, filter: { kind: 'axis', n: { $gt: 1 } } }).then(near));
await show('query by filter alone', vectors.query({ indexName, filter: { kind: 'other' }, includeVector: true }));
await show('updateVector', vectors.updateVector({ indexName, id: `${p}x`, update: { metadata: { kind: 'moved' } } }));
await show('upsert in a namespace', vectors.upsert({ indexName, namespace: 'two', ids: [`${p}x`], vectors: [[1, 1, 1]] }));
await show('query in it', vectors.query({ indexName, namespace: 'two', queryVector: [1, 1, 1], topK: 5 }).then(near));
await show('deleteVector', vectors.deleteVector({ indexName, id: `${p}x` }));
await show('deleteVectors', vectors.deleteVectors({ indexName, filter: { kind: 'axis' } }));
await show('describeIndex after', vectors.describeIndex({ indexName }));
await show('upsert of other dimensions', vectors.upsert({ indexName, ids: ['w'], vectors: [[1, 2]] }));
await vectors.disconnect();
