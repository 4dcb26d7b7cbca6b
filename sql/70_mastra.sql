-- Mastra: the tables that @mastra/pg 1.27.1 with @mastra/core 1.71.0 makes by init() in a schema of this name, so that
-- new PostgresStore({ schemaName: 'nightowls', disableInit: true, … }) finds them. Columns, keys, indexes and names are the package's
-- (pgrx-tests/mastra.rs compares them with what init() makes); org_id and row level security are ours.
--
-- The client knows no orgs. Whose rows it reads and writes is said by its role (grant_mastra), as a pooled connection has nothing else that
-- stays. It names the keys in its upserts, so they cannot begin with org_id: a key is unique among all orgs, and one that another org has is refused.

create table nightowls._mastra_roles (
  org_id    uuid not null,
  role_name text not null,
  constraint _mastra_roles_pkey primary key (org_id, role_name)
);

create index _mastra_roles_role_name_idx on nightowls._mastra_roles (role_name);

comment on table nightowls._mastra_roles is 'The roles that Mastra''s store comes as, each for one org. Kept by grant_mastra and revoke_mastra.';
comment on column nightowls._mastra_roles.org_id is 'The tenant.';
comment on column nightowls._mastra_roles.role_name is 'The role''s name.';

alter table nightowls._mastra_roles enable row level security;
alter table nightowls._mastra_roles force row level security;

-- Definer: the table is closed.
create function nightowls._role_org(role text)
  returns uuid
  language plpgsql
  stable
  parallel safe
  security definer
  set search_path to pg_catalog, pg_temp
  set enable_seqscan to off
as $$
#variable_conflict use_column
begin
  return (select m.org_id from nightowls._mastra_roles m where m.role_name = _role_org.role);
end;
$$;

revoke all on function nightowls._role_org(text) from public;

-- The org of a client of these tables.
create function nightowls._mastra_org()
  returns uuid
  language plpgsql
  stable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org uuid := nightowls._role_org(current_user);
begin
  -- Not in one expression: who has a role of its own may not call the other.
  if v_org is null then
    v_org := nightowls.current_org();
  end if;
  return v_org;
end;
$$;

revoke all on function nightowls._mastra_org() from public;

-- The tables of Mastra's store, and those of an org's vectors; null: all orgs'.
create function nightowls._mastra_tables(org uuid default null)
  returns table (table_name name)
  language plpgsql
  stable
  parallel safe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  return query
    select c.relname
      from pg_class c
     where c.relnamespace = 'nightowls'::regnamespace and c.relkind = 'r'
       and (c.relname ~ '^mastra_' or c.relname in (
             select v.name from nightowls.vector_indexes v where _mastra_tables.org is null or v.org_id = _mastra_tables.org))
     order by c.relname;
end;
$$;

revoke all on function nightowls._mastra_tables(uuid) from public;

create table nightowls.mastra_agent_versions (
  id text not null,
  "agentId" text not null,
  "versionNumber" int not null,
  name text not null,
  description text,
  instructions text not null,
  model jsonb not null,
  tools jsonb,
  "defaultOptions" jsonb,
  workflows jsonb,
  agents jsonb,
  "integrationTools" jsonb,
  "toolProviders" jsonb,
  "inputProcessors" jsonb,
  "outputProcessors" jsonb,
  memory jsonb,
  scorers jsonb,
  "mcpClients" jsonb,
  "requestContextSchema" jsonb,
  workspace jsonb,
  skills jsonb,
  "skillsFormat" text,
  durable jsonb,
  browser jsonb,
  "changedFields" jsonb,
  "changeMessage" text,
  "createdAt" timestamp not null,
  "createdAtZ" timestamptz default now(),
  org_id uuid not null default nightowls._mastra_org(),
  constraint mastra_agent_versions_pkey primary key (id)
);

create table nightowls.mastra_agents (
  id text not null,
  status text not null,
  "activeVersionId" text,
  "authorId" text,
  visibility text,
  metadata jsonb,
  "favoriteCount" int,
  "createdAt" timestamp not null,
  "updatedAt" timestamp not null,
  "createdAtZ" timestamptz default now(),
  "updatedAtZ" timestamptz default now(),
  org_id uuid not null default nightowls._mastra_org(),
  constraint mastra_agents_pkey primary key (id)
);

create table nightowls.mastra_ai_spans (
  "traceId" text not null,
  "spanId" text not null,
  name text not null,
  "spanType" text not null,
  "isEvent" boolean not null,
  "startedAt" timestamp not null,
  "parentSpanId" text,
  "entityType" text,
  "entityId" text,
  "entityName" text,
  "parentEntityType" text,
  "parentEntityId" text,
  "parentEntityName" text,
  "rootEntityType" text,
  "rootEntityId" text,
  "rootEntityName" text,
  "userId" text,
  "organizationId" text,
  "resourceId" text,
  "runId" text,
  "sessionId" text,
  "threadId" text,
  "requestId" text,
  environment text,
  "serviceName" text,
  scope jsonb,
  "entityVersionId" text,
  "parentEntityVersionId" text,
  "rootEntityVersionId" text,
  "experimentId" text,
  source text,
  metadata jsonb,
  tags jsonb,
  attributes jsonb,
  links jsonb,
  input jsonb,
  output jsonb,
  error jsonb,
  "endedAt" timestamp,
  "requestContext" jsonb,
  "createdAt" timestamp not null,
  "updatedAt" timestamp,
  "startedAtZ" timestamptz default now(),
  "endedAtZ" timestamptz default now(),
  "createdAtZ" timestamptz default now(),
  "updatedAtZ" timestamptz default now(),
  org_id uuid not null default nightowls._mastra_org(),
  constraint nightowls_mastra_ai_spans_traceid_spanid_pk primary key ("traceId", "spanId")
);

create index nightowls_mastra_ai_spans_entitytype_entityid_idx on nightowls.mastra_ai_spans ("entityType", "entityId");
create index nightowls_mastra_ai_spans_entitytype_entityname_idx on nightowls.mastra_ai_spans ("entityType", "entityName");
create index nightowls_mastra_ai_spans_metadata_gin_idx on nightowls.mastra_ai_spans using gin (metadata);
create index nightowls_mastra_ai_spans_name_idx on nightowls.mastra_ai_spans (name);
create index nightowls_mastra_ai_spans_orgid_userid_idx on nightowls.mastra_ai_spans ("organizationId", "userId");
create index nightowls_mastra_ai_spans_parentspanid_startedat_idx on nightowls.mastra_ai_spans ("parentSpanId", "startedAt" desc);
create index nightowls_mastra_ai_spans_root_spans_idx on nightowls.mastra_ai_spans ("startedAt" desc) where ("parentSpanId" is null);
create index nightowls_mastra_ai_spans_spantype_startedat_idx on nightowls.mastra_ai_spans ("spanType", "startedAt" desc);
create index nightowls_mastra_ai_spans_tags_gin_idx on nightowls.mastra_ai_spans using gin (tags);
create index nightowls_mastra_ai_spans_traceid_startedat_idx on nightowls.mastra_ai_spans ("traceId", "startedAt" desc);

create table nightowls.mastra_background_tasks (
  id text not null,
  tool_call_id text not null,
  tool_name text not null,
  agent_id text not null,
  run_id text not null,
  thread_id text,
  resource_id text,
  status text not null,
  args jsonb not null,
  result jsonb,
  error jsonb,
  suspend_payload jsonb,
  retry_count int not null,
  max_retries int not null,
  timeout_ms int not null,
  "createdAt" timestamp not null,
  "startedAt" timestamp,
  "suspendedAt" timestamp,
  "completedAt" timestamp,
  "createdAtZ" timestamptz default now(),
  "startedAtZ" timestamptz default now(),
  "suspendedAtZ" timestamptz default now(),
  "completedAtZ" timestamptz default now(),
  org_id uuid not null default nightowls._mastra_org(),
  constraint mastra_background_tasks_pkey primary key (id)
);

create index nightowls_mastra_bg_tasks_agent_status_idx on nightowls.mastra_background_tasks (agent_id, status);
create index nightowls_mastra_bg_tasks_status_created_at_idx on nightowls.mastra_background_tasks (status, "createdAt");
create index nightowls_mastra_bg_tasks_thread_idx on nightowls.mastra_background_tasks (thread_id, "createdAt");
create index nightowls_mastra_bg_tasks_tool_call_idx on nightowls.mastra_background_tasks (tool_call_id);

create table nightowls.mastra_channel_config (
  platform text not null,
  data jsonb not null,
  "updatedAt" timestamp not null,
  "updatedAtZ" timestamptz default now(),
  org_id uuid not null default nightowls._mastra_org(),
  constraint mastra_channel_config_pkey primary key (platform)
);

create table nightowls.mastra_channel_installations (
  id text not null,
  platform text not null,
  "agentId" text not null,
  status text not null,
  "webhookId" text,
  data jsonb not null,
  "configHash" text,
  error text,
  "createdAt" timestamp not null,
  "updatedAt" timestamp not null,
  "createdAtZ" timestamptz default now(),
  "updatedAtZ" timestamptz default now(),
  org_id uuid not null default nightowls._mastra_org(),
  constraint mastra_channel_installations_pkey primary key (id)
);

create index nightowls_idx_channel_installations_platform_agent on nightowls.mastra_channel_installations (platform, "agentId");
create unique index nightowls_idx_channel_installations_webhook on nightowls.mastra_channel_installations ("webhookId");

create table nightowls.mastra_dataset_items (
  id text not null,
  "datasetId" text not null,
  "datasetVersion" int not null,
  "externalId" text,
  "organizationId" text,
  "projectId" text,
  "validTo" int,
  "isDeleted" boolean not null,
  input jsonb not null,
  "groundTruth" jsonb,
  "requestContext" jsonb,
  metadata jsonb,
  source jsonb,
  "expectedTrajectory" jsonb,
  "toolMocks" jsonb,
  "unmockedToolPolicy" text,
  "scorerIds" jsonb,
  "createdAt" timestamp not null,
  "updatedAt" timestamp not null,
  "createdAtZ" timestamptz default now(),
  "updatedAtZ" timestamptz default now(),
  org_id uuid not null default nightowls._mastra_org(),
  constraint mastra_dataset_items_pkey primary key (id, "datasetVersion")
);

create index idx_dataset_items_dataset_validto on nightowls.mastra_dataset_items ("datasetId", "validTo");
create index idx_dataset_items_dataset_validto_deleted on nightowls.mastra_dataset_items ("datasetId", "validTo", "isDeleted");
create index idx_dataset_items_dataset_version on nightowls.mastra_dataset_items ("datasetId", "datasetVersion");
create index idx_dataset_items_external_id_history on nightowls.mastra_dataset_items ("datasetId", "externalId", "datasetVersion");
create index idx_dataset_items_org_project on nightowls.mastra_dataset_items ("organizationId", "projectId");

create table nightowls.mastra_dataset_versions (
  id text not null,
  "datasetId" text not null,
  version int not null,
  "createdAt" timestamp not null,
  "createdAtZ" timestamptz default now(),
  org_id uuid not null default nightowls._mastra_org(),
  constraint mastra_dataset_versions_pkey primary key (id)
);

create index idx_dataset_versions_dataset_version on nightowls.mastra_dataset_versions ("datasetId", version);
create unique index idx_dataset_versions_dataset_version_unique on nightowls.mastra_dataset_versions ("datasetId", version);

create table nightowls.mastra_datasets (
  id text not null,
  name text not null,
  description text,
  metadata jsonb,
  "inputSchema" jsonb,
  "groundTruthSchema" jsonb,
  "requestContextSchema" jsonb,
  tags jsonb,
  "targetType" text,
  "targetIds" jsonb,
  "scorerIds" jsonb,
  "organizationId" text,
  "projectId" text,
  "candidateKey" text,
  "candidateId" text,
  version int not null,
  "createdAt" timestamp not null,
  "updatedAt" timestamp not null,
  "createdAtZ" timestamptz default now(),
  "updatedAtZ" timestamptz default now(),
  org_id uuid not null default nightowls._mastra_org(),
  constraint mastra_datasets_pkey primary key (id)
);

create index idx_datasets_candidate on nightowls.mastra_datasets ("candidateKey", "candidateId");
create index idx_datasets_org_project on nightowls.mastra_datasets ("organizationId", "projectId");

create table nightowls.mastra_experiment_results (
  id text not null,
  "experimentId" text not null,
  "itemId" text not null,
  "itemDatasetVersion" int,
  input jsonb not null,
  output jsonb,
  "groundTruth" jsonb,
  metadata jsonb,
  error jsonb,
  "startedAt" timestamp not null,
  "completedAt" timestamp not null,
  "retryCount" int not null,
  attempt int,
  "traceId" text,
  status text,
  tags jsonb,
  comment text,
  "toolMockReport" jsonb,
  "organizationId" text,
  "projectId" text,
  "createdAt" timestamp not null,
  "startedAtZ" timestamptz default now(),
  "completedAtZ" timestamptz default now(),
  "createdAtZ" timestamptz default now(),
  org_id uuid not null default nightowls._mastra_org(),
  constraint mastra_experiment_results_pkey primary key (id)
);

create unique index idx_experiment_results_exp_item_attempt on nightowls.mastra_experiment_results ("experimentId", "itemId", attempt);
create index idx_experiment_results_experimentid on nightowls.mastra_experiment_results ("experimentId");
create index idx_experiment_results_org_project on nightowls.mastra_experiment_results ("organizationId", "projectId");
create index idx_experiment_results_tags_gin on nightowls.mastra_experiment_results using gin (tags);

create table nightowls.mastra_experiments (
  id text not null,
  name text,
  description text,
  metadata jsonb,
  provenance jsonb,
  "runnerAttestation" jsonb,
  "experimentSetId" text,
  "comparisonId" text,
  "variantId" text,
  "trialIndex" int,
  "datasetId" text,
  "datasetVersion" int,
  "targetType" text,
  "targetId" text,
  "scorerIds" jsonb,
  status text not null,
  "totalItems" int not null,
  "succeededCount" int not null,
  "failedCount" int not null,
  "skippedCount" int not null,
  "startedAt" timestamp,
  "completedAt" timestamp,
  "agentVersion" text,
  "organizationId" text,
  "projectId" text,
  "createdAt" timestamp not null,
  "updatedAt" timestamp not null,
  "startedAtZ" timestamptz default now(),
  "completedAtZ" timestamptz default now(),
  "createdAtZ" timestamptz default now(),
  "updatedAtZ" timestamptz default now(),
  org_id uuid not null default nightowls._mastra_org(),
  constraint mastra_experiments_pkey primary key (id)
);

create index idx_experiments_datasetid on nightowls.mastra_experiments ("datasetId");
create index idx_experiments_grouping on nightowls.mastra_experiments ("experimentSetId", "comparisonId", "variantId", "trialIndex");
create index idx_experiments_org_project on nightowls.mastra_experiments ("organizationId", "projectId");

create table nightowls.mastra_favorites (
  "userId" text not null,
  "entityType" text not null,
  "entityId" text not null,
  "createdAt" timestamp not null,
  "createdAtZ" timestamptz default now(),
  org_id uuid not null default nightowls._mastra_org(),
  constraint mastra_favorites_pkey primary key ("userId", "entityType", "entityId")
);

create index idx_favorites_entity on nightowls.mastra_favorites ("entityType", "entityId");

create table nightowls.mastra_knowledge_activity (
  id text not null,
  action text not null,
  "recordType" text not null,
  "recordId" text not null,
  scope jsonb not null,
  "scopeKey" text not null,
  "sourceThreadId" text,
  "createdAt" timestamp not null,
  "createdAtZ" timestamptz default now(),
  org_id uuid not null default nightowls._mastra_org(),
  constraint mastra_knowledge_activity_pkey primary key (id)
);

create index idx_knowledge_activity_latest on nightowls.mastra_knowledge_activity (id desc);

create table nightowls.mastra_knowledge_cursors (
  "sourceThreadId" text not null,
  agent text not null,
  "lastKnowledgeId" text not null,
  "updatedAt" timestamp not null,
  "updatedAtZ" timestamptz default now(),
  org_id uuid not null default nightowls._mastra_org(),
  constraint mastra_knowledge_cursors_pkey primary key ("sourceThreadId", agent)
);

create table nightowls.mastra_knowledge_mentions (
  "sourceType" text not null,
  "sourceId" text not null,
  "recordId" text not null,
  org_id uuid not null default nightowls._mastra_org(),
  constraint mastra_knowledge_mentions_pkey primary key ("sourceType", "sourceId", "recordId")
);

create index idx_knowledge_mentions_record on nightowls.mastra_knowledge_mentions ("recordId", "sourceType", "sourceId");

create table nightowls.mastra_knowledge_nodes (
  id text not null,
  type text not null,
  name text not null,
  "canonicalName" text not null,
  kind text,
  content text,
  description text,
  scope jsonb not null,
  "scopeKey" text not null,
  version int not null,
  "mergedInto" text,
  "createdAt" timestamp not null,
  "updatedAt" timestamp not null,
  "createdAtZ" timestamptz default now(),
  "updatedAtZ" timestamptz default now(),
  org_id uuid not null default nightowls._mastra_org(),
  constraint mastra_knowledge_nodes_pkey primary key (id)
);

create unique index idx_knowledge_nodes_identity on nightowls.mastra_knowledge_nodes (type, "scopeKey", "canonicalName");
create index idx_knowledge_nodes_scope on nightowls.mastra_knowledge_nodes ("scopeKey", type);

create table nightowls.mastra_knowledge_records (
  id text not null,
  node text not null,
  text text not null,
  scope jsonb not null,
  "scopeKey" text not null,
  "sourceThreadId" text not null,
  "capturedAt" timestamp not null,
  "when" timestamp,
  "maxScope" text,
  metadata jsonb,
  "deletedAt" timestamp,
  "deletedBy" text,
  "capturedAtZ" timestamptz default now(),
  "whenZ" timestamptz default now(),
  "deletedAtZ" timestamptz default now(),
  org_id uuid not null default nightowls._mastra_org(),
  constraint mastra_knowledge_records_pkey primary key (id)
);

create index idx_knowledge_records_node_latest on nightowls.mastra_knowledge_records (node, id desc);
create index idx_knowledge_records_thread_latest on nightowls.mastra_knowledge_records ("sourceThreadId", id desc);

create table nightowls.mastra_knowledge_semantic_outbox (
  id text not null,
  "idempotencyKey" text not null,
  "documentId" text not null,
  "documentType" text not null,
  operation text not null,
  scope jsonb not null,
  "scopeKey" text not null,
  status text not null,
  attempts int not null,
  "availableAt" timestamp not null,
  "claimedAt" timestamp,
  "claimedBy" text,
  "createdAt" timestamp not null,
  "completedAt" timestamp,
  "availableAtZ" timestamptz default now(),
  "claimedAtZ" timestamptz default now(),
  "createdAtZ" timestamptz default now(),
  "completedAtZ" timestamptz default now(),
  org_id uuid not null default nightowls._mastra_org(),
  constraint mastra_knowledge_semantic_outbox_pkey primary key (id)
);

create index idx_knowledge_outbox_claim on nightowls.mastra_knowledge_semantic_outbox (status, "availableAt", "createdAt");
create unique index idx_knowledge_outbox_idempotency on nightowls.mastra_knowledge_semantic_outbox ("idempotencyKey");

create table nightowls.mastra_mcp_client_versions (
  id text not null,
  "mcpClientId" text not null,
  "versionNumber" int not null,
  name text not null,
  description text,
  servers jsonb not null,
  "changedFields" jsonb,
  "changeMessage" text,
  "createdAt" timestamp not null,
  "createdAtZ" timestamptz default now(),
  org_id uuid not null default nightowls._mastra_org(),
  constraint mastra_mcp_client_versions_pkey primary key (id)
);

create unique index nightowls_idx_mcp_client_versions_client_version on nightowls.mastra_mcp_client_versions ("mcpClientId", "versionNumber");

create table nightowls.mastra_mcp_clients (
  id text not null,
  status text not null,
  "activeVersionId" text,
  "authorId" text,
  metadata jsonb,
  "createdAt" timestamp not null,
  "updatedAt" timestamp not null,
  "createdAtZ" timestamptz default now(),
  "updatedAtZ" timestamptz default now(),
  org_id uuid not null default nightowls._mastra_org(),
  constraint mastra_mcp_clients_pkey primary key (id)
);

create table nightowls.mastra_mcp_server_versions (
  id text not null,
  "mcpServerId" text not null,
  "versionNumber" int not null,
  name text not null,
  version text not null,
  description text,
  instructions text,
  repository jsonb,
  "releaseDate" text,
  "isLatest" boolean,
  "packageCanonical" text,
  tools jsonb,
  agents jsonb,
  workflows jsonb,
  "changedFields" jsonb,
  "changeMessage" text,
  "createdAt" timestamp not null,
  "createdAtZ" timestamptz default now(),
  org_id uuid not null default nightowls._mastra_org(),
  constraint mastra_mcp_server_versions_pkey primary key (id)
);

create unique index nightowls_idx_mcp_server_versions_server_version on nightowls.mastra_mcp_server_versions ("mcpServerId", "versionNumber");

create table nightowls.mastra_mcp_servers (
  id text not null,
  status text not null,
  "activeVersionId" text,
  "authorId" text,
  metadata jsonb,
  "createdAt" timestamp not null,
  "updatedAt" timestamp not null,
  "createdAtZ" timestamptz default now(),
  "updatedAtZ" timestamptz default now(),
  org_id uuid not null default nightowls._mastra_org(),
  constraint mastra_mcp_servers_pkey primary key (id)
);

create table nightowls.mastra_messages (
  id text not null,
  thread_id text not null,
  content text not null,
  role text not null,
  type text not null,
  "createdAt" timestamp not null,
  "resourceId" text,
  "createdAtZ" timestamptz default now(),
  org_id uuid not null default nightowls._mastra_org(),
  constraint mastra_messages_pkey primary key (id)
);

create index nightowls_mastra_messages_thread_id_createdat_idx on nightowls.mastra_messages (thread_id, "createdAt" desc);

create table nightowls.mastra_notifications (
  id text not null,
  "threadId" text not null,
  source text not null,
  kind text not null,
  priority text not null,
  status text not null,
  summary text not null,
  payload jsonb,
  "resourceId" text,
  "agentId" text,
  "sourceId" text,
  "dedupeKey" text,
  "coalesceKey" text,
  "coalescedCount" int not null,
  attributes jsonb,
  "createdAt" timestamp not null,
  "updatedAt" timestamp not null,
  "deliveredAt" timestamp,
  "seenAt" timestamp,
  "dismissedAt" timestamp,
  "archivedAt" timestamp,
  "discardedAt" timestamp,
  "deliverAt" timestamp,
  "summaryAt" timestamp,
  "deliveryReason" text,
  "deliveryAttempts" int not null,
  "lastDeliveryAttemptAt" timestamp,
  "lastDeliveryError" text,
  "deliveredSignalId" text,
  "summarySignalId" text,
  metadata jsonb,
  "createdAtZ" timestamptz default now(),
  "updatedAtZ" timestamptz default now(),
  "deliveredAtZ" timestamptz default now(),
  "seenAtZ" timestamptz default now(),
  "dismissedAtZ" timestamptz default now(),
  "archivedAtZ" timestamptz default now(),
  "discardedAtZ" timestamptz default now(),
  "deliverAtZ" timestamptz default now(),
  "summaryAtZ" timestamptz default now(),
  "lastDeliveryAttemptAtZ" timestamptz default now(),
  org_id uuid not null default nightowls._mastra_org()
);

create index nightowls_idx_notifications_coalescing
  on nightowls.mastra_notifications ("threadId", source, kind, status, "agentId", "resourceId", "dedupeKey", "coalesceKey");
create index nightowls_idx_notifications_due on nightowls.mastra_notifications (status, "deliverAt", "summaryAt");
create index nightowls_idx_notifications_thread_status_updated on nightowls.mastra_notifications ("threadId", status, "updatedAt");

create table nightowls.mastra_observational_memory (
  id text not null,
  "lookupKey" text not null,
  scope text not null,
  "resourceId" text,
  "threadId" text,
  "activeObservations" text not null,
  "activeObservationsPendingUpdate" text,
  "originType" text not null,
  config text not null,
  "generationCount" int not null,
  "lastObservedAt" timestamp,
  "lastReflectionAt" timestamp,
  "pendingMessageTokens" int not null,
  "totalTokensObserved" int not null,
  "observationTokenCount" int not null,
  "isObserving" boolean not null,
  "isReflecting" boolean not null,
  "observedMessageIds" jsonb,
  "observedTimezone" text,
  "bufferedObservations" text,
  "bufferedObservationTokens" int,
  "bufferedMessageIds" jsonb,
  "bufferedReflection" text,
  "bufferedReflectionTokens" int,
  "bufferedReflectionInputTokens" int,
  "reflectedObservationLineCount" int,
  "bufferedObservationChunks" jsonb,
  "isBufferingObservation" boolean not null,
  "isBufferingReflection" boolean not null,
  "lastBufferedAtTokens" int not null,
  "lastBufferedAtTime" timestamp,
  metadata jsonb,
  "createdAt" timestamp not null,
  "updatedAt" timestamp not null,
  "lastObservedAtZ" timestamptz default now(),
  "lastReflectionAtZ" timestamptz default now(),
  "lastBufferedAtTimeZ" timestamptz default now(),
  "createdAtZ" timestamptz default now(),
  "updatedAtZ" timestamptz default now(),
  org_id uuid not null default nightowls._mastra_org(),
  constraint mastra_observational_memory_pkey primary key (id)
);

create index idx_om_lookup_key on nightowls.mastra_observational_memory ("lookupKey");

create table nightowls.mastra_prompt_block_versions (
  id text not null,
  "blockId" text not null,
  "versionNumber" int not null,
  name text not null,
  description text,
  content text not null,
  rules jsonb,
  "requestContextSchema" jsonb,
  "changedFields" jsonb,
  "changeMessage" text,
  "createdAt" timestamp not null,
  "createdAtZ" timestamptz default now(),
  org_id uuid not null default nightowls._mastra_org(),
  constraint mastra_prompt_block_versions_pkey primary key (id)
);

create unique index nightowls_idx_prompt_block_versions_block_version on nightowls.mastra_prompt_block_versions ("blockId", "versionNumber");

create table nightowls.mastra_prompt_blocks (
  id text not null,
  status text not null,
  "activeVersionId" text,
  "authorId" text,
  metadata jsonb,
  "createdAt" timestamp not null,
  "updatedAt" timestamp not null,
  "createdAtZ" timestamptz default now(),
  "updatedAtZ" timestamptz default now(),
  org_id uuid not null default nightowls._mastra_org(),
  constraint mastra_prompt_blocks_pkey primary key (id)
);

create table nightowls.mastra_resources (
  id text not null,
  "workingMemory" text,
  metadata jsonb,
  "createdAt" timestamp not null,
  "updatedAt" timestamp not null,
  "createdAtZ" timestamptz default now(),
  "updatedAtZ" timestamptz default now(),
  org_id uuid not null default nightowls._mastra_org(),
  constraint mastra_resources_pkey primary key (id)
);

create table nightowls.mastra_schedule_triggers (
  id text not null,
  schedule_id text not null,
  run_id text,
  scheduled_fire_at bigint not null,
  actual_fire_at bigint not null,
  outcome text not null,
  error text,
  trigger_kind text not null,
  parent_trigger_id text,
  metadata jsonb,
  org_id uuid not null default nightowls._mastra_org(),
  constraint mastra_schedule_triggers_pkey primary key (id)
);

create index nightowls_idx_mastra_schedule_triggers_schedule_fire on nightowls.mastra_schedule_triggers (schedule_id, actual_fire_at desc);

create table nightowls.mastra_schedules (
  id text not null,
  target jsonb not null,
  cron text not null,
  timezone text,
  status text not null,
  next_fire_at bigint not null,
  last_fire_at bigint,
  last_run_id text,
  created_at bigint not null,
  updated_at bigint not null,
  metadata jsonb,
  owner_type text,
  owner_id text,
  org_id uuid not null default nightowls._mastra_org(),
  constraint mastra_schedules_pkey primary key (id)
);

create index nightowls_idx_mastra_schedules_status_next_fire on nightowls.mastra_schedules (status, next_fire_at);

create table nightowls.mastra_scorer_definition_versions (
  id text not null,
  "scorerDefinitionId" text not null,
  "versionNumber" int not null,
  name text not null,
  description text,
  type text not null,
  model jsonb,
  instructions text,
  "scoreRange" jsonb,
  "presetConfig" jsonb,
  "defaultSampling" jsonb,
  "changedFields" jsonb,
  "changeMessage" text,
  "createdAt" timestamp not null,
  "createdAtZ" timestamptz default now(),
  org_id uuid not null default nightowls._mastra_org(),
  constraint mastra_scorer_definition_versions_pkey primary key (id)
);

create unique index nightowls_idx_scorer_definition_versions_def_version
  on nightowls.mastra_scorer_definition_versions ("scorerDefinitionId", "versionNumber");

create table nightowls.mastra_scorer_definitions (
  id text not null,
  status text not null,
  "activeVersionId" text,
  "authorId" text,
  "organizationId" text,
  "projectId" text,
  metadata jsonb,
  "createdAt" timestamp not null,
  "updatedAt" timestamp not null,
  "createdAtZ" timestamptz default now(),
  "updatedAtZ" timestamptz default now(),
  org_id uuid not null default nightowls._mastra_org(),
  constraint mastra_scorer_definitions_pkey primary key (id)
);

create table nightowls.mastra_scorers (
  id text not null,
  "scorerId" text not null,
  "traceId" text,
  "spanId" text,
  "runId" text not null,
  scorer jsonb not null,
  "preprocessStepResult" jsonb,
  "extractStepResult" jsonb,
  "analyzeStepResult" jsonb,
  score double precision not null,
  reason text,
  metadata jsonb,
  "preprocessPrompt" text,
  "extractPrompt" text,
  "generateScorePrompt" text,
  "generateReasonPrompt" text,
  "analyzePrompt" text,
  "reasonPrompt" text,
  input jsonb not null,
  output jsonb not null,
  "additionalContext" jsonb,
  "requestContext" jsonb,
  "entityType" text,
  entity jsonb,
  "entityId" text,
  source text not null,
  "resourceId" text,
  "threadId" text,
  "organizationId" text,
  "projectId" text,
  "batchId" text,
  "datasetId" text,
  "datasetItemId" text,
  "createdAt" timestamp not null,
  "updatedAt" timestamp not null,
  "createdAtZ" timestamptz default now(),
  "updatedAtZ" timestamptz default now(),
  org_id uuid not null default nightowls._mastra_org(),
  constraint mastra_scorers_pkey primary key (id)
);

create index nightowls_mastra_scores_trace_id_span_id_created_at_idx on nightowls.mastra_scorers ("traceId", "spanId", "createdAt" desc);

create table nightowls.mastra_skill_blobs (
  hash text not null,
  content text not null,
  size int not null,
  "mimeType" text,
  "createdAt" timestamp not null,
  "createdAtZ" timestamptz default now(),
  org_id uuid not null default nightowls._mastra_org(),
  constraint mastra_skill_blobs_pkey primary key (hash)
);

create table nightowls.mastra_skill_versions (
  id text not null,
  "skillId" text not null,
  "versionNumber" int not null,
  name text not null,
  description text not null,
  instructions text not null,
  license text,
  compatibility jsonb,
  source jsonb,
  "references" jsonb,
  scripts jsonb,
  assets jsonb,
  files jsonb,
  metadata jsonb,
  tree jsonb,
  "changedFields" jsonb,
  "changeMessage" text,
  "createdAt" timestamp not null,
  "createdAtZ" timestamptz default now(),
  org_id uuid not null default nightowls._mastra_org(),
  constraint mastra_skill_versions_pkey primary key (id)
);

create unique index nightowls_idx_skill_versions_skill_version on nightowls.mastra_skill_versions ("skillId", "versionNumber");

create table nightowls.mastra_skills (
  id text not null,
  status text not null,
  "activeVersionId" text,
  "authorId" text,
  visibility text,
  "favoriteCount" int,
  "createdAt" timestamp not null,
  "updatedAt" timestamp not null,
  "createdAtZ" timestamptz default now(),
  "updatedAtZ" timestamptz default now(),
  org_id uuid not null default nightowls._mastra_org(),
  constraint mastra_skills_pkey primary key (id)
);

create table nightowls.mastra_thread_state (
  "threadId" text not null,
  type text not null,
  value jsonb not null,
  "createdAt" timestamp not null,
  "updatedAt" timestamp not null,
  "createdAtZ" timestamptz default now(),
  "updatedAtZ" timestamptz default now(),
  org_id uuid not null default nightowls._mastra_org(),
  constraint mastra_thread_state_pkey primary key ("threadId", type)
);

create table nightowls.mastra_threads (
  id text not null,
  "resourceId" text not null,
  title text not null,
  metadata jsonb,
  "createdAt" timestamp not null,
  "updatedAt" timestamp not null,
  "createdAtZ" timestamptz default now(),
  "updatedAtZ" timestamptz default now(),
  org_id uuid not null default nightowls._mastra_org(),
  constraint mastra_threads_pkey primary key (id)
);

create index nightowls_mastra_threads_resourceid_createdat_idx on nightowls.mastra_threads ("resourceId", "createdAt" desc);

create table nightowls.mastra_tool_provider_connections (
  "authorId" text not null,
  "providerId" text not null,
  "connectionId" text not null,
  toolkit text not null,
  label text,
  scope text not null,
  "createdAt" timestamp not null,
  "updatedAt" timestamp not null,
  "createdAtZ" timestamptz default now(),
  "updatedAtZ" timestamptz default now(),
  org_id uuid not null default nightowls._mastra_org(),
  constraint mastra_tool_provider_connections_pkey primary key ("authorId", "providerId", "connectionId")
);

create index nightowls_idx_tool_provider_connections_author on nightowls.mastra_tool_provider_connections ("authorId", "providerId", toolkit);

create table nightowls.mastra_workflow_definitions (
  id text not null,
  description text,
  metadata jsonb,
  "inputSchema" jsonb not null,
  "outputSchema" jsonb not null,
  "stateSchema" jsonb,
  "requestContextSchema" jsonb,
  graph jsonb not null,
  schedule jsonb,
  status text not null,
  source text not null,
  "authorId" text,
  "createdAt" timestamp not null,
  "updatedAt" timestamp not null,
  "createdAtZ" timestamptz default now(),
  "updatedAtZ" timestamptz default now(),
  org_id uuid not null default nightowls._mastra_org(),
  constraint mastra_workflow_definitions_pkey primary key (id)
);

create index nightowls_idx_workflow_definitions_status on nightowls.mastra_workflow_definitions (status);

create table nightowls.mastra_workflow_snapshot (
  workflow_name text not null,
  run_id text not null,
  "resourceId" text,
  snapshot jsonb not null,
  "createdAt" timestamp not null,
  "updatedAt" timestamp not null,
  "createdAtZ" timestamptz default now(),
  "updatedAtZ" timestamptz default now(),
  org_id uuid not null default nightowls._mastra_org(),
  constraint nightowls_mastra_workflow_snapshot_workflow_name_run_id_key unique (workflow_name, run_id)
);

create index nightowls_mastra_workflow_snapshot_name_createdat_idx on nightowls.mastra_workflow_snapshot (workflow_name, "createdAt" desc);
create index nightowls_mastra_workflow_snapshot_name_status_createdat_idx
  on nightowls.mastra_workflow_snapshot (workflow_name, ((snapshot ->> 'status'::text)), "createdAt" desc);
create index nightowls_mastra_workflow_snapshot_threadid_idx
  on nightowls.mastra_workflow_snapshot ((coalesce(
    jsonb_path_query_first(
      snapshot, '$.context.* ? (@.status == "suspended").suspendPayload.__streamState.messageList.memoryInfo.threadId') #>> '{}',
    snapshot #>> '{context,input,messageListState,memoryInfo,threadId}')));

alter table nightowls.mastra_workflow_snapshot replica identity using index nightowls_mastra_workflow_snapshot_workflow_name_run_id_key;

create table nightowls.mastra_workspace_versions (
  id text not null,
  "workspaceId" text not null,
  "versionNumber" int not null,
  name text not null,
  description text,
  filesystem jsonb,
  sandbox jsonb,
  mounts jsonb,
  search jsonb,
  skills jsonb,
  tools jsonb,
  "autoSync" boolean,
  "operationTimeout" int,
  "changedFields" jsonb,
  "changeMessage" text,
  "createdAt" timestamp not null,
  "createdAtZ" timestamptz default now(),
  org_id uuid not null default nightowls._mastra_org(),
  constraint mastra_workspace_versions_pkey primary key (id)
);

create unique index nightowls_idx_workspace_versions_workspace_version on nightowls.mastra_workspace_versions ("workspaceId", "versionNumber");

create table nightowls.mastra_workspaces (
  id text not null,
  status text not null,
  "activeVersionId" text,
  "authorId" text,
  metadata jsonb,
  "createdAt" timestamp not null,
  "updatedAt" timestamp not null,
  "createdAtZ" timestamptz default now(),
  "updatedAtZ" timestamptz default now(),
  org_id uuid not null default nightowls._mastra_org(),
  constraint mastra_workspaces_pkey primary key (id)
);

-- What is not the package's ------------------------------------------------------------------------

-- Sets the times of a span, as the package does it; a restore and adopt_mastra() bring their own.
create function nightowls.trigger_set_timestamps()
  returns trigger
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if current_setting('row_security') = 'off'
     and pg_has_role(current_user, (select c.relowner from pg_class c where c.oid = tg_relid), 'usage') then
    return new;
  elsif tg_op = 'INSERT' then
    new."createdAt" := now();
    new."createdAtZ" := now();
  else
    new."createdAt" := old."createdAt";
    new."createdAtZ" := old."createdAtZ";
  end if;
  new."updatedAt" := now();
  new."updatedAtZ" := now();
  return new;
end;
$$;

comment on function nightowls.trigger_set_timestamps() is
  'A trigger of mastra_ai_spans: when a span was written first and last. By the name and with the effect of @mastra/pg.';

revoke all on function nightowls.trigger_set_timestamps() from public;

create trigger mastra_ai_spans_timestamps
  before insert or update on nightowls.mastra_ai_spans
  for each row execute function nightowls.trigger_set_timestamps();

-- An id is unique among all orgs here: the client names the key in its upserts. Where it would do nothing for a row that is there, a row of
-- another org, which it cannot see, must not be taken for its own.
-- Definer: other orgs' rows are closed to the caller. It says no more of them than the key would.
create function nightowls._refuse_foreign_key()
  returns trigger
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_foreign boolean;
begin
  execute format('select exists (select from nightowls.%I t where t.org_id <> $1.org_id and (%s))', tg_table_name, tg_argv[0])
     into v_foreign using new;
  if v_foreign then
    raise exception 'a row with this key is there already, in another org'
      using errcode = 'unique_violation', table = tg_table_name, schema = tg_table_schema,
            hint = 'Keys of Mastra''s tables are unique among all orgs. Choose another, or give each org a database of its own.';
  end if;
  return new;
end;
$$;

revoke all on function nightowls._refuse_foreign_key() from public;

create trigger t10_foreign before insert on nightowls.mastra_skill_blobs
  for each row execute function nightowls._refuse_foreign_key('t.hash = $1.hash');
create trigger t10_foreign before insert on nightowls.mastra_favorites
  for each row execute function nightowls._refuse_foreign_key(
    't."userId" = $1."userId" and t."entityType" = $1."entityType" and t."entityId" = $1."entityId"');
create trigger t10_foreign before insert on nightowls.mastra_knowledge_mentions
  for each row execute function nightowls._refuse_foreign_key(
    't."sourceType" = $1."sourceType" and t."sourceId" = $1."sourceId" and t."recordId" = $1."recordId"');
create trigger t10_foreign before insert on nightowls.mastra_knowledge_semantic_outbox
  for each row execute function nightowls._refuse_foreign_key('t.id = $1.id or t."idempotencyKey" = $1."idempotencyKey"');

-- The wall: of the org that the caller is for, be it a service.
do $$
declare
  v_table name;
begin
  for v_table in
    select c.relname from pg_catalog.pg_class c
     where c.relnamespace = 'nightowls'::regnamespace and c.relkind = 'r' and c.relname ~ '^mastra_'
  loop
    execute format('alter table nightowls.%I enable row level security', v_table);
    execute format('alter table nightowls.%I force row level security', v_table);
    execute format('create policy own_org on nightowls.%I using (org_id = (select nightowls._mastra_org())) '
                   'with check (org_id = (select nightowls._mastra_org()))', v_table);
    execute format('comment on table nightowls.%I is ''As @mastra/pg 1.27.1 with @mastra/core 1.71.0 makes it, and org_id. Kept by that package.''', v_table);
    execute format('comment on column nightowls.%I.org_id is ''The tenant: that of the role (grant_mastra), else of the transaction, the JWT or the default.''',
                   v_table);
  end loop;
end;
$$;
