// Makes Mastra's tables, as the package does.
import { PostgresStore } from '@mastra/pg';

const store = new PostgresStore({ id: 'init', connectionString: process.env.DATABASE_URL, schemaName: process.argv[2] ?? 'nightowls', max: 2 });
await store.init();
await store.close();
