// What a program does with Mastra's store, domain by domain. It prints each answer as a line, with times and random ids taken out, so that
// two stores can be compared. Arguments: the schema; what all ids begin with; init, to make the tables first.
import { PostgresStore } from '@mastra/pg';

const [schemaName = 'nightowls', p = '', init] = process.argv.slice(2);
const store = new PostgresStore({
  id: 'tour', connectionString: process.env.DATABASE_URL, schemaName, disableInit: init !== 'init', max: 4,
});
const time = /"\d{4}-\d\d-\d\dT[\d:.]+Z?"/g;
const uuid = /[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}/g;
const known = new Map();
const name = (id) => known.get(id) ?? (known.set(id, `<id ${known.size + 1}>`), known.get(id));

async function show(what, answer) {
  let value;
  try {
    value = await answer;
  } catch (error) {
    console.log(`${what}: refused: ${error.id ?? error}`);
    return;
  }
  if (value instanceof Map) value = [...value];
  if (value instanceof Set) value = [...value].sort();
  const text = JSON.stringify(value ?? null, (key, v) => (v instanceof Set ? [...v].sort() : v));
  console.log(`${what}: ${text.replace(time, '"<time>"').replace(uuid, name).replaceAll(p || '\0', '')}`);
  return value;
}
const refused = (answer) => answer.then(() => 'not refused', (error) => `refused: ${error.id ?? error.constructor.name}`);

await store.init();
const get = (domain) => store.getStore(domain);
const at = (n) => new Date(Date.UTC(2026, 0, 1, 0, 0, n));

// Memory: threads, messages, resources.
const memory = await get('memory');
for (const n of [1, 2, 3]) {
  await show('saveThread', memory.saveThread({
    thread: { id: `${p}t${n}`, resourceId: `${p}res`, title: `Thread ${n}`, metadata: { n, odd: "it's \u00e9" }, createdAt: at(n), updatedAt: at(n) },
  }));
}
await show('saveThread again', memory.saveThread({
  thread: { id: `${p}t1`, resourceId: `${p}res`, title: 'Renamed', metadata: {}, createdAt: at(1), updatedAt: at(9) },
}));
await show('getThreadById', memory.getThreadById({ threadId: `${p}t1` }));
await show('getThreadById, none', memory.getThreadById({ threadId: `${p}none` }));
await show('updateThread', memory.updateThread({ id: `${p}t2`, title: 'Second', metadata: { more: true } }));
await show('listThreads', memory.listThreads({
  filter: { resourceId: `${p}res` }, page: 0, perPage: 2, orderBy: { field: 'createdAt', direction: 'DESC' },
}));
const message = (n, text) => ({
  id: `${p}m${n}`, threadId: `${p}t1`, resourceId: `${p}res`, role: n % 2 ? 'user' : 'assistant', type: 'v2', createdAt: at(n),
  content: { format: 2, parts: [{ type: 'text', text }] },
});
await show('saveMessages', memory.saveMessages({ messages: Array.from({ length: 25 }, (_, n) => message(n + 1, `message ${n + 1}`)) }));
await show('saveMessages again', memory.saveMessages({ messages: [message(3, 'said anew')] }));
await show('listMessages', memory.listMessages({ threadId: `${p}t1`, page: 1, perPage: 5 }));
await show('listMessagesById', memory.listMessagesById({ messageIds: [`${p}m3`, `${p}m4`] }));
await show('listMessages around one', memory.listMessages({
  threadId: `${p}t1`, perPage: 1, include: [{ id: `${p}m10`, withPreviousMessages: 1, withNextMessages: 1 }],
}));
await show('updateMessages', memory.updateMessages({ messages: [{ id: `${p}m4`, content: { metadata: { seen: true } } }] }));
await show('deleteMessages', memory.deleteMessages([`${p}m25`]));
await show('saveMessages to no thread', refused(memory.saveMessages({ messages: [{ ...message(1, 'x'), threadId: `${p}none` }] })));
await show('saveResource', memory.saveResource({
  resource: { id: `${p}res`, workingMemory: '# Notes', metadata: { plan: 'pro' }, createdAt: at(1), updatedAt: at(1) },
}));
await show('updateResource', memory.updateResource({ resourceId: `${p}res`, workingMemory: '# More', metadata: { seats: 3 } }));
await show('updateResource, a new one', memory.updateResource({ resourceId: `${p}new`, workingMemory: 'first' }));
await show('getResourceById', memory.getResourceById({ resourceId: `${p}res` }));
await show('cloneThread', memory.cloneThread({ sourceThreadId: `${p}t1`, newThreadId: `${p}clone`, options: { messageLimit: 2 } })
  .then((r) => [r.thread.id, r.thread.metadata, r.clonedMessages.map((m) => m.content.parts[0].text).sort()]));
await show('deleteThread', memory.deleteThread({ threadId: `${p}t3` }));
await show('listThreads after', memory.listThreads({ filter: { resourceId: `${p}res` } }));
const observed = await show('initializeObservationalMemory', memory.initializeObservationalMemory({
  threadId: `${p}t1`, resourceId: `${p}res`, scope: 'thread', config: { model: 'small' },
}));
await show('updateActiveObservations', memory.updateActiveObservations({
  id: observed.id, observations: 'likes owls', tokenCount: 3, lastObservedAt: at(5), observedMessageIds: [`${p}m1`],
}));
await show('getObservationalMemory', memory.getObservationalMemory(`${p}t1`, `${p}res`));

// Workflows.
const workflows = await get('workflows');
const snapshot = (status) => ({
  runId: `${p}run`, status, value: {}, context: { input: { n: 1 } }, activePaths: [], suspendedPaths: {}, resumeLabels: {}, serializedStepGraph: [],
  waitingPaths: {}, timestamp: 1,
});
await show('persistWorkflowSnapshot', workflows.persistWorkflowSnapshot({ workflowName: `${p}flow`, runId: `${p}run`, resourceId: `${p}res`, snapshot: snapshot('running') }));
await show('persistWorkflowSnapshot again', workflows.persistWorkflowSnapshot({ workflowName: `${p}flow`, runId: `${p}run`, snapshot: snapshot('suspended') }));
await Promise.all(Array.from({ length: 20 }, (_, n) => workflows.updateWorkflowResults({
  workflowName: `${p}flow`, runId: `${p}run`, stepId: `step${n}`, result: { status: 'success', output: n, payload: {}, startedAt: 1, endedAt: 2 }, requestContext: {},
})));
const saved = await workflows.loadWorkflowSnapshot({ workflowName: `${p}flow`, runId: `${p}run` });
await show('20 results at once', Object.keys(saved.context).sort());
await show('updateWorkflowState', workflows.updateWorkflowState({ workflowName: `${p}flow`, runId: `${p}run`, opts: { status: 'success', result: { ok: true } } }).then((s) => s?.status));
await show('listWorkflowRuns', workflows.listWorkflowRuns({ workflowName: `${p}flow`, status: 'success' }).then((r) => [r.total, r.runs.map((x) => [x.runId, x.resourceId])]));
await show('getWorkflowRunById', workflows.getWorkflowRunById({ runId: `${p}run`, workflowName: `${p}flow` }).then((r) => r?.workflowName));
await show('listWorkflowRuns of a thread', workflows.listWorkflowRuns({ threadId: `${p}t1` }).then((r) => r.total));

// Traces.
const observability = await get('observability');
const span = (n, parentSpanId) => ({
  traceId: `${p}trace`, spanId: `${p}span${n}`, parentSpanId, name: `span ${n}`, spanType: 'agent_run', isEvent: false, startedAt: at(n),
  entityType: 'agent', entityId: `${p}owl`, entityName: 'owl', metadata: { n }, tags: ['night'], attributes: { a: 1 }, input: { q: 1 },
});
await show('createSpan', observability.createSpan({ span: span(1, null) }));
await show('batchCreateSpans', observability.batchCreateSpans({ records: [span(2, `${p}span1`), span(3, `${p}span1`)] }));
await show('updateSpan', observability.updateSpan({ traceId: `${p}trace`, spanId: `${p}span1`, updates: { endedAt: at(60), output: { done: true } } }));
await show('getTrace', observability.getTrace({ traceId: `${p}trace` }));
await show('listTraces', observability.listTraces({ filters: { entityId: `${p}owl` }, pagination: { page: 0, perPage: 10 } }));

// Scores.
const scores = await get('scores');
const score = await show('saveScore', scores.saveScore({
  scorerId: `${p}scorer`, entityId: `${p}owl`, entityType: 'AGENT', runId: `${p}run`, output: { text: 'yes' }, input: { text: 'no' }, score: 0.75, reason: 'close',
  scorer: { id: 'scorer', name: 'Scorer' }, source: 'TEST', entity: { id: 'owl' }, traceId: `${p}trace`, spanId: `${p}span1`,
}));
await show('getScoreById', scores.getScoreById({ id: score.score.id }));
for (const [how, args] of [['ScorerId', { scorerId: `${p}scorer` }], ['RunId', { runId: `${p}run` }],
  ['EntityId', { entityId: `${p}owl`, entityType: 'AGENT' }], ['Span', { traceId: `${p}trace`, spanId: `${p}span1` }]]) {
  await show(`listScoresBy${how}`, scores[`listScoresBy${how}`]({ ...args, pagination: { page: 0, perPage: 10 } }));
}

// What is stored in versions.
const versioned = {
  agents: ['agent', { name: 'Owl', model: { provider: 'x', name: 'y' }, instructions: 'hoot' }, 'agentId'],
  promptBlocks: ['promptBlock', { name: 'Block', content: 'text' }, 'blockId'],
  scorerDefinitions: ['scorerDefinition', { name: 'Def', type: 'llm-judge' }, 'scorerDefinitionId'],
  mcpClients: ['mcpClient', { name: 'Client', servers: {} }, 'mcpClientId'],
  mcpServers: ['mcpServer', { name: 'Server', version: '1.0.0' }, 'mcpServerId'],
  workspaces: ['workspace', { name: 'Space' }, 'workspaceId'],
  skills: ['skill', { name: 'Skill', description: 'd', instructions: 'i' }, 'skillId'],
};
for (const [domain, [key, content, parent]] of Object.entries(versioned)) {
  const one = await get(domain);
  const id = `${p}${key}1`;
  await show(`${domain}.create`, one.create({ [key]: { id, authorId: `${p}ann`, metadata: { m: 1 }, ...content } }));
  await show(`${domain}.createVersion`, one.createVersion({
    id: `${p}${key}1v2`, [parent]: id, versionNumber: 2, ...content, name: 'New', changedFields: ['name'], changeMessage: 'renamed',
  }));
  await show(`${domain}.createVersion again`, refused(one.createVersion({ id: `${p}${key}1v2b`, [parent]: id, versionNumber: 2, ...content })));
  await show(`${domain}.update`, one.update({ id, activeVersionId: `${p}${key}1v2`, status: 'published' }));
  await show(`${domain}.getLatestVersion`, one.getLatestVersion(id));
  await show(`${domain}.listVersions`, one.listVersions({ [parent]: id }).then((v) => [v.total, v.versions.map((x) => x.versionNumber)]));
  await show(`${domain}.list`, one.list({ authorId: `${p}ann` }));
}
const favorites = await get('favorites');
const favorite = { userId: `${p}ann`, entityType: 'agent', entityId: `${p}agent1` };
await show('favorite', favorites.favorite(favorite));
await show('favorite again', favorites.favorite(favorite));
await show('listFavoritedIds', favorites.listFavoritedIds(favorite));
await show('unfavorite', favorites.unfavorite(favorite));
await (await get('agents')).delete(`${p}agent1`);
await show('agents.getById, deleted', (await get('agents')).getById(`${p}agent1`));

// The others.
const blobs = await get('blobs');
const blob = (n) => ({ hash: `${p}hash${n}`, content: `text ${n}`, size: 6, mimeType: 'text/plain', createdAt: at(n) });
await show('blobs.put', blobs.put(blob(1)));
await show('blobs.putMany', blobs.putMany([blob(1), blob(2)]));
await show('blobs.getMany', blobs.getMany([`${p}hash1`, `${p}hash2`]));
await show('blobs.delete', blobs.delete(`${p}hash1`));

const channels = await get('channels');
const installation = { id: `${p}inst`, platform: `${p}slack`, agentId: `${p}agent1`, status: 'active', webhookId: `${p}hook`, data: { team: 't' }, createdAt: at(1), updatedAt: at(1) };
await show('saveInstallation', channels.saveInstallation(installation));
await show('saveInstallation again', channels.saveInstallation({ ...installation, status: 'pending' }));
await show('getInstallationByWebhookId', channels.getInstallationByWebhookId(`${p}hook`));
await show('saveConfig', channels.saveConfig({ platform: `${p}slack`, data: { token: 'x' }, updatedAt: at(1) }));
await show('saveConfig again', channels.saveConfig({ platform: `${p}slack`, data: { token: 'y' }, updatedAt: at(2) }));
await show('getConfig', channels.getConfig(`${p}slack`));

const datasets = await get('datasets');
await show('createDataset', datasets.createDataset({ id: `${p}set`, name: 'Set', metadata: { m: 1 }, targetIds: ['a'] }));
const item = await show('addItem', datasets.addItem({ datasetId: `${p}set`, input: { q: 1 }, groundTruth: 'yes' }));
await show('updateItem', datasets.updateItem({ id: item.id, datasetId: `${p}set`, input: { q: 2 } }));
await show('batchInsertItems', datasets.batchInsertItems({ datasetId: `${p}set`, items: [{ input: 3 }, { input: 4 }] }).then((r) => r.length));
await show('listItems', datasets.listItems({ datasetId: `${p}set`, pagination: { page: 0, perPage: 10 } }).then((r) => [r.pagination.total, r.items.length]));
await show('getItemHistory', datasets.getItemHistory(item.id));
await show('listDatasetVersions', datasets.listDatasetVersions({ datasetId: `${p}set`, pagination: { page: 0, perPage: 10 } }));
await show('listDatasets', datasets.listDatasets({ pagination: { page: 0, perPage: 10 } }));
const experiments = await get('experiments');
const experiment = await show('createExperiment', experiments.createExperiment({
  id: `${p}exp`, name: 'Exp', datasetId: `${p}set`, datasetVersion: 1, targetType: 'agent', targetId: `${p}owl`, totalItems: 2,
}));
const result = { experimentId: experiment.id, itemId: item.id, itemDatasetVersion: 1, input: 1, output: 2, groundTruth: null, error: null, startedAt: at(1), completedAt: at(2), retryCount: 0 };
await show('addExperimentResult', experiments.addExperimentResult(result));
await show('updateExperiment', experiments.updateExperiment({ id: experiment.id, status: 'completed', succeededCount: 1 }));
await show('listExperimentResults', experiments.listExperimentResults({ experimentId: experiment.id, pagination: { page: 0, perPage: 10 } }));

const tasks = await get('backgroundTasks');
await show('createTask', tasks.createTask({
  id: `${p}task`, status: 'pending', toolName: 'dig', toolCallId: `${p}call`, args: { deep: 1 }, agentId: `${p}owl`, runId: `${p}run`, createdAt: at(1),
  retryCount: 0, maxRetries: 2, timeoutMs: 1000,
}));
await show('updateTask', tasks.updateTask(`${p}task`, { status: 'running', startedAt: at(2) }));
await show('getRunningCountByAgent', tasks.getRunningCountByAgent(`${p}owl`));
await show('listTasks', tasks.listTasks({ agentId: `${p}owl` }));

const schedules = await get('schedules');
const schedule = { id: `${p}sched`, target: { type: 'workflow', workflowId: 'flow' }, cron: '* * * * *', status: 'active', nextFireAt: 1000, createdAt: 1, updatedAt: 1 };
await show('createSchedule', schedules.createSchedule(schedule));
await show('createSchedule again', refused(schedules.createSchedule(schedule)));
await show('listDueSchedules', schedules.listDueSchedules(2000));
const fires = await Promise.all(Array.from({ length: 8 }, (_, n) => schedules.updateScheduleNextFire(`${p}sched`, 1000, 3000 + n, 1000, `run${n}`)));
await show('one of eight fires', fires.filter(Boolean).length);
await show('recordTrigger', schedules.recordTrigger({ id: `${p}trig`, scheduleId: `${p}sched`, runId: 'r', scheduledFireAt: 1, actualFireAt: 2, outcome: 'published' }));
await show('listTriggers', schedules.listTriggers(`${p}sched`));

const state = await get('threadState');
await show('setState', state.setState({ threadId: `${p}t1`, type: 'tasks', value: [{ id: 'a' }] }));
await show('setState again', state.setState({ threadId: `${p}t1`, type: 'tasks', value: [{ id: 'b' }] }));
await show('getState', state.getState({ threadId: `${p}t1`, type: 'tasks' }));

const notifications = await get('notifications');
const noted = await show('createNotification', notifications.createNotification({
  threadId: `${p}t1`, source: 'git', kind: 'push', priority: 'medium', summary: 'pushed', dedupeKey: 'one',
}));
await show('createNotification again', notifications.createNotification({
  threadId: `${p}t1`, source: 'git', kind: 'push', priority: 'medium', summary: 'pushed again', dedupeKey: 'one',
}));
await show('updateNotification', notifications.updateNotification({ threadId: `${p}t1`, id: noted.id, status: 'seen' }));
await show('listNotifications', notifications.listNotifications({ threadId: `${p}t1` }));

const connections = await get('toolProviderConnections');
const connection = { authorId: `${p}ann`, providerId: 'p', connectionId: 'c', toolkit: 'mail', label: 'Mail', scope: 'per-author' };
await show('upsertConnection', connections.upsertConnection(connection));
await show('upsertConnection again', connections.upsertConnection({ ...connection, label: 'Post' }));
await show('listConnectionsByAuthor', connections.listConnectionsByAuthor({ authorId: `${p}ann` }));

const definitions = await get('workflowDefinitions');
await show('workflowDefinitions.upsert', definitions.upsert({ id: `${p}def`, inputSchema: {}, outputSchema: {}, graph: [], status: 'active', source: 'stored' }));
await show('workflowDefinitions.upsert again', definitions.upsert({ id: `${p}def`, description: 'second', inputSchema: {}, outputSchema: {}, graph: [] }));
await show('workflowDefinitions.list', definitions.list());

const knowledge = await get('knowledge');
const scope = [`org:${p}acme`];
const node = await show('createNode', knowledge.createNode({ name: 'Owl', kind: 'bird', scope }).then((n) => ({ ...n, id: 'node' + (n.id ? '' : '?'), real: undefined, key: n.id })).then(({ key, ...n }) => (knowledge.nodeId = key, n)));
await show('appendKnowledge', knowledge.appendKnowledge({
  node: knowledge.nodeId, text: 'hunts at night', scope, sourceThreadId: `${p}t1`, resolutionScope: scope, defaultScope: scope,
}).then((r) => [r.text, r.scope]));
await show('listKnowledgeAbout', knowledge.listKnowledgeAbout({ node: knowledge.nodeId, scope }).then((r) => r.records.map((x) => x.text)));
await show('search', knowledge.search({ query: 'night', scope }).then((r) => r.length));
await show('claimSemanticOutbox', knowledge.claimSemanticOutbox({ workerId: 'w', limit: 10 }).then((r) => r.map((x) => [x.documentType, x.operation])));
await show('advanceCurationCursor', knowledge.advanceCurationCursor({ sourceThreadId: `${p}t1`, agent: 'a', lastKnowledgeId: '1' }).then((r) => r?.lastKnowledgeId ?? r));
await show('listActivity', knowledge.listActivity({ scope }).then((r) => (r.events ?? r.activity ?? r).length));

await store.close();
console.log('done');
