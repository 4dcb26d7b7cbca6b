//! The wall: every relation and every function against everybody who may come, from the catalog, so that what is new
//! without a line here fails.

use crate::fixture::{as_user, joined, lines, together};
use crate::members::two_orgs;
use crate::support::{
    Db, MEMBER, Route, SERVICE, STRANGER, Session, on_each_install, on_each_route, pooler_or_skip,
    quote,
};

/// Who comes: a name, the role of the connection (none: the install's owner) and the user id.
const WHO: [(&str, Option<&str>, &str); 8] = [
    ("owner", None, ""),
    ("service", Some(SERVICE), ""),
    ("admin", Some(MEMBER), "admin"),
    ("member", Some(MEMBER), "member"),
    ("viewer", Some(MEMBER), "viewer"),
    ("foreign", Some(MEMBER), "foreign"),
    ("nobody", Some(MEMBER), "nobody"),
    ("anon", Some(STRANGER), "member"),
];

/// What each of [`WHO`] may do with each relation: select, insert, update, delete, one letter each.
/// For select `b` sees the rows of both orgs, `o` those of the first, `f` those of the other (where the foreign member is at
/// home), `n` none, `*` what belongs to no org. For the others `y` is let through, `g` refused by a guard, whoever asks
/// (NW008, NW004, 55000), `v` not possible with such a view. `-` is no right (42501).
const RELATIONS: &[(&str, &str)] = &[
    ("_append_targets", "byyy ---- ---- ---- ---- ---- ---- ----"),
    ("_config_secrets", "byyy ---- ---- ---- ---- ---- ---- ----"),
    (
        "_consumer_failures",
        "byyy b--- ---- ---- ---- ---- ---- ----",
    ),
    (
        "_consumer_offsets",
        "byyy b--- ---- ---- ---- ---- ---- ----",
    ),
    (
        "_embedding_marks",
        "byyy b--- ---- ---- ---- ---- ---- ----",
    ),
    (
        "_embedding_pending",
        "byyy b--- ---- ---- ---- ---- ---- ----",
    ),
    (
        "_embedding_requests",
        "byyy b--- ---- ---- ---- ---- ---- ----",
    ),
    (
        "_embedding_states",
        "byyy b--- ---- ---- ---- ---- ---- ----",
    ),
    (
        "_endpoint_secrets",
        "byyy ---- ---- ---- ---- ---- ---- ----",
    ),
    (
        "_endpoint_states",
        "byyy b--- ---- ---- ---- ---- ---- ----",
    ),
    ("_mastra_roles", "byyy ---- ---- ---- ---- ---- ---- ----"),
    ("_net_requests", "byyy ---- ---- ---- ---- ---- ---- ----"),
    (
        "_projection_states",
        "bggg b--- ---- ---- ---- ---- ---- ----",
    ),
    ("_queue_counts", "byyy b--- ---- ---- ---- ---- ---- ----"),
    ("_replays", "bggg b--- ---- ---- ---- ---- ---- ----"),
    ("_samples", "byyy b--- ---- ---- ---- ---- ---- ----"),
    ("_sweeps", "byyy b--- ---- ---- ---- ---- ---- ----"),
    ("agent_versions", "bggg bgg- ---- ---- ---- ---- ---- ----"),
    ("agents", "bggg bgg- ---- ---- ---- ---- ---- ----"),
    ("all_events", "bggg bggg -ggg -ggg -ggg -ggg -ggg ----"),
    ("app_config", "byyy b--- ---- ---- ---- ---- ---- ----"),
    ("audit_log", "bggg b--- ---- ---- ---- ---- ---- ----"),
    ("clock_parts", "*yyy *--- ---- ---- ---- ---- ---- ----"),
    (
        "compaction_policies",
        "byyy b--- ---- ---- ---- ---- ---- ----",
    ),
    ("compactions", "byyy b--- ---- ---- ---- ---- ---- ----"),
    ("consumer_lag", "nggg nggg -ggg -ggg -ggg -ggg -ggg ----"),
    ("consumers", "byyy b--- ---- ---- ---- ---- ---- ----"),
    ("dispatch_status", "nggg nggg -ggg -ggg -ggg -ggg -ggg ----"),
    (
        "embedding_chunks",
        "byyy b--- ---- ---- ---- ---- ---- ----",
    ),
    (
        "embedding_sources",
        "byyy b--- ---- ---- ---- ---- ---- ----",
    ),
    ("endpoints", "byyy b--- ---- ---- ---- ---- ---- ----"),
    ("events", "bygg by-- ---- ---- ---- ---- ---- ----"),
    ("events_archive", "bggg b--- ---- ---- ---- ---- ---- ----"),
    (
        "failed_embeddings",
        "nyyy n--- ---- ---- ---- ---- ---- ----",
    ),
    ("floor_marks", "byyy b--- ---- ---- ---- ---- ---- ----"),
    ("floor_status", "bggg bggg -ggg -ggg -ggg -ggg -ggg ----"),
    ("floor_tickets", "byyy b--- ---- ---- ---- ---- ---- ----"),
    ("floors", "byyy b--- ---- ---- ---- ---- ---- ----"),
    ("followups", "byyy b--- ---- ---- ---- ---- ---- ----"),
    ("health", "*ggg *ggg -ggg -ggg -ggg -ggg -ggg ----"),
    ("imports", "byyy b--- ---- ---- ---- ---- ---- ----"),
    (
        "mastra_agent_versions",
        "byyy oyyy ---- ---- ---- ---- ---- ----",
    ),
    ("mastra_agents", "byyy oyyy ---- ---- ---- ---- ---- ----"),
    ("mastra_ai_spans", "byyy oyyy ---- ---- ---- ---- ---- ----"),
    (
        "mastra_background_tasks",
        "byyy oyyy ---- ---- ---- ---- ---- ----",
    ),
    (
        "mastra_channel_config",
        "byyy oyyy ---- ---- ---- ---- ---- ----",
    ),
    (
        "mastra_channel_installations",
        "byyy oyyy ---- ---- ---- ---- ---- ----",
    ),
    (
        "mastra_dataset_items",
        "byyy oyyy ---- ---- ---- ---- ---- ----",
    ),
    (
        "mastra_dataset_versions",
        "byyy oyyy ---- ---- ---- ---- ---- ----",
    ),
    ("mastra_datasets", "byyy oyyy ---- ---- ---- ---- ---- ----"),
    (
        "mastra_experiment_results",
        "byyy oyyy ---- ---- ---- ---- ---- ----",
    ),
    (
        "mastra_experiments",
        "byyy oyyy ---- ---- ---- ---- ---- ----",
    ),
    (
        "mastra_favorites",
        "byyy oyyy ---- ---- ---- ---- ---- ----",
    ),
    (
        "mastra_knowledge_activity",
        "byyy oyyy ---- ---- ---- ---- ---- ----",
    ),
    (
        "mastra_knowledge_cursors",
        "byyy oyyy ---- ---- ---- ---- ---- ----",
    ),
    (
        "mastra_knowledge_mentions",
        "byyy oyyy ---- ---- ---- ---- ---- ----",
    ),
    (
        "mastra_knowledge_nodes",
        "byyy oyyy ---- ---- ---- ---- ---- ----",
    ),
    (
        "mastra_knowledge_records",
        "byyy oyyy ---- ---- ---- ---- ---- ----",
    ),
    (
        "mastra_knowledge_semantic_outbox",
        "byyy oyyy ---- ---- ---- ---- ---- ----",
    ),
    (
        "mastra_mcp_client_versions",
        "byyy oyyy ---- ---- ---- ---- ---- ----",
    ),
    (
        "mastra_mcp_clients",
        "byyy oyyy ---- ---- ---- ---- ---- ----",
    ),
    (
        "mastra_mcp_server_versions",
        "byyy oyyy ---- ---- ---- ---- ---- ----",
    ),
    (
        "mastra_mcp_servers",
        "byyy oyyy ---- ---- ---- ---- ---- ----",
    ),
    ("mastra_messages", "byyy oyyy ---- ---- ---- ---- ---- ----"),
    (
        "mastra_notifications",
        "byyy oyyy ---- ---- ---- ---- ---- ----",
    ),
    (
        "mastra_observational_memory",
        "byyy oyyy ---- ---- ---- ---- ---- ----",
    ),
    (
        "mastra_prompt_block_versions",
        "byyy oyyy ---- ---- ---- ---- ---- ----",
    ),
    (
        "mastra_prompt_blocks",
        "byyy oyyy ---- ---- ---- ---- ---- ----",
    ),
    (
        "mastra_resources",
        "byyy oyyy ---- ---- ---- ---- ---- ----",
    ),
    (
        "mastra_schedule_triggers",
        "byyy oyyy ---- ---- ---- ---- ---- ----",
    ),
    (
        "mastra_schedules",
        "byyy oyyy ---- ---- ---- ---- ---- ----",
    ),
    (
        "mastra_scorer_definition_versions",
        "byyy oyyy ---- ---- ---- ---- ---- ----",
    ),
    (
        "mastra_scorer_definitions",
        "byyy oyyy ---- ---- ---- ---- ---- ----",
    ),
    ("mastra_scorers", "byyy oyyy ---- ---- ---- ---- ---- ----"),
    (
        "mastra_skill_blobs",
        "byyy oyyy ---- ---- ---- ---- ---- ----",
    ),
    (
        "mastra_skill_versions",
        "byyy oyyy ---- ---- ---- ---- ---- ----",
    ),
    ("mastra_skills", "byyy oyyy ---- ---- ---- ---- ---- ----"),
    (
        "mastra_thread_state",
        "byyy oyyy ---- ---- ---- ---- ---- ----",
    ),
    ("mastra_threads", "byyy oyyy ---- ---- ---- ---- ---- ----"),
    (
        "mastra_tool_provider_connections",
        "byyy oyyy ---- ---- ---- ---- ---- ----",
    ),
    (
        "mastra_workflow_definitions",
        "byyy oyyy ---- ---- ---- ---- ---- ----",
    ),
    (
        "mastra_workflow_snapshot",
        "byyy oyyy ---- ---- ---- ---- ---- ----",
    ),
    (
        "mastra_workspace_versions",
        "byyy oyyy ---- ---- ---- ---- ---- ----",
    ),
    (
        "mastra_workspaces",
        "byyy oyyy ---- ---- ---- ---- ---- ----",
    ),
    ("messages", "byyy b--- o--- o--- o--- f--- n--- ----"),
    ("my_messages", "nggg -ggg oggg oggg oggg fggg nggg ----"),
    ("my_run_events", "nggg -ggg oggg oggg oggg fggg nggg ----"),
    ("my_runs", "nggg -ggg oggg oggg oggg fggg nggg ----"),
    ("my_threads", "nggg -ggg oggg oggg oggg fggg nggg ----"),
    ("once_keys", "byyy b--- ---- ---- ---- ---- ---- ----"),
    ("org_members", "byyg byyg o--- o--- o--- f--- n--- ----"),
    ("orgs", "byyy byyy o--- o--- o--- f--- n--- ----"),
    ("parked_events", "bggg bggg -ggg -ggg -ggg -ggg -ggg ----"),
    ("progress", "bggg bggg -ggg -ggg -ggg -ggg -ggg ----"),
    (
        "projection_states",
        "bggg b--- ---- ---- ---- ---- ---- ----",
    ),
    ("projections", "byyy b--- ---- ---- ---- ---- ---- ----"),
    (
        "published_changes",
        "byyy b--- ---- ---- ---- ---- ---- ----",
    ),
    ("queue_archive", "byyy b--- ---- ---- ---- ---- ---- ----"),
    ("queue_bindings", "byyy b--- ---- ---- ---- ---- ---- ----"),
    ("queue_dedup", "byyy b--- ---- ---- ---- ---- ---- ----"),
    ("queue_due_marks", "byyy b--- ---- ---- ---- ---- ---- ----"),
    ("queue_marks", "byyy b--- ---- ---- ---- ---- ---- ----"),
    ("queue_messages", "byyy b--- ---- ---- ---- ---- ---- ----"),
    ("queue_metrics", "bggg bggg -ggg -ggg -ggg -ggg -ggg ----"),
    ("queues", "byyy b--- ---- ---- ---- ---- ---- ----"),
    ("redaction_rules", "byyy b--- ---- ---- ---- ---- ---- ----"),
    ("requests", "nggg nggg -ggg -ggg -ggg -ggg -ggg ----"),
    ("responses", "byyy b--- ---- ---- ---- ---- ---- ----"),
    ("routes", "byyy b--- ---- ---- ---- ---- ---- ----"),
    ("run_snapshots", "byyy b--- ---- ---- ---- ---- ---- ----"),
    ("runs", "byyy b--- o--- o--- o--- f--- n--- ----"),
    ("scratchpad", "byyy b--- ---- ---- ---- ---- ---- ----"),
    (
        "scratchpad_marks",
        "byyy b--- ---- ---- ---- ---- ---- ----",
    ),
    ("settings", "*yyy *yyy ---- ---- ---- ---- ---- ----"),
    ("snapshots", "bggg b--- ---- ---- ---- ---- ---- ----"),
    ("streams", "byyy b--- ---- ---- ---- ---- ---- ----"),
    ("threads", "byyy b--- o--- o--- o--- f--- n--- ----"),
    ("topic_bindings", "byyy b--- ---- ---- ---- ---- ---- ----"),
    ("vector_indexes", "byyy b--- ---- ---- ---- ---- ---- ----"),
];

/// The columns that members may read, where it is not all of them or none.
const COLUMNS: &[(&str, &str)] = &[
    (
        "messages",
        "org_id thread_id seq message_id role author_type author_id run_id created_at",
    ),
    (
        "runs",
        "org_id run_id thread_id parent_run_id agent agent_version resource_id status created_at updated_at started_at finished_at",
    ),
    ("threads", "org_id thread_id resource_id created_at"),
];

/// What members may call; the service may call all but the owner's, anon nothing. The call is for the org `$`.
/// Who of [`WHO`] gets an answer for the first org, who for the other: `y`, or `-` for no right (42501).
const CALLS: &[(&str, &str, &str, &str)] = &[
    (
        "add_member",
        "select nightowls.add_member('new', org => $)",
        "yyy-----",
        "yy---y--",
    ),
    (
        "append_message",
        "select nightowls.append_message('t', '{}', org => $)",
        "yyyy----",
        "yy---y--",
    ),
    (
        "change_member",
        "select nightowls.change_member('theirs', 'viewer', $)",
        "yyy-----",
        "yy---y--",
    ),
    (
        "current_org",
        "select nightowls.current_org($)",
        "yyyyy---",
        "yy---y--",
    ),
    (
        "get_config_value",
        "select nightowls.get_config_value('region', $)",
        "yyyyy---",
        "yy---y--",
    ),
    (
        "list_messages",
        "select nightowls.list_messages('t', org => $)",
        "yyyyy---",
        "yy---y--",
    ),
    (
        "list_run_events",
        "select nightowls.list_run_events('r', org => $)",
        "yyyyy---",
        "yy---y--",
    ),
    (
        "remove_member",
        "select nightowls.remove_member('nobody at all', $)",
        "yyy-----",
        "yy---y--",
    ),
    (
        "version",
        "select nightowls.version()",
        "yyyyyyy-",
        "yyyyyyy-",
    ),
];

/// One row of each org in every table that has an org, whatever the functions would make of it.
fn fill(db: &Db) -> (String, String) {
    let (org, other) = two_orgs(db);
    prepare_calls(db, &org, &other);
    db.superuser().exec(&format!(
        r#"do $body$
           declare
             v_table record;
             v_org   uuid;
           begin
             set local session_replication_role = replica;
             for v_table in
               select c.oid, c.oid::regclass as name,
                      string_agg(quote_ident(a.attname), ', ' order by a.attnum) as columns,
                      string_agg(case
                        when a.attname = 'org_id' then '$1'
                        when t.typname = 'uuid' then 'gen_random_uuid()'
                        when t.typname = 'bytea' then '''x'''
                        when t.typname in ('json', 'jsonb') then '''{{}}'''
                        when t.typname = 'char' then '''r'''
                        when t.typcategory = 'S' and c.relname ~ '^mastra_' then '$1::text' -- Their keys are all orgs'.
                        when t.typcategory = 'S' then '''x'''
                        when t.typcategory = 'N' then '77'
                        when t.typcategory = 'B' then 'false'
                        when t.typcategory = 'D' then 'now()'
                        when t.typcategory = 'T' then '''1 second'''
                        when t.typcategory = 'A' then '''{{}}'''
                        else 'null' end, ', ' order by a.attnum) as values
                 from pg_class c
                 join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped and a.attgenerated = ''
                 join pg_type t on t.oid = a.atttypid
                where c.relnamespace = 'nightowls'::regnamespace and c.relkind = 'r' and c.relname <> 'orgs'
                  and exists (select from pg_attribute o where o.attrelid = c.oid and o.attname = 'org_id')
                group by c.oid
             loop
               execute (select coalesce(string_agg(format('alter table %s drop constraint %I', v_table.name, k.conname), ';'), 'select 1')
                          from pg_constraint k where k.conrelid = v_table.oid and k.contype = 'c');
               foreach v_org in array '{{{org},{other}}}'::uuid[] loop
                 execute format('insert into %s (%s) overriding system value values (%s) on conflict do nothing', v_table.name, v_table.columns, v_table.values)
                   using v_org;
               end loop;
             end loop;
           end $body$"#
    ));
    (org, other)
}

/// What the calls are about, in both orgs.
fn prepare_calls(db: &Db, org: &str, other: &str) {
    db.service().exec(&format!(
        "select nightowls.add_member('theirs', 'viewer', o), nightowls.create_thread('t', org => o),
                nightowls.start_run('r', 't', org => o), nightowls.append_message('t', '\"hi\"', org => o)
           from unnest('{{{org},{other}}}'::uuid[]) o;
         select nightowls.tick()"
    ));
}

fn open(db: &Db, role: Option<&str>) -> Session {
    db.session(role.unwrap_or_else(|| db.install().owner()))
}

/// What comes of `sql` in a transaction that is then undone.
fn attempt(session: &mut Session, user: &str, sql: &str) -> Result<Vec<String>, String> {
    session.exec(&format!(
        "begin; select set_config('nightowls.user_id', {}, true)",
        quote(user)
    ));
    let answer = session.try_rows(sql).map(joined);
    session.exec("rollback");
    answer.map_err(|refusal| refusal.code)
}

fn change(answer: &Result<Vec<String>, String>) -> char {
    match answer.as_ref().map_err(String::as_str) {
        Err("42501") => '-',
        Err("NW008" | "NW004" | "55000") => 'g',
        Err("42809") => 'v',
        // Let through as far as rights go, even where the row itself will not do.
        _ => 'y',
    }
}

fn sight(answer: Result<Vec<String>, String>, org: &str, other: &str) -> char {
    match answer {
        Err(code) if code == "42501" => '-',
        Err(code) => panic!("a select ends in {code}"),
        Ok(rows) => match (
            rows.iter().any(|row| row == org),
            rows.iter().any(|row| row == other),
        ) {
            (true, true) => 'b',
            (true, false) => 'o',
            (false, true) => 'f',
            (false, false) if rows.iter().any(|row| row == "no org") => '*',
            (false, false) => 'n',
        },
    }
}

#[test]
fn everybody_sees_and_changes_exactly_what_the_table_says() {
    on_each_route(|db| {
        let (org, other) = fill(db);
        let relations = db.superuser().rows(
            "select c.relname,
                    coalesce((select quote_ident(a.attname) || '::text' from pg_attribute a where a.attrelid = c.oid and a.attname = 'org_id'), '''no org'''),
                    (select quote_ident(a.attname) from pg_attribute a where a.attrelid = c.oid and a.attnum > 0 order by a.attname <> 'org_id', a.attnum limit 1)
               from pg_class c
              where c.relnamespace = 'nightowls'::regnamespace and c.relkind in ('r', 'p', 'v', 'm') order by 1",
        );
        let mut sessions: Vec<_> = WHO
            .iter()
            .map(|(_, role, user)| (open(db, *role), *user))
            .collect();
        let mut got = Vec::new();
        for row in relations {
            let [name, org_column, column] = row
                .into_iter()
                .map(|text| text.expect("not null"))
                .collect::<Vec<_>>()
                .try_into()
                .expect("three columns");
            let cells: Vec<String> = sessions
                .iter_mut()
                .map(|(session, user)| {
                    let mut run = |sql: &str| attempt(session, user, sql);
                    let seen = run(&format!(
                        "select distinct {org_column} from nightowls.{name}"
                    ));
                    let changes = [
                        format!("insert into nightowls.{name} default values"),
                        format!("update nightowls.{name} set {column} = {column}"),
                        format!("delete from nightowls.{name}"),
                    ];
                    let mut cell = String::from(sight(seen, &org, &other));
                    // What may be changed depends on no route; what is seen might, where a pooler mixes the sessions.
                    if db.route() == Route::Direct {
                        cell.extend(changes.iter().map(|sql| change(&run(sql))));
                    }
                    cell
                })
                .collect();
            got.push((name, cells.join(" ")));
        }
        if db.route() != Route::Direct {
            let expected: Vec<_> = RELATIONS
                .iter()
                .map(|(name, cells)| {
                    let seen = cells.split(' ').map(|cell| &cell[..1]);
                    ((*name).to_owned(), seen.collect::<Vec<_>>().join(" "))
                })
                .collect();
            assert_eq!(got, expected);
            return;
        }
        let got: Vec<_> = got
            .iter()
            .map(|(name, cells)| (name.as_str(), cells.as_str()))
            .collect();
        let listing: String = got.iter().map(|line| format!("    {line:?},\n")).collect();
        assert!(got == RELATIONS, "as it is:\n{listing}");
    });
}

#[test]
fn members_read_no_column_but_those_that_are_listed() {
    on_each_install(|db| {
        let got = lines(
            &mut db.superuser(),
            &format!(
                "select c.relname, string_agg(a.attname, ' ' order by a.attnum)
                   from pg_class c join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
                  where c.relnamespace = 'nightowls'::regnamespace and c.relkind in ('r', 'p', 'v', 'm')
                    and has_column_privilege('{MEMBER}', c.oid, a.attnum, 'select')
                  group by c.oid, c.relname
                 having count(*) <> (select count(*) from pg_attribute x where x.attrelid = c.oid and x.attnum > 0 and not x.attisdropped)
                  order by 1"
            ),
        );
        let expected: Vec<_> = COLUMNS
            .iter()
            .map(|(relation, columns)| format!("{relation} {columns}"))
            .collect();
        assert_eq!(got, expected);
    });
}

#[test]
fn everybody_may_call_exactly_what_the_table_says() {
    on_each_route(|db| {
        let callable = |role: &str| {
            lines(
                &mut db.superuser(),
                &format!(
                    "select distinct proname from pg_proc
                      where pronamespace = 'nightowls'::regnamespace and has_function_privilege('{role}', oid, 'execute') order by 1"
                ),
            )
        };
        assert_eq!(callable(STRANGER), Vec::<String>::new());
        let public: Vec<_> = callable(MEMBER)
            .into_iter()
            .filter(|name| !name.starts_with('_'))
            .collect();
        assert_eq!(
            public,
            CALLS.iter().map(|(name, ..)| *name).collect::<Vec<_>>(),
            "CALLS has a call of each function that members may call"
        );
        let service = callable(SERVICE);
        for name in callable(MEMBER) {
            assert!(
                service.contains(&name),
                "a member may call more than the service: {name}"
            );
        }

        let (org, other) = two_orgs(db);
        prepare_calls(db, &org, &other);
        let mut sessions: Vec<_> = WHO
            .iter()
            .map(|(_, role, user)| (open(db, *role), *user))
            .collect();
        let mut got = String::new();
        for (name, call, ..) in CALLS {
            let answers = [&org, &other].map(|org| {
                let sql = call.replace('$', &format!("'{org}'"));
                sessions
                    .iter_mut()
                    .map(|(session, user)| match attempt(session, user, &sql) {
                        Ok(_) => 'y',
                        Err(code) if code == "42501" => '-',
                        Err(code) => panic!("{sql}: {code}"),
                    })
                    .collect::<String>()
            });
            got += &format!(
                "    {:?},\n",
                (name, call, answers[0].as_str(), answers[1].as_str())
            );
        }
        let expected: String = CALLS
            .iter()
            .map(|call| format!("    {call:?},\n"))
            .collect();
        assert!(got == expected, "as it is:\n{got}");
    });
}

#[test]
fn private_functions_tell_a_member_nothing_of_another_org() {
    // Each as a call for the other org: refused, or without a row or a true.
    on_each_install(|db| {
        let (org, other) = two_orgs(db);
        prepare_calls(db, &org, &other);
        let mut member = db.session(MEMBER);
        let calls = db.superuser().rows(&format!(
            "select p.proname, format('select t::text from nightowls.%I(%s) t', p.proname,
                    (select string_agg(coalesce(case when t = 'uuid'::regtype then quote_literal('{other}') when t = 'text'::regtype then '''x''' end, 'null')
                                       || '::' || format_type(t, null), ', ' order by n)
                       from unnest(p.proargtypes) with ordinality a (t, n)))
               from pg_proc p
              where p.pronamespace = 'nightowls'::regnamespace and p.proname like '\\_%' and has_function_privilege('{MEMBER}', p.oid, 'execute')
              order by 1"
        ));
        assert!(calls.len() > 4, "{calls:?}");
        for call in calls {
            let (name, sql) = (call[0].clone().unwrap(), call[1].clone().unwrap());
            let answer = attempt(&mut member, "member", &sql);
            let harmless = match name.as_str() {
                // They say who the caller is and where it is at home.
                "_user_id" | "_member_orgs" => !format!("{answer:?}").contains(&other),
                // It resolves; authorising is current_org()'s.
                "_resolve_org" => true,
                _ => match &answer {
                    Ok(rows) => rows
                        .iter()
                        .all(|row| ["f", "false", "null"].contains(&row.as_str())),
                    Err(code) => ["42501", "NW010", "22004"].contains(&code.as_str()),
                },
            };
            assert!(harmless, "{sql}: {answer:?}");
        }
    });
}

/// The relations with an org that members may read.
#[track_caller]
fn readable(db: &Db) -> Vec<String> {
    let relations = lines(
        &mut db.superuser(),
        &format!(
            "select c.relname from pg_class c join pg_attribute a on a.attrelid = c.oid and a.attname = 'org_id'
              where c.relnamespace = 'nightowls'::regnamespace and c.relkind in ('r', 'v', 'm')
                and has_column_privilege('{MEMBER}', c.oid, a.attnum, 'select') order by 1"
        ),
    );
    assert!(relations.len() >= 2, "{relations:?}");
    relations
}

#[test]
fn orgs_interleaved_on_one_server_connection_see_nothing_of_each_other() {
    if !pooler_or_skip() {
        return;
    }
    on_each_install(|db| {
        let (org, other) = fill(db);
        let relations = readable(db);
        let pids = together(
            6,
            |_| db.pooled_by(1, MEMBER),
            |nth, mut session| {
                let (user, own) = if nth % 2 == 0 {
                    ("member", &org)
                } else {
                    ("foreign", &other)
                };
                let mut pids = Vec::new();
                for round in 0..40 {
                    let relation = &relations[(round + nth) % relations.len()];
                    let sql = format!("select distinct org_id from nightowls.{relation}");
                    let seen = as_user(&mut session, user, &sql).unwrap();
                    assert_eq!(&seen, std::slice::from_ref(own), "{user} in {relation}");
                    // Whoever forgets to say who asks is nobody, whoever was there before.
                    assert_eq!(
                        lines(&mut session, &sql),
                        Vec::<String>::new(),
                        "{relation}"
                    );
                    pids.push(session.pid());
                }
                pids
            },
        );
        let mut pids = pids.concat();
        pids.sort_unstable();
        pids.dedup();
        assert_eq!(pids.len(), 1, "one server connection for all");
    });
}

#[test]
fn names_of_the_callers_making_change_nothing_for_members() {
    on_each_install(|db| {
        let (org, _) = fill(db);
        let relations = readable(db);
        db.superuser().exec(&format!(
            "grant temporary on database {} to public; grant create on schema public to {MEMBER}",
            db.name()
        ));
        let mut member = db.session(MEMBER);
        member.exec(
            "create function public.yes(uuid, uuid) returns boolean language sql immutable return true;
             create function public.yes(text, text) returns boolean language sql immutable return true;
             create operator public.= (leftarg = uuid, rightarg = uuid, function = public.yes);
             create operator public.= (leftarg = text, rightarg = text, function = public.yes);
             create function public.current_setting(text, boolean) returns text language sql return 'foreign';
             create function public.has_function_privilege(regprocedure, text) returns boolean language sql return true;
             create function public._is_service() returns boolean language sql return true;
             create function pg_temp._is_service() returns boolean language sql return true;
             create temp table org_members (org_id uuid, user_id text, role text);
             create temp table orgs (org_id uuid, name text);
             insert into org_members select gen_random_uuid(), 'member', 'owner';
             -- It would be shown every row, if the planner let it look before the policy.
             create function public.peek(org uuid) returns boolean language plpgsql cost 0.0000001 as $$
             begin perform pg_catalog.set_config('peek.seen', concat(pg_catalog.current_setting('peek.seen', true), org), false); return true; end $$;
             set search_path = public, pg_temp, pg_catalog",
        );
        let mut ask = |sql: &str| {
            member.exec("begin; select pg_catalog.set_config('nightowls.user_id', 'member', true)");
            let answer = member.try_rows(sql);
            member.exec("commit");
            answer.map(joined).map_err(|refusal| refusal.code)
        };
        for relation in relations {
            let sql = format!(
                "select distinct org_id::text from nightowls.{relation} where public.peek(org_id)"
            );
            assert_eq!(ask(&sql), Ok(vec![org.clone()]), "{relation}");
        }
        for call in [
            "nightowls.add_member('intruder', 'owner')",
            "nightowls.change_member('member', 'owner')",
        ] {
            assert_eq!(
                ask(&format!("select {call}")),
                Err("42501".to_owned()),
                "{call}"
            );
        }
        let peeked = ask("select pg_catalog.current_setting('peek.seen', true)").unwrap();
        assert!(peeked[0].contains(&org));
        assert!(
            !peeked[0].replace(&org, "").contains('-'),
            "a row of another org was shown to a function of the caller's"
        );
    });
}

#[test]
fn no_table_that_services_are_fast_on_has_a_policy_for_members() {
    // A second policy is one more question in every statement of a service's.
    on_each_install(|db| {
        assert_eq!(
            lines(
                &mut db.superuser(),
                "select c.relname, p.polname, p.polcmd from pg_policy p join pg_class c on c.oid = p.polrelid
                  where c.relnamespace = 'nightowls'::regnamespace and p.polname not in ('service_all', 'own_org') order by 1"
            ),
            [
                "messages member_read r",
                "org_members member_read r",
                "orgs member_read r",
                "runs member_read r",
                "threads member_read r",
            ]
        );
    });
}
