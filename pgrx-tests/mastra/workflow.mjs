// A workflow that waits for a person. `start` runs it until it waits, and ends; `resume`, another process, goes on with it.
import { Mastra } from '@mastra/core';
import { createStep, createWorkflow } from '@mastra/core/workflows';
import { PostgresStore } from '@mastra/pg';
import { z } from 'zod';

const [mode, runId] = process.argv.slice(2);
const storage = new PostgresStore({
  id: 'flow', connectionString: process.env.DATABASE_URL, schemaName: 'nightowls', disableInit: true, max: 3,
});
const double = createStep({
  id: 'double',
  inputSchema: z.object({ n: z.number() }),
  outputSchema: z.object({ n: z.number() }),
  execute: async ({ inputData }) => ({ n: inputData.n * 2 }),
});
const ask = createStep({
  id: 'ask',
  inputSchema: z.object({ n: z.number() }),
  outputSchema: z.object({ answer: z.number() }),
  suspendSchema: z.object({ question: z.string() }),
  resumeSchema: z.object({ by: z.number() }),
  execute: async ({ inputData, resumeData, suspend }) =>
    resumeData ? { answer: inputData.n + resumeData.by } : await suspend({ question: `how much more than ${inputData.n}?` }),
});
const flow = createWorkflow({
  id: 'ask-flow', inputSchema: z.object({ n: z.number() }), outputSchema: z.object({ answer: z.number() }),
}).then(double).then(ask).commit();
const mastra = new Mastra({ storage, workflows: { flow }, logger: false });

const run = await mastra.getWorkflow('flow').createRun({ runId });
const result = mode === 'start' ? await run.start({ inputData: { n: 20 } }) : await run.resume({ step: 'ask', resumeData: { by: 2 } });
console.log(JSON.stringify([result.status, result.result ?? result.steps?.ask?.suspendPayload?.question ?? result.error ?? null]));
await storage.close();
process.exit(0);
