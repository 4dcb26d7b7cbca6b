//! Who may do what, and what no trick with names changes.

use crate::fixture::{default_org, lines};
use crate::projections::text;
use crate::support::{
    APP, Db, Install, SERVICE, STRANGER, Session, on_each_install, on_each_route, quote,
};

/// What only the owner may call, among what is public.
const OWNERS: &[&str] = &[
    "adopt_mastra",
    "adopt_pgmq",
    "alter_embedding_source",
    "create_embedding_source",
    "create_enrichment",
    "create_stream_join",
    "create_table_join",
    "create_table_projection",
    "create_type_index",
    "create_vector_index",
    "create_view_projection",
    "disable_cdc",
    "disable_realtime",
    "drop_embedding_source",
    "drop_stream",
    "drop_vector_index",
    "enable_cdc",
    "enable_realtime",
    "grant_mastra",
    "grant_member",
    "grant_monitor",
    "grant_service",
    "import_events",
    "install_pgmq",
    "install_rpc",
    "migration_files",
    "publish_changes",
    "publish_table",
    "revoke_mastra",
    "schedule",
    "trigger_set_timestamps",
    "unpublish_changes",
    "unschedule",
];

/// Every function as a call with null arguments, with its public name; not those that
/// only the executor can call.
#[track_caller]
fn calls(db: &Db) -> Vec<(String, String)> {
    db.superuser()
        .rows(
            "select p.proname, format('%s nightowls.%I(%s)', case p.prokind when 'p' then 'call' else 'select' end, p.proname,
                      (select string_agg('null::' || format_type(t, null), ', ' order by n)
                         from unnest(p.proargtypes) with ordinality a (t, n)))
               from pg_proc p
              where p.pronamespace = 'nightowls'::regnamespace
                and not 'internal'::regtype = any (p.proargtypes)
                and p.prorettype not in ('internal'::regtype)
                -- A strict one is not even called with nulls.
                and not p.proisstrict
              order by p.proname",
        )
        .into_iter()
        .map(|row| (row[0].clone().unwrap(), row[1].clone().unwrap()))
        .collect()
}

#[track_caller]
fn relations(db: &Db) -> Vec<String> {
    lines(
        &mut db.superuser(),
        "select format('nightowls.%I', relname) from pg_class
          where relnamespace = 'nightowls'::regnamespace and relkind in ('r', 'p', 'v', 'm') order by 1",
    )
}

#[test]
fn a_stranger_may_do_nothing_at_all() {
    on_each_route(|db| {
        default_org(db);
        db.owner().exec(
            r#"select nightowls.create_projection('tally', 'order', '{"otherwise": [{"op": "add", "path": "n"}]}')"#,
        );
        let mut stranger = db.session(STRANGER);
        // First as it stands; then where somebody has let everybody into the schema, as an exposed API schema is.
        for round in 0..2 {
            if round == 1 {
                db.owner().exec("grant usage on schema nightowls to public");
            }
            for (_, call) in calls(db) {
                assert_eq!(stranger.refused(&call).code, "42501", "{call}");
            }
            let callable = lines(
                &mut db.superuser(),
                &format!(
                    "select oid::regprocedure from pg_proc
                      where pronamespace = 'nightowls'::regnamespace and has_function_privilege('{STRANGER}', oid, 'execute')"
                ),
            );
            assert_eq!(callable, Vec::<String>::new());
            for relation in relations(db) {
                for sql in [
                    format!("select * from {relation}"),
                    format!("select count(*) from {relation}"),
                    format!("insert into {relation} default values"),
                    format!("delete from {relation}"),
                    format!("copy {relation} to stdout"),
                ] {
                    // A view is refused by COPY for what it is, one that cannot be written by writes.
                    let code = stranger.refused(&sql).code;
                    let of_its_kind = ["copy", "insert", "delete"]
                        .iter()
                        .any(|word| sql.starts_with(word));
                    assert!(
                        code == "42501"
                            || of_its_kind && ["42809", "55000"].contains(&code.as_str()),
                        "{sql}: {code}"
                    );
                }
            }
            for sql in [
                "select nextval('nightowls.events_position_seq')",
                "select setval('nightowls.events_position_seq', 1)",
                "select last_value from nightowls.events_position_seq",
                "create table nightowls.mine ()",
                "create function nightowls.mine() returns int language sql return 1",
                "alter table nightowls.events disable trigger all",
                "create trigger mine after insert on nightowls.events execute function nightowls._after_insert()",
                "comment on schema nightowls is 'mine'",
            ] {
                assert_eq!(stranger.refused(sql).code, "42501", "{sql}");
            }
        }
        let granted = lines(
            &mut db.superuser(),
            "select p.oid::regprocedure::text from pg_proc p, aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
              where p.pronamespace = 'nightowls'::regnamespace and a.grantee = 0
             union all
             select c.oid::regclass::text from pg_class c, aclexplode(c.relacl) a
              where c.relnamespace = 'nightowls'::regnamespace and a.grantee = 0
             union all
             select c.attrelid::regclass || '.' || c.attname from pg_attribute c, aclexplode(c.attacl) a
              where (select relnamespace from pg_class where oid = c.attrelid) = 'nightowls'::regnamespace and a.grantee = 0",
        );
        assert_eq!(granted, Vec::<String>::new(), "granted to everybody");
    });
}

#[test]
fn a_service_has_the_rights_of_grant_service_and_no_others() {
    on_each_install(|db| {
        let owned = lines(
            &mut db.superuser(),
            &format!(
                "select proname from pg_proc
                  where pronamespace = 'nightowls'::regnamespace and proname not like '\\_%'
                    and not has_function_privilege('{SERVICE}', oid, 'execute')
                  order by 1"
            ),
        );
        let expected: Vec<_> = OWNERS
            .iter()
            .filter(|name| db.install() == Install::Extension || **name != "migration_files")
            .collect();
        assert_eq!(owned.iter().collect::<Vec<_>>(), expected);

        let mastras = lines(
            &mut db.superuser(),
            &format!(
                "select distinct string_agg(lower(p), ' ' order by p)
                   from pg_class c, unnest('{{SELECT,INSERT,UPDATE,DELETE,TRUNCATE,REFERENCES,TRIGGER}}'::text[]) p
                  where c.relnamespace = 'nightowls'::regnamespace and c.relname ~ '^mastra_' and c.relkind = 'r'
                    and has_table_privilege('{SERVICE}', c.oid, p)
                  group by c.oid"
            ),
        );
        assert_eq!(mastras, ["delete insert select update"]);
        let rights = lines(
            &mut db.superuser(),
            &format!(
                "select c.relname, string_agg(lower(p), ' ' order by p)
                   from pg_class c, unnest('{{SELECT,INSERT,UPDATE,DELETE,TRUNCATE,REFERENCES,TRIGGER}}'::text[]) p
                  where c.relnamespace = 'nightowls'::regnamespace and c.relkind in ('r', 'v', 'm')
                    and has_table_privilege('{SERVICE}', c.oid, p) and c.relname !~ '^mastra_'
                  group by 1 order by 1"
            ),
        );
        assert_eq!(
            rights,
            [
                "_consumer_failures select",
                "_consumer_offsets select",
                "_embedding_marks select",
                "_embedding_pending select",
                "_embedding_requests select",
                "_embedding_states select",
                "_endpoint_states select",
                "_projection_states select",
                "_queue_counts select",
                "_replays select",
                "_samples select",
                "_sweeps select",
                "agent_versions insert select update",
                "agents insert select update",
                "all_events select",
                "app_config select",
                "audit_log select",
                "clock_parts select",
                "compaction_policies select",
                "compactions select",
                "consumer_lag select",
                "consumers select",
                "dispatch_status select",
                "embedding_chunks select",
                "embedding_sources select",
                "endpoints select",
                "events select",
                "events_archive select",
                "failed_embeddings select",
                "floor_marks select",
                "floor_status select",
                "floor_tickets select",
                "floors select",
                "followups select",
                "health select",
                "imports select",
                "messages select",
                "once_keys select",
                "org_members delete insert select update",
                "orgs delete insert select update",
                "parked_events select",
                "progress select",
                "projection_states select",
                "projections select",
                "published_changes select",
                "queue_archive select",
                "queue_bindings select",
                "queue_dedup select",
                "queue_due_marks select",
                "queue_marks select",
                "queue_messages select",
                "queue_metrics select",
                "queues select",
                "redaction_rules select",
                "requests select",
                "responses select",
                "routes select",
                "run_snapshots select",
                "runs select",
                "scratchpad select",
                "scratchpad_marks select",
                "settings delete insert select update",
                "snapshots select",
                "streams select",
                "threads select",
                "topic_bindings select",
                "vector_indexes select",
            ]
        );
        let columns = lines(
            &mut db.superuser(),
            &format!(
                "select string_agg(attname, ' ' order by attnum) from pg_attribute
                  where attrelid = 'nightowls.events'::regclass and attnum > 0
                    and has_column_privilege('{SERVICE}', attrelid, attnum, 'insert')"
            ),
        );
        assert_eq!(
            columns,
            ["org_id aggregate_type aggregate_id version event_type payload metadata event_id"]
        );
        assert_eq!(
            text(
                &mut db.superuser(),
                &format!("select has_sequence_privilege('{SERVICE}', 'nightowls.events_position_seq', 'usage,select,update') or
                                 has_schema_privilege('{SERVICE}', 'nightowls', 'create')")
            ),
            "f"
        );
        let mut service = db.service();
        for (name, call) in calls(db) {
            if OWNERS.contains(&name.as_str()) {
                assert_eq!(service.refused(&call).code, "42501", "{call}");
            }
        }
        for sql in [
            "select nextval('nightowls.events_position_seq')",
            "select setval('nightowls.events_position_seq', 1)",
            "alter table nightowls.events disable trigger all",
            "set session_replication_role = replica",
            "create trigger mine after insert on nightowls.events execute function nightowls._after_insert()",
            "update nightowls.events set payload = '{}'",
            "insert into nightowls.routes select gen_random_uuid(), 'a', 'reducer', 'b'",
            "update nightowls.projections set handler = 'public.f'",
            "insert into nightowls.events_archive select *, now() from nightowls.events",
            "delete from nightowls.events_archive",
            "update nightowls.snapshots set state = '{}'",
            "update nightowls._replays set state = '{}'",
            "update nightowls.compactions set deleted_to = 1",
            "insert into nightowls.compaction_policies select gen_random_uuid(), 'order', 1, 'delete', 1",
            "insert into nightowls.events (org_id, aggregate_type, aggregate_id, event_type, created_at) select null, 'a', 'b', 'c', now()",
            "alter role current_user superuser",
        ] {
            assert_eq!(service.refused(sql).code, "42501", "{sql}");
        }
    });
}

#[test]
fn grant_service_makes_any_role_a_service_and_refuses_one_that_is_not_there() {
    on_each_install(|db| {
        default_org(db);
        let mut owner = db.owner();
        let refusal = owner.refused("select nightowls.grant_service('owl_nobody')");
        assert_eq!(refusal.code, "42704");
        assert!(refusal.message.contains("\"owl_nobody\""), "{refusal}");
        assert_eq!(
            owner.refused("select nightowls.grant_service(null)").code,
            "22004"
        );
        assert_eq!(
            owner.refused("select nightowls.grant_service('')").code,
            "42704"
        );
        assert_eq!(
            owner
                .refused("select nightowls.grant_service('owl_app; drop schema nightowls')")
                .code,
            "42704"
        );
        assert_eq!(
            db.service()
                .refused(&format!("select nightowls.grant_service('{SERVICE}')"))
                .code,
            "42501"
        );
        // The name of a role is any text; roles are the cluster's, so this one has the database's name.
        let odd = format!("it's \"{}\"", db.name());
        let ident = format!("\"{}\"", odd.replace('"', "\"\""));
        db.superuser().exec(&format!("create role {ident}"));
        owner.exec(&format!(
            "select nightowls.grant_service({0}); select nightowls.grant_service({0})",
            quote(&odd)
        ));
        let mut superuser = db.superuser();
        superuser.exec(&format!("set role {ident}"));
        superuser.exec("select nightowls.append_event('order', 'a', 'noted')");
        assert_eq!(
            text(
                &mut superuser,
                "select count(*) from nightowls.read_events()"
            ),
            "1"
        );
        superuser.exec(&format!(
            "reset role; drop owned by {ident}; drop role {ident}"
        ));
    });
}

/// What a client does and sees, in calls that leave nothing to the session's own
/// search path.
#[track_caller]
fn scenario(owner: &mut Session, service: &mut Session) -> Vec<String> {
    let mut seen = Vec::new();
    owner.exec(
        r#"select nightowls.create_projection('tally', 'order', '{"on": {"counted": [{"op": "add", "path": "n", "value": "$.by"}]},
              "otherwise": [{"op": "set", "path": "last", "value": "@.event_type"}, {"op": "min", "path": "least", "value": "$.by"}]}')"#,
    );
    for sql in [
        r#"select version from nightowls.append_event('order', 'a', 'counted', '{"by": 1}')"#,
        r#"select version from nightowls.append_event('order', 'a', 'counted', '{"by": 2}', 1, '00000000-0000-4000-8000-000000000001')"#,
        r#"select version from nightowls.append_event('order', 'a', 'counted', '{"by": 2}', 1, '00000000-0000-4000-8000-000000000001')"#,
        r#"select version from nightowls.append_events('order', 'b', '[{"event_type": "counted", "payload": {"by": 4}}, {"event_type": "noted", "payload": {"by": 3}}]')"#,
        r#"select aggregate_id, version from nightowls.append_many('[{"aggregate_type": "order", "aggregate_id": "a", "events": [{"event_type": "counted", "payload": {"by": 8}}]},
                                                                     {"aggregate_type": "order", "aggregate_id": "c", "events": [{"event_type": "noted"}]}]')"#,
        r#"insert into nightowls.events (aggregate_type, aggregate_id, event_type, payload) values ('order', 'c', 'counted', '{"by": 1}')"#,
        "select nightowls.state('tally', 'a'), nightowls.state('tally', 'b'), nightowls.state('tally', 'c')",
        "select nightowls.state_at('tally', 'a', 1), nightowls.state_at_time('tally', 'a', 'infinity')",
        "select aggregate_id, version, event_type, payload from nightowls.read_aggregate('order', 'a')",
        r#"select aggregate_id, version from nightowls.read_events(filter => '{"event_types": ["counted"]}')"#,
        "select aggregate_id, version from nightowls.recent_events(max_events => 2)",
        "select version from nightowls.last_event('order', 'b')",
        "select nightowls.event_id_for('stripe', 'evt_1')",
        "select aggregate_id, version, state from nightowls.projection_states",
        "select nightowls.refresh_projection('tally'), nightowls.rebuild_projection('tally')",
        "select aggregate_id from nightowls.verify_projection('tally')",
        r#"select nightowls.fold_state('{"otherwise": [{"op": "push", "path": "l", "value": "$.x"}]}', null, '[{"event_type": "e", "payload": {"x": [1.10]}}]')"#,
    ] {
        seen.extend(lines(service, sql));
    }
    for sql in [
        "select nightowls.append_event('order', 'a', 'counted', '{}', 7)",
        r#"select nightowls.append_event('order', 'a', 'counted', '{"by": 3}', null, '00000000-0000-4000-8000-000000000001')"#,
        "select nightowls.append_event('', 'a', 'counted')",
        "select nightowls.state('tolly', 'a')",
        "insert into nightowls.events (aggregate_type, aggregate_id, version, event_type) values ('order', 'a', 9, 'counted')",
    ] {
        let refusal = service.refused(sql);
        seen.push(format!("{} {}", refusal.code, refusal.message));
    }
    seen
}

/// Each raises SH001 in place of what it is named like.
fn create_shadows(session: &mut Session) {
    session.exec(
        r#"do $body$
           declare
             v_name text; v_type text; v_count int := 0;
           begin
             foreach v_type in array '{text,bigint,int,uuid,jsonb,boolean,timestamptz,numeric,oid,name}'::text[] loop
               execute format('create function public.shadow(%1$s, %1$s) returns boolean language plpgsql as $$ begin raise exception ''shadowed'' using errcode = ''SH001''; end $$', v_type);
               foreach v_name in array '{=,<>,<,>,<=,>=,||,+,-,&,@>}'::text[] loop
                 execute format('create operator public.%s (leftarg = %s, rightarg = %2$s, function = public.shadow)', v_name, v_type);
               end loop;
             end loop;
             -- Every function of pg_catalog that our sources may name, with the same arguments.
             for v_name, v_type in
               select p.proname, pg_get_function_identity_arguments(p.oid) from pg_proc p
                where p.pronamespace = 'pg_catalog'::regnamespace and p.prokind = 'f'
                  and p.prorettype <> 'internal'::regtype and not 'internal'::regtype = any (p.proargtypes)
                  and p.proargmodes is null and pg_get_function_identity_arguments(p.oid) !~ 'VARIADIC|"any"|any|cstring|internal|trigger'
                  and p.proname = any ('{lower,upper,length,octet_length,substr,split_part,strpos,starts_with,left,right,replace,btrim,repeat,format,
                       set_config,current_setting,clock_timestamp,now,hashtext,uuid_hash,pg_advisory_xact_lock,pg_advisory_xact_lock_shared,
                       pg_current_xact_id,pg_current_xact_id_if_assigned,jsonb_typeof,jsonb_array_length,jsonb_set,jsonb_path_exists,
                       gen_random_uuid,pg_has_role,pg_is_in_recovery,current_database,jsonb_extract_path,cardinality,generate_series}'::text[])
             loop
               begin
                 execute format('create function public.%I(%s) returns text language plpgsql as $$ begin raise exception ''shadowed'' using errcode = ''SH001''; end $$', v_name, v_type);
                 v_count := v_count + 1;
               exception when others then null;
               end;
             end loop;
             assert v_count > 30, v_count;
             foreach v_name in array '{append_event,_project,_fold_tail,_hold,current_org,state,_is_service,version}'::text[] loop
               execute format('create function public.%I() returns text language plpgsql as $$ begin raise exception ''shadowed'' using errcode = ''SH001''; end $$', v_name);
             end loop;
           end $body$;
           create table public.events (); create table public.projections (); create table public.routes (); create table public.orgs ();
           create table public.inserted (); create table public.folded ()"#,
    );
}

#[test]
fn operators_functions_and_tables_of_the_same_names_in_the_search_path_change_nothing() {
    for install in Install::ALL {
        crate::support::on_install(install, |db| {
            default_org(db);
            let plain = scenario(&mut db.owner(), &mut db.service());
            assert!(plain.len() > 25, "{plain:#?}");

            crate::support::on_install(install, |db| {
                default_org(db);
                create_shadows(&mut db.session(APP));
                let (mut owner, mut service) = (db.owner(), db.service());
                for session in [&mut owner, &mut service] {
                    session.exec("set search_path = public, pg_temp, pg_catalog");
                    assert_eq!(session.refused("select lower('A')").code, "SH001");
                    assert_eq!(
                        session.refused("select 'a'::text = 'b'::text").code,
                        "SH001"
                    );
                }
                assert_eq!(scenario(&mut owner, &mut service), plain);
            });

            crate::support::on_install(install, |db| {
                default_org(db);
                db.superuser().exec(&format!(
                    "grant temporary on database {} to public",
                    db.name()
                ));
                let (mut owner, mut service) = (db.owner(), db.service());
                for session in [&mut owner, &mut service] {
                    for table in [
                        "events",
                        "routes",
                        "_append_targets",
                        "h",
                        "projections",
                        "_projection_states",
                        "projection_states",
                        "orgs",
                        "settings",
                        "org_members",
                        "events_position_seq",
                        "inserted",
                        "folded",
                        "removed",
                        "pg_locks",
                        "pg_class",
                        "pg_roles",
                        "pg_proc",
                    ] {
                        session.exec(&format!("create temp table {table} (nothing int)"));
                    }
                    session.exec("create type pg_temp.append_result as (x int); set search_path = pg_temp, public");
                }
                assert_eq!(scenario(&mut owner, &mut service), plain);
            });
        });
    }
}

/// One call of each function that the service may call.
const CALLS: &[(&str, &str)] = &[
    (
        "ack",
        "select nightowls.ack('jobs', 1, '00000000-0000-4000-8000-000000000000')",
    ),
    (
        "ack_many",
        "select nightowls.ack_many('jobs', '{1}', array['00000000-0000-4000-8000-000000000000']::uuid[])",
    ),
    (
        "ack_message",
        "select nightowls.ack_message('1.1.' || '00000000-0000-4000-8000-000000000000')",
    ),
    ("acquire_floor", "call nightowls.acquire_floor('c', 'a')"),
    ("add_member", "select nightowls.add_member('ann')"),
    (
        "alter_consumer",
        "select nightowls.create_consumer('c'); select nightowls.alter_consumer('c', members => 2)",
    ),
    (
        "alter_endpoint",
        "select nightowls.create_endpoint('e1', 'https://example.com/'); select nightowls.alter_endpoint('e1', paused => true)",
    ),
    (
        "alter_projection",
        r#"select nightowls.alter_projection('tally', '{"otherwise": [{"op": "add", "path": "m"}]}')"#,
    ),
    (
        "alter_queue",
        "select nightowls.alter_queue('jobs', vt => 60)",
    ),
    (
        "append_event",
        "select nightowls.append_event('order', 'a', 'noted')",
    ),
    (
        "append_events",
        r#"select nightowls.append_events('order', 'a', '[{"event_type": "noted"}, {"event_type": "noted"}]')"#,
    ),
    (
        "append_many",
        r#"select nightowls.append_many('[{"aggregate_type": "order", "aggregate_id": "b", "events": [{"event_type": "noted"}]}]')"#,
    ),
    (
        "append_message",
        "select nightowls.create_thread('th'); select nightowls.append_message('th', '{}')",
    ),
    ("archive", "select nightowls.archive('jobs', 2)"),
    (
        "archive_many",
        "select nightowls.archive_many('jobs', '{3}')",
    ),
    (
        "assert_floor",
        "select nightowls.assert_floor('c', fence) from nightowls.floors",
    ),
    ("await_floor", "select nightowls.await_floor('c', 'a', 1)"),
    (
        "backfill_embeddings",
        "do $$ begin perform nightowls.backfill_embeddings(); exception when feature_not_supported then null; end $$",
    ),
    (
        "bind",
        "select nightowls.bind('jobs', '{\"event_types\": [\"noted\"]}')",
    ),
    ("bind_endpoint", "select nightowls.bind_endpoint('e1')"),
    ("bind_topic", "select nightowls.bind_topic('a.*', 'jobs')"),
    (
        "cancel_followup",
        "select nightowls.create_thread('th'); select nightowls.cancel_followup(nightowls.create_followup('th', now()))",
    ),
    (
        "change_member",
        "select nightowls.change_member('ann', 'admin')",
    ),
    ("check_reducer", "select nightowls.check_reducer('{}')"),
    ("claim_embeddings", "select nightowls.claim_embeddings()"),
    ("claim_followups", "select nightowls.claim_followups()"),
    (
        "commit_offset",
        "select nightowls.commit_offset('c', max(position), max(fence)) from nightowls.fetch_events('c')",
    ),
    ("compact", "select nightowls.compact()"),
    (
        "compact_aggregate",
        "select nightowls.compact_aggregate('order', 'a', 1000000)",
    ),
    ("create_consumer", "select nightowls.create_consumer('d')"),
    (
        "create_endpoint",
        "select nightowls.create_endpoint('e2', 'https://example.com/')",
    ),
    (
        "create_followup",
        "select nightowls.create_thread('th'); select nightowls.create_followup('th', now())",
    ),
    ("create_org", "select nightowls.create_org('new')"),
    (
        "create_projection",
        r#"select nightowls.create_projection('more', 'order', '{"otherwise": [{"op": "add", "path": "n"}]}')"#,
    ),
    ("create_queue", "select nightowls.create_queue('more')"),
    (
        "create_snapshot",
        "select nightowls.create_snapshot('tally', 'a'), nightowls.create_snapshot('handled', 'a')",
    ),
    ("create_snapshots", "select nightowls.create_snapshots()"),
    ("create_thread", "select nightowls.create_thread('th')"),
    ("current_org", "select nightowls.current_org()"),
    ("delete", "select nightowls.delete('jobs', 4)"),
    ("delete_many", "select nightowls.delete_many('jobs', '{5}')"),
    ("dispatch", "select nightowls.dispatch()"),
    (
        "drop_compaction",
        "select nightowls.drop_compaction('order')",
    ),
    ("drop_consumer", "select nightowls.drop_consumer('d')"),
    ("drop_endpoint", "select nightowls.drop_endpoint('e2')"),
    ("drop_parked", "select nightowls.drop_parked('c')"),
    (
        "drop_projection",
        "select nightowls.drop_projection('more')",
    ),
    ("drop_queue", "select nightowls.drop_queue('more')"),
    (
        "embed",
        "do $$ begin perform nightowls.embed('docs', 'x'); exception when feature_not_supported or object_not_in_prerequisite_state then null; end $$",
    ),
    (
        "enqueue_request",
        "select nightowls.enqueue_request('e1', '{}')",
    ),
    (
        "enqueue_requests",
        "select nightowls.enqueue_requests('e1', array['{}', '{}']::jsonb[])",
    ),
    (
        "erase",
        "select nightowls.append_event('thing', 't', 'made'); select nightowls.erase('thing', 't', 'asked')",
    ),
    ("event_id_for", "select nightowls.event_id_for('a', 'b')"),
    (
        "extend",
        "select nightowls.extend('jobs', 6, '00000000-0000-4000-8000-000000000000')",
    ),
    (
        "extend_many",
        "select nightowls.extend_many('jobs', '{6}', array['00000000-0000-4000-8000-000000000000']::uuid[])",
    ),
    (
        "fail_event",
        "select nightowls.seek('c', 0); select nightowls.fail_event('c', min(position), 'x', max(fence)) from nightowls.fetch_events('c')",
    ),
    ("fetch_events", "select nightowls.fetch_events('c')"),
    (
        "finish_followup",
        "select nightowls.create_thread('th'); select nightowls.finish_followup(nightowls.create_followup('th', now()), gen_random_uuid())",
    ),
    (
        "fold_events",
        "select nightowls.fold_events('{}', e order by e.version) from nightowls.events e",
    ),
    (
        "fold_state",
        "select nightowls.fold_state('{}', null, '[]')",
    ),
    (
        "get_agent",
        "select nightowls.publish_agent_version('seer', '{}'); select nightowls.get_agent('seer')",
    ),
    (
        "get_config_value",
        "select nightowls.get_config_value('region')",
    ),
    (
        "heartbeat_floor",
        "select nightowls.heartbeat_floor('c', 'a', fence) from nightowls.floors",
    ),
    ("last_event", "select nightowls.last_event('order', 'a')"),
    ("leave_floor", "select nightowls.leave_floor('c', 'a', 1)"),
    (
        "list_agent_versions",
        "select nightowls.list_agent_versions('sage')",
    ),
    ("list_bindings", "select nightowls.list_bindings()"),
    (
        "list_embedding_sources",
        "select nightowls.list_embedding_sources()",
    ),
    ("list_messages", "select nightowls.list_messages('th')"),
    ("list_queues", "select nightowls.list_queues()"),
    ("list_run_events", "select nightowls.list_run_events('rv')"),
    (
        "load_run_snapshot",
        "select nightowls.load_run_snapshot('rv')",
    ),
    ("metrics", "select nightowls.metrics('jobs')"),
    (
        "metrics_all",
        "select count(*) from nightowls.metrics_all()",
    ),
    ("metrics_text", "select nightowls.metrics_text()"),
    (
        "nack",
        "select nightowls.nack('jobs', 6, '00000000-0000-4000-8000-000000000000')",
    ),
    (
        "nack_many",
        "select nightowls.nack_many('jobs', '{6}', array['00000000-0000-4000-8000-000000000000']::uuid[])",
    ),
    ("once", "select nightowls.once('mail', '1')"),
    (
        "park_event",
        "select nightowls.seek('c', 0); select nightowls.park_event('c', min(position), 'x', max(fence)) from nightowls.fetch_events('c')",
    ),
    ("pause_queue", "select nightowls.pause_queue('jobs')"),
    ("pop", "select nightowls.pop('jobs')"),
    ("pop_queue", "select nightowls.pop_queue('jobs')"),
    (
        "process",
        "select nightowls.process('jobs', 'public.handle', 9)",
    ),
    (
        "publish_agent_version",
        "select nightowls.publish_agent_version('sage', '{}')",
    ),
    ("purge_archive", "select nightowls.purge_archive('jobs')"),
    ("purge_queue", "select nightowls.purge_queue('jobs')"),
    ("read", "select nightowls.read('jobs')"),
    (
        "read_aggregate",
        "select nightowls.read_aggregate('order', 'a')",
    ),
    ("read_events", "select nightowls.read_events()"),
    (
        "read_with_poll",
        "select nightowls.read_with_poll('jobs', max_wait => '0')",
    ),
    (
        "rebuild_projection",
        "select nightowls.rebuild_projection('tally'), nightowls.rebuild_projection('handled')",
    ),
    ("recent_events", "select nightowls.recent_events()"),
    ("redact", "select nightowls.redact('{}')"),
    ("redrive", "select nightowls.redrive('jobs')"),
    (
        "redrive_requests",
        "select nightowls.redrive_requests('e1')",
    ),
    // Of a view it is REFRESH MATERIALIZED VIEW, which event triggers take for DDL: the one exception.
    (
        "refresh_projection",
        "select nightowls.refresh_projection('tally'), nightowls.refresh_projection('handled')",
    ),
    (
        "release_floor",
        "select nightowls.release_floor('c', 'a', fence) from nightowls.floors",
    ),
    ("remove_member", "select nightowls.remove_member('ann')"),
    (
        "renew_lease",
        "select nightowls.seek('c', 0); select nightowls.renew_lease('c', max(fence)) from nightowls.fetch_events('c')",
    ),
    ("replay", "select nightowls.replay('jobs')"),
    ("replay_parked", "select nightowls.replay_parked('c')"),
    ("request_floor", "select nightowls.request_floor('c', 'a')"),
    (
        "rescan_embeddings",
        "select nightowls.rescan_embeddings('docs', true)",
    ),
    (
        "restore_aggregate",
        "select nightowls.restore_aggregate('order', 'a')",
    ),
    ("resume_queue", "select nightowls.resume_queue('jobs')"),
    (
        "retry_embeddings",
        "select nightowls.retry_embeddings('docs')",
    ),
    (
        "rollback_agent_version",
        "select nightowls.publish_agent_version('owl', '{}'); select nightowls.rollback_agent_version('owl', 1)",
    ),
    (
        "run_backfill",
        "do $$ begin call nightowls.run_backfill(); exception when feature_not_supported or invalid_transaction_termination then null; end $$",
    ),
    ("run_dispatch", "call nightowls.run_dispatch()"),
    ("run_projections", "select nightowls.run_projections()"),
    ("run_tick", "call nightowls.run_tick()"),
    (
        "save_embedding",
        "select nightowls.save_embedding('docs', c.key, c.claim, '{1}') from nightowls.claim_embeddings('docs') c",
    ),
    (
        "save_run_snapshot",
        "select nightowls.start_run('rv'); select nightowls.save_run_snapshot('rv', '{}')",
    ),
    ("scan_for", "select nightowls.scan_for('nowhere')"),
    (
        "scratchpad_delete",
        "select nightowls.scratchpad_delete('s', 'k')",
    ),
    (
        "scratchpad_get",
        "select nightowls.scratchpad_get('s', 'k')",
    ),
    ("scratchpad_list", "select nightowls.scratchpad_list('s')"),
    (
        "scratchpad_put",
        "select nightowls.scratchpad_put('s', 'k', '1')",
    ),
    ("seek", "select nightowls.seek('c', 0)"),
    ("seek_time", "select nightowls.seek_time('c', now())"),
    ("send", "select nightowls.send('jobs', '1', priority => 3)"),
    (
        "send_batch",
        "select nightowls.send_batch('jobs', array['1', '2']::jsonb[], dedup_keys => '{a,b}', group_keys => '{c,d}')",
    ),
    ("send_topic", "select nightowls.send_topic('a.b', '1')"),
    (
        "set_compaction",
        "select nightowls.set_compaction('order', mode => 'delete')",
    ),
    (
        "set_config_value",
        "select nightowls.set_config_value('region', 'eu')",
    ),
    (
        "set_default_org",
        "select nightowls.set_default_org(nightowls.current_org())",
    ),
    (
        "set_redaction_rules",
        "select nightowls.set_redaction_rules('{}')",
    ),
    (
        "set_run_status",
        "select nightowls.start_run('rs'); select nightowls.set_run_status('rs', 'running')",
    ),
    (
        "set_snapshot_policy",
        "select nightowls.set_snapshot_policy('tally', 2), nightowls.set_snapshot_policy('handled', 2)",
    ),
    ("set_vt", "select nightowls.set_vt('jobs', 6, 0)"),
    ("slice_utf16", "select nightowls.slice_utf16('owl', 1)"),
    ("start_run", "select nightowls.start_run('ru')"),
    ("state", "select nightowls.state('tally', 'a')"),
    ("state_at", "select nightowls.state_at('tally', 'a', 1)"),
    (
        "state_at_time",
        "select nightowls.state_at_time('tally', 'a', 'now')",
    ),
    // Without a view to refresh.
    ("tick", "select nightowls.tick()"),
    ("unbind", "select nightowls.unbind('jobs')"),
    ("unbind_endpoint", "select nightowls.unbind_endpoint('e1')"),
    (
        "unbind_topic",
        "select nightowls.unbind_topic('a.*', 'jobs')",
    ),
    (
        "verify_projection",
        "select nightowls.verify_projection('tally')",
    ),
    (
        "verify_webhook",
        "select nightowls.verify_webhook('{}', '', 'whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=')",
    ),
    ("version", "select nightowls.version()"),
];

#[test]
fn nothing_that_the_service_may_call_runs_ddl() {
    on_each_route(|db| {
        default_org(db);
        let mut owner = db.owner();
        owner.exec(&format!(
            r#"select nightowls.create_projection('tally', 'order', '{{"otherwise": [{{"op": "add", "path": "n"}}]}}');
               create function public.handled(state jsonb, event nightowls.events) returns jsonb language sql return '{{}}'::jsonb;
               select nightowls.create_projection('handled', 'order', handler => 'public.handled');
               create table public.seen (version bigint); grant all on public.seen to {SERVICE};
               create function public.see(event nightowls.events) returns void language sql
               begin atomic insert into public.seen values ((event).version); end;
               select nightowls.create_table_projection('seen', 'order', 'public.seen', 'public.see');
               create function public.handle(message nightowls.queue_message) returns void language sql return null;
               create table public.docs (id int primary key, title text, embedding real[]); insert into public.docs values (1, 'x'), (2, 'y');
               select nightowls.create_embedding_source('docs', 'public.docs', 'id', 'title', 'embedding', null, 'small', 1);
               select nightowls.create_queue('jobs'); select nightowls.send('jobs', to_jsonb(i)) from generate_series(1, 9) i"#
        ));
        db.superuser().exec(
            "create function public.no_ddl() returns event_trigger language plpgsql as $$
             begin raise exception 'DDL: %', tg_tag using errcode = 'DD001'; end $$;
             create event trigger no_ddl on ddl_command_start execute function public.no_ddl()",
        );
        assert_eq!(
            db.superuser().refused("create table public.x ()").code,
            "DD001"
        );
        let mut service = db.service();
        let callable = lines(
            &mut service,
            "select distinct proname from pg_proc
              where pronamespace = 'nightowls'::regnamespace and proname not like '\\_%'
                and has_function_privilege(oid, 'execute') order by 1",
        );
        assert_eq!(
            callable,
            CALLS
                .iter()
                .map(|(name, _)| (*name).to_owned())
                .collect::<Vec<_>>(),
            "CALLS has one call of each function that the service may call"
        );
        for (name, sql) in CALLS {
            match service.try_exec(sql) {
                // Nothing sends requests here.
                Err(refusal) if name.ends_with("dispatch") => {
                    assert!(
                        ["0A000", "55000"].contains(&refusal.code.as_str()),
                        "{name}: {refusal}"
                    );
                }
                answer => answer.unwrap_or_else(|refusal| panic!("{sql}: {refusal}")),
            }
        }
        service.exec("insert into nightowls.events (aggregate_type, aggregate_id, event_type) values ('order', 'z', 'noted')");
        assert_eq!(
            text(
                &mut service,
                "select count(*) = (select count(*) from public.seen) from nightowls.events where aggregate_type = 'order'"
            ),
            "t"
        );
        db.superuser().exec("drop event trigger no_ddl");
    });
}

#[test]
fn row_security_off_gives_a_service_nothing_and_only_the_owner_a_restore() {
    on_each_install(|db| {
        default_org(db);
        db.owner().exec(
            r#"select nightowls.create_projection('tally', 'order', '{"otherwise": [{"op": "add", "path": "n"}]}')"#,
        );
        let mut service = db.service();
        service.exec("set row_security = off");
        let direct = "insert into nightowls.events (aggregate_type, aggregate_id, version, event_type) values ('order', 'a', 1, 'noted')";
        assert_eq!(service.refused(direct).code, "42501");
        // By a function it is an append like any other, or refused; never an event without its state.
        let _ = service.try_exec("select nightowls.append_event('order', 'a', 'noted')");
        service.exec("reset row_security");
        assert_eq!(
            text(
                &mut service,
                "select count(*) = (select count(*) from nightowls.projection_states) from nightowls.events"
            ),
            "t"
        );
        assert_eq!(
            service
                .refused("update nightowls._projection_states set state = null")
                .code,
            "42501"
        );
        // The owner, as a restore does: rows as they come, and the state is exact when asked for all the same.
        let mut owner = db.owner();
        owner.exec("set row_security = off");
        owner.exec("insert into nightowls.events (aggregate_type, aggregate_id, version, event_type) values ('order', 'r', 1, 'noted')");
        owner.exec("reset row_security");
        assert_eq!(
            text(&mut service, "select nightowls.state('tally', 'r')"),
            r#"{"n": 1}"#
        );
    });
}
