//! What an install leaves in the catalog: the rules that every object keeps,
//! and that both installs make the same.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use nightowls::install::{FILES, Scope};
use nightowls::migration::UPGRADES;

use crate::support::{Db, Install, on_each_install, on_install, server};

/// What the extension has and the migrations have not, each for a reason.
const ONLY_IN_THE_EXTENSION: &[&str] = &[
    // They hand out the migrations themselves.
    "migration_files",
];

/// Run once an event or append, where setting a path would cost as much as what
/// they do: private, with the caller's rights. Whoever calls the first two has
/// pinned its own; the triggers name nothing that is not qualified. Nor does a
/// procedure that commits, which it could not do with a path of its own.
const UNPINNED: &str = "'_fold_step', '_fold_row', '_hold_again', '_hold_line_again', '_project_one', '_before_insert', '_after_insert', '_refuse_state_write', '_nap_without_snapshot', 'acquire_floor', 'run_backfill', 'run_tick', 'run_dispatch'";

/// They have the mark in their search_path that lets their inserts pass the triggers.
const APPENDING: &str =
    "'_append_one', '_append_batch', '_append_list', '_import_rows', '_put_back'";

/// Asserts that the rule `sql` asks for has no exception: each row is one.
#[track_caller]
fn no_exception(db: &Db, rule: &str, sql: &str) {
    let exceptions: Vec<String> = db
        .superuser()
        .rows(sql)
        .into_iter()
        .map(|row| row.into_iter().flatten().collect::<Vec<_>>().join(" "))
        .collect();
    assert!(
        exceptions.is_empty(),
        "{}: {rule}:\n  {}",
        db.install(),
        exceptions.join("\n  ")
    );
}

#[test]
fn every_public_object_has_a_comment() {
    on_each_install(|db| {
        no_exception(
            db,
            "no comment",
            r"select 'schema', n.nspname
                from pg_namespace n
               where n.nspname = 'nightowls' and obj_description(n.oid, 'pg_namespace') is null
               union all
              select 'relation', c.oid::regclass::text
                from pg_class c
               where c.relnamespace = 'nightowls'::regnamespace
                 and c.relkind in ('r', 'p', 'v', 'm', 'f')
                 and c.relname !~ '^_'
                 and obj_description(c.oid, 'pg_class') is null
               union all
              select 'type', t.oid::regtype::text
                from pg_type t left join pg_class c on c.oid = t.typrelid
               where t.typnamespace = 'nightowls'::regnamespace
                 and t.typname !~ '^_'
                 and (c.relkind = 'c' or t.typrelid = 0)
                 and obj_description(t.oid, 'pg_type') is null
               union all
              select 'column', a.attrelid::regclass || '.' || a.attname
                from pg_class c join pg_attribute a on a.attrelid = c.oid
               where c.relnamespace = 'nightowls'::regnamespace
                 and c.relkind in ('r', 'p', 'v', 'm', 'f')
                 and c.relname !~ '^_'
                 -- The package's own, which says nothing of them either.
                 and (c.relname !~ '^mastra_' or a.attname = 'org_id')
                 and a.attnum > 0 and not a.attisdropped
                 and col_description(a.attrelid, a.attnum) is null
               union all
              select 'function', p.oid::regprocedure::text
                from pg_proc p
               where p.pronamespace = 'nightowls'::regnamespace
                 and p.proname !~ '^_'
                 and obj_description(p.oid, 'pg_proc') is null
               order by 1, 2",
        );
    });
}

#[test]
fn nothing_is_granted_to_public() {
    on_each_install(|db| {
        no_exception(
            db,
            "granted to public",
            r"select 'schema', n.nspname, a.privilege_type
                from pg_namespace n cross join lateral aclexplode(n.nspacl) a
               where n.nspname = 'nightowls' and a.grantee = 0
               union all
              select 'relation', c.oid::regclass::text, a.privilege_type
                from pg_class c cross join lateral aclexplode(c.relacl) a
               where c.relnamespace = 'nightowls'::regnamespace and a.grantee = 0
               union all
              select 'column', t.attrelid::regclass || '.' || t.attname, a.privilege_type
                from pg_class c
                join pg_attribute t on t.attrelid = c.oid
               cross join lateral aclexplode(t.attacl) a
               where c.relnamespace = 'nightowls'::regnamespace and a.grantee = 0
               union all
              select 'function', p.oid::regprocedure::text, a.privilege_type
                from pg_proc p
               cross join lateral aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
               where p.pronamespace = 'nightowls'::regnamespace and a.grantee = 0
               order by 1, 2, 3",
        );
    });
}

#[test]
fn every_function_sees_only_what_its_author_meant() {
    on_each_install(|db| {
        no_exception(
            db,
            "search_path is not pinned",
            &format!(
                r"select p.oid::regprocedure::text
                from pg_proc p join pg_language l on l.oid = p.prolang
               where p.pronamespace = 'nightowls'::regnamespace
                 and (l.lanname = 'plpgsql' or p.prosecdef or l.lanname = 'sql' and p.prosqlbody is null)
                 and not coalesce('search_path=pg_catalog, pg_temp' = any (p.proconfig)
                                  or 'search_path=pg_catalog, pg_temp, pg_append' = any (p.proconfig)
                                     and p.proname in ({APPENDING}), false)
                 and (p.prosecdef or p.proname not in ({UNPINNED}))
               order by 1"
            ),
        );
        no_exception(
            db,
            "the body does not begin with #variable_conflict use_column",
            r"select p.oid::regprocedure::text
                from pg_proc p join pg_language l on l.oid = p.prolang
               where p.pronamespace = 'nightowls'::regnamespace
                 and l.lanname = 'plpgsql'
                 and p.prosrc !~ '^\s*#variable_conflict use_column\s'
               order by 1",
        );
        no_exception(
            db,
            "a view that does not look with its caller's rights",
            r"select c.oid::regclass::text
                from pg_class c
               where c.relnamespace = 'nightowls'::regnamespace
                 and c.relkind = 'v'
                 and not coalesce('security_invoker=true' = any (c.reloptions)
                                  or 'security_invoker=on' = any (c.reloptions), false)
               order by 1",
        );
    });
}

#[test]
fn parameters_are_plain_words() {
    on_each_install(|db| {
        let inputs = r"
            from pg_proc p
           cross join lateral unnest(p.proargnames, p.proargmodes) as a (name, mode)
           where p.pronamespace = 'nightowls'::regnamespace
             and coalesce(a.mode, 'i') in ('i', 'b', 'v')";
        no_exception(
            db,
            "a parameter that SQL reserves",
            &format!(
                "select p.oid::regprocedure::text, a.name {inputs}
                    and p.proname !~ '^_'
                    and exists (select from pg_get_keywords() k
                                 where k.word = a.name and k.catcode not in ('U', 'T'))
                  order by 1, 2"
            ),
        );
        no_exception(
            db,
            "a parameter that is no plain word",
            &format!(
                r"select p.oid::regprocedure::text, a.name {inputs}
                    and p.proname !~ '^_'
                    and (a.name !~ '^[a-z][a-z0-9]*(_[a-z0-9]+)*$' or a.name ~ '^p_')
                  order by 1, 2"
            ),
        );
        no_exception(
            db,
            "a parameter without a name",
            r"select p.oid::regprocedure::text
                from pg_proc p
               where p.pronamespace = 'nightowls'::regnamespace
                 and p.proname !~ '^_'
                 and p.pronargs > coalesce(array_length(p.proargnames, 1), 0)
               order by 1",
        );
    });
}

#[test]
fn no_two_public_functions_have_one_name() {
    on_each_install(|db| {
        no_exception(
            db,
            "more than one",
            r"select p.proname, count(*)
                from pg_proc p
               where p.pronamespace = 'nightowls'::regnamespace and p.proname !~ '^_'
               group by p.proname
              having count(*) > 1
               order by 1",
        );
    });
}

#[test]
fn every_table_of_a_tenant_is_keyed_by_the_tenant_and_guarded() {
    on_each_install(|db| {
        no_exception(
            db,
            "row level security is not enabled and forced",
            r"select c.oid::regclass::text
                from pg_class c
               where c.relnamespace = 'nightowls'::regnamespace
                 and c.relkind in ('r', 'p')
                 and not (c.relrowsecurity and c.relforcerowsecurity)
               order by 1",
        );
        no_exception(
            db,
            "org_id does not lead the primary key",
            r"select c.oid::regclass::text
                from pg_class c
                join pg_attribute a on a.attrelid = c.oid and a.attname = 'org_id'
                left join pg_index i on i.indrelid = c.oid and i.indisprimary
               where c.relnamespace = 'nightowls'::regnamespace
                 and c.relkind in ('r', 'p')
                 and c.relname !~ '^mastra_' -- Its client names the keys in its upserts.
                 and (i.indkey[0] is distinct from a.attnum or not a.attnotnull)
               order by 1",
        );
        // An org's name elsewhere is unique among orgs: that is what finds it.
        no_exception(
            db,
            "org_id does not lead a unique key",
            r"select i.indexrelid::regclass::text
                from pg_class c
                join pg_attribute a on a.attrelid = c.oid and a.attname = 'org_id'
                join pg_index i on i.indrelid = c.oid and i.indisunique
               where c.relnamespace = 'nightowls'::regnamespace
                 and i.indkey[0] <> a.attnum
                 and c.relname <> 'orgs'
                 and c.relname !~ '^mastra_'
               order by 1",
        );
    });
}

#[test]
fn no_column_stops_pg_upgrade() {
    on_each_install(|db| {
        no_exception(
            db,
            "a column whose type pg_upgrade refuses",
            r"with recursive refused (type) as (
                select t.oid
                  from pg_type t
                 where t.typname in ('regcollation', 'regconfig', 'regdictionary', 'regnamespace',
                                     'regoper', 'regoperator', 'regproc', 'regprocedure')
                   and t.typnamespace = 'pg_catalog'::regnamespace
                 union
                select u.type
                  from refused r
                 cross join lateral (
                   select t.oid from pg_type t where r.type in (t.typelem, t.typbasetype)
                    union all
                   select t.oid
                     from pg_attribute a
                     join pg_class c on c.oid = a.attrelid and c.relkind = 'c'
                     join pg_type t on t.typrelid = c.oid
                    where a.atttypid = r.type
                 ) u (type)
              )
              select a.attrelid::regclass::text, a.attname, a.atttypid::regtype::text
                from pg_class c
                join pg_attribute a on a.attrelid = c.oid
                join refused r on r.type = a.atttypid
               where c.relnamespace = 'nightowls'::regnamespace
                 and c.relkind in ('r', 'p', 'm', 'i')
                 and not a.attisdropped
               order by 1, 2",
        );
    });
}

#[test]
fn a_dump_of_the_extension_holds_every_table_and_sequence() {
    on_install(Install::Extension, |db| {
        no_exception(
            db,
            "not as pg_extension_config_dump should have it",
            r"select coalesce(c.oid, d.oid)::regclass::text, d.condition
                from (select c.oid
                        from pg_class c
                       where c.relnamespace = 'nightowls'::regnamespace
                         and c.relkind in ('r', 'p', 'S')) c
                full join (select u.oid, u.condition
                             from pg_extension e
                            cross join lateral unnest(e.extconfig, e.extcondition) as u (oid, condition)
                            where e.extname = 'nightowls') d
                  on d.oid = c.oid
               where d.condition is distinct from '' or c.oid is null
               order by 1",
        );
    });
}

#[test]
fn every_object_of_the_schema_is_a_member_of_the_extension() {
    on_install(Install::Extension, |db| {
        no_exception(
            db,
            "not a member",
            r"select o.type, o.identity
                from pg_depend d
               cross join lateral pg_identify_object(d.classid, d.objid, 0) o
               where d.refclassid = 'pg_namespace'::regclass
                 and d.refobjid = 'nightowls'::regnamespace
                 and d.deptype = 'n'
                 and d.classid <> 'pg_extension'::regclass
                 and not exists (
                   select from pg_depend m
                    where m.classid = d.classid and m.objid = d.objid
                      and m.refclassid = 'pg_extension'::regclass and m.deptype = 'e')
               order by 1, 2",
        );
    });
}

#[test]
fn the_files_on_disk_are_those_of_the_list() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut on_disk = BTreeSet::new();
    for folder in ["sql", "sql/extension", "sql/plain"] {
        for entry in fs::read_dir(root.join(folder)).expect("the folder is there") {
            let path = entry.expect("the folder can be read").path();
            if path.is_file() {
                let name = path.file_name().expect("a file has a name");
                on_disk.insert(format!("{folder}/{}", name.to_string_lossy()));
            }
        }
    }
    let listed: BTreeSet<String> = FILES
        .iter()
        .map(|file| file.path.trim_start_matches("../").to_owned())
        .chain(
            UPGRADES
                .iter()
                .map(|step| format!("sql/nightowls--{}--{}.sql", step.from, step.to)),
        )
        .collect();
    assert_eq!(on_disk, listed);

    let numbered: Vec<_> = FILES
        .iter()
        .filter(|file| file.scope == Scope::Both)
        .map(|file| file.path)
        .collect();
    assert!(numbered.is_sorted(), "{numbered:?}");
    for file in FILES {
        let stem = Path::new(file.path).file_stem().expect("a file has a stem");
        let stem = stem.to_string_lossy();
        let concern = stem.trim_start_matches(|c: char| c.is_ascii_digit() || c == '_');
        assert_eq!(file.concern, concern, "{}", file.path);
    }
}

/// The heads of the functions that a text makes: from `create function` to the body.
fn function_heads(text: &str) -> Vec<String> {
    let mut heads = Vec::new();
    let mut head: Option<String> = None;
    for line in text.lines() {
        if line.starts_with("create function nightowls.") {
            head = Some(String::new());
        }
        if let Some(text) = &mut head {
            text.push_str(line);
            text.push('\n');
            let starts = line.trim_start();
            if starts.starts_with("as ")
                || starts.starts_with("return ")
                || starts == "begin atomic"
            {
                heads.extend(head.take());
            }
        }
    }
    heads
}

#[test]
fn every_function_writes_its_labels() {
    for file in FILES {
        let made = file
            .text
            .lines()
            .filter(|line| line.starts_with("create function"))
            .count();
        let heads = function_heads(file.text);
        assert_eq!(heads.len(), made, "{}", file.path);
        for head in heads {
            let has = |words: &[&str]| {
                head.lines()
                    .any(|line| words.iter().any(|word| line.trim().starts_with(word)))
            };
            let labelled = has(&["language "])
                && has(&["volatile", "stable", "immutable"])
                && has(&["parallel safe", "parallel unsafe", "parallel restricted"]);
            assert!(labelled, "{}: {head}", file.path);
        }
    }
}

/// The functions, aggregates and types that the files of one scope make.
fn made_by(scope: Scope) -> BTreeSet<String> {
    FILES
        .iter()
        .filter(|file| file.scope == scope)
        .flat_map(|file| file.text.lines())
        .filter_map(|line| {
            let line = line.strip_prefix("create ")?;
            let (_, name) = line.split_once(" nightowls.")?;
            let end = name.find(|c: char| !c.is_alphanumeric() && c != '_');
            Some(name[..end.unwrap_or(name.len())].to_owned())
        })
        .collect()
}

/// Everything in the schema, as rows of: name, kind and identity, property, value.
/// The owner is called `<owner>`, whoever it is.
const CATALOG: &str = r#"
with owner (oid) as (
  select nspowner from pg_namespace where nspname = 'nightowls'
),
relations as (
  select c.*, c.oid::regclass::text as name
    from pg_class c
   where c.relnamespace = 'nightowls'::regnamespace and c.relkind in ('r', 'p', 'v', 'm', 'S', 'c', 'f')
),
functions as (
  select p.*,
         p.proname || '(' || pg_get_function_identity_arguments(p.oid) || ')' as name,
         l.lanname
    from pg_proc p join pg_language l on l.oid = p.prolang
   where p.pronamespace = 'nightowls'::regnamespace
),
grants (name, object, acl) as (
  select 'nightowls', 'schema', coalesce(n.nspacl, acldefault('n', n.nspowner))
    from pg_namespace n where n.nspname = 'nightowls'
   union all
  select r.relname, 'relation ' || r.name,
         coalesce(r.relacl, acldefault(case r.relkind when 'S' then 's' else 'r' end::pg_catalog."char", r.relowner))
    from relations r
   where r.relkind <> 'c'
   union all
  select r.relname, 'column ' || r.name || '.' || a.attname, a.attacl
    from relations r join pg_attribute a on a.attrelid = r.oid
   where a.attacl is not null
   union all
  select f.proname, 'function ' || f.name, coalesce(f.proacl, acldefault('f', f.proowner))
    from functions f
),
listing (name, object, property, value) as (
  select 'nightowls', 'schema', 'comment', obj_description(n.oid, 'pg_namespace')
    from pg_namespace n where n.nspname = 'nightowls'

   union all
  select r.relname, 'relation ' || r.name, v.property, v.value
    from relations r
   cross join lateral (values
     ('kind', r.relkind::text),
     ('persistence', r.relpersistence::text),
     ('owner', (case when r.relowner = (select oid from owner) then '<owner>' else r.relowner::regrole::text end)),
     ('options', r.reloptions::text),
     ('row security', format('%s %s', r.relrowsecurity, r.relforcerowsecurity)),
     ('replica identity', r.relreplident::text),
     ('partition', pg_get_partkeydef(r.oid)),
     ('access method', (select m.amname::text from pg_am m where m.oid = r.relam)),
     ('definition', case when r.relkind in ('v', 'm') then pg_get_viewdef(r.oid) end),
     ('comment', obj_description(r.oid, 'pg_class'))
   ) v (property, value)

   union all
  select r.relname, 'column ' || r.name || '.' || a.attname, v.property, v.value
    from relations r
    join pg_attribute a on a.attrelid = r.oid and a.attnum > 0 and not a.attisdropped
    left join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
   cross join lateral (values
     ('place', a.attnum::text),
     ('type', format_type(a.atttypid, a.atttypmod)),
     ('not null', a.attnotnull::text),
     ('default', pg_get_expr(d.adbin, d.adrelid)),
     ('identity', format('%s%s', a.attidentity, a.attgenerated)),
     ('collation', a.attcollation::regcollation::text),
     ('storage', format('%s%s', a.attstorage, a.attcompression)),
     ('statistics', a.attstattarget::text),
     ('options', (select string_agg(o.text, ',' order by 1) from unnest(a.attoptions) o (text) where o.text ~ '^n_distinct')),
     ('comment', col_description(a.attrelid, a.attnum))
   ) v (property, value)

   union all
  select r.relname, 'sequence ' || r.name, 'definition',
         (to_jsonb(s) - 'seqrelid')::text
         || coalesce((select format(' owned by %s %s', d.refobjid::regclass, d.refobjsubid)
                        from pg_depend d
                       where d.classid = 'pg_class'::regclass and d.objid = r.oid
                         and d.refclassid = 'pg_class'::regclass and d.deptype in ('a', 'i')), '')
    from relations r join pg_sequence s on s.seqrelid = r.oid

   union all
  select r.relname, 'constraint ' || r.name || ' ' || k.conname, v.property, v.value
    from relations r join pg_constraint k on k.conrelid = r.oid
   cross join lateral (values
     ('definition', pg_get_constraintdef(k.oid)),
     ('valid', k.convalidated::text),
     ('comment', obj_description(k.oid, 'pg_constraint'))
   ) v (property, value)

   union all
  select r.relname, 'index ' || i.indexrelid::regclass::text, v.property, v.value
    from relations r
    join pg_index i on i.indrelid = r.oid
    join pg_class c on c.oid = i.indexrelid
   cross join lateral (values
     ('definition', pg_get_indexdef(i.indexrelid)),
     ('state', format('%s %s %s %s %s', i.indisvalid, i.indisprimary, i.indisreplident, i.indimmediate, i.indisclustered)),
     ('options', c.reloptions::text),
     ('comment', obj_description(i.indexrelid, 'pg_class'))
   ) v (property, value)

   union all
  select r.relname, 'trigger ' || r.name || ' ' || t.tgname, v.property, v.value
    from relations r join pg_trigger t on t.tgrelid = r.oid and not t.tgisinternal
   cross join lateral (values
     ('definition', pg_get_triggerdef(t.oid)),
     ('enabled', t.tgenabled::text),
     ('comment', obj_description(t.oid, 'pg_trigger'))
   ) v (property, value)

   union all
  select r.relname, 'policy ' || r.name || ' ' || p.polname, v.property, v.value
    from relations r join pg_policy p on p.polrelid = r.oid
   cross join lateral (values
     ('command', format('%s %s', p.polcmd, p.polpermissive)),
     ('roles', (select string_agg(case u.oid when 0 then 'public' else u.oid::regrole::text end, ',' order by 1)
                  from unnest(p.polroles) u (oid))),
     ('using', pg_get_expr(p.polqual, p.polrelid)),
     ('check', pg_get_expr(p.polwithcheck, p.polrelid)),
     ('comment', obj_description(p.oid, 'pg_policy'))
   ) v (property, value)

   union all
  select r.relname, 'rule ' || r.name || ' ' || u.rulename, 'definition', pg_get_ruledef(u.oid)
    from relations r join pg_rewrite u on u.ev_class = r.oid
   where r.relkind not in ('v', 'm')

   union all
  select t.typname, 'type ' || t.oid::regtype::text, v.property, v.value
    from pg_type t left join pg_class c on c.oid = t.typrelid
   cross join lateral (values
     ('kind', t.typtype::text),
     ('labels', (select string_agg(e.enumlabel, ',' order by e.enumsortorder) from pg_enum e where e.enumtypid = t.oid)),
     ('domain', format('%s %s %s', t.typbasetype::regtype, t.typnotnull, t.typdefault)),
     ('comment', obj_description(t.oid, 'pg_type'))
   ) v (property, value)
   where t.typnamespace = 'nightowls'::regnamespace
     and t.typcategory <> 'A'
     and (c.relkind = 'c' or t.typrelid = 0)

   union all
  select f.proname, 'function ' || f.name, v.property, v.value
    from functions f
    left join pg_aggregate g on g.aggfnoid = f.oid
   cross join lateral (values
     ('kind', f.prokind::text),
     ('arguments', pg_get_function_arguments(f.oid)),
     ('result', pg_get_function_result(f.oid)),
     ('labels', format('volatile=%s parallel=%s strict=%s definer=%s leakproof=%s',
                       f.provolatile, f.proparallel, f.proisstrict, f.prosecdef, f.proleakproof)),
     ('owner', (case when f.proowner = (select oid from owner) then '<owner>' else f.proowner::regrole::text end)),
     ('comment', obj_description(f.oid, 'pg_proc')),
     ('body language', f.lanname),
     ('body settings', f.proconfig::text),
     ('body cost', format('%s %s', f.procost, f.prorows)),
     ('body', coalesce(pg_get_function_sqlbody(f.oid), f.prosrc)),
     ('body aggregate', (to_jsonb(g) - 'aggfnoid' - 'aggtranstype' - 'aggmtranstype')::text
                        || format(' %s %s', g.aggtranstype::regtype, g.aggmtranstype::regtype))
   ) v (property, value)

   union all
  select g.name, g.object, 'granted to ' || (case a.grantee
                                               when 0 then 'public'
                                               when (select oid from owner) then '<owner>'
                                               else a.grantee::regrole::text end),
         string_agg(a.privilege_type || (case when a.is_grantable then '*' else '' end), ' ' order by a.privilege_type)
    from grants g cross join lateral aclexplode(g.acl) a
   group by g.name, g.object, a.grantee

   union all
  select 'nightowls', 'default privileges', a.defaclobjtype::text, a.defaclacl::text
    from pg_default_acl a
   where a.defaclnamespace = 'nightowls'::regnamespace

   union all
  select o.identity, o.type, 'exists', ''
    from pg_depend d
   cross join lateral pg_identify_object(d.classid, d.objid, 0) o
   where d.refclassid = 'pg_namespace'::regclass
     and d.refobjid = 'nightowls'::regnamespace
     and d.deptype = 'n'
     and d.classid not in ('pg_extension'::regclass, 'pg_class'::regclass, 'pg_proc'::regclass, 'pg_type'::regclass)
)
select name, object, property, coalesce(value, '') from listing
"#;

/// An object's properties by name.
type Properties = BTreeMap<String, String>;

/// Each object, but for what only one install can have: its twins' bodies, and
/// the private parts that they are made of.
fn catalog(db: &Db) -> BTreeMap<String, Properties> {
    let (extension, plain) = (made_by(Scope::Extension), made_by(Scope::Plain));
    let twins: BTreeSet<_> = extension.intersection(&plain).cloned().collect();
    let private = |name: &String| {
        name.starts_with('_')
            && !twins.contains(name)
            && (extension.contains(name) || plain.contains(name))
    };

    let mut session = db.superuser();
    // So that every name is shown with its schema.
    session.exec("set search_path to ''");
    let mut objects: BTreeMap<String, Properties> = BTreeMap::new();
    for row in session.rows(CATALOG) {
        let row: Vec<String> = row.into_iter().map(Option::unwrap_or_default).collect();
        let [name, object, property, value] = row.try_into().expect("four columns");
        let skipped = private(&name)
            || ONLY_IN_THE_EXTENSION.contains(&name.as_str())
            || (twins.contains(&name) && property.starts_with("body"));
        if !skipped {
            objects.entry(object).or_default().insert(property, value);
        }
    }
    objects
}

#[test]
fn both_installs_make_the_same_catalog() {
    let extension = catalog(&server().database(Install::Extension));
    let plain = catalog(&server().database(Install::Plain));
    assert!(extension.len() > 50, "{} objects", extension.len());

    let mut differences = String::new();
    for object in extension
        .keys()
        .chain(plain.keys())
        .collect::<BTreeSet<_>>()
    {
        match (extension.get(object), plain.get(object)) {
            (Some(_), None) => differences += &format!("\n{object}: only in the extension"),
            (None, Some(_)) => differences += &format!("\n{object}: only in the plain install"),
            (Some(one), Some(other)) if one != other => {
                for property in one.keys().chain(other.keys()).collect::<BTreeSet<_>>() {
                    let (one, other) = (one.get(property), other.get(property));
                    if one != other {
                        differences += &format!(
                            "\n{object}, {property}:\n  extension: {one:?}\n  plain:     {other:?}"
                        );
                    }
                }
            }
            _ => (),
        }
    }
    assert!(differences.is_empty(), "{differences}");
}

#[test]
fn a_function_of_one_install_alone_is_private_or_named_as_such() {
    let (extension, plain) = (made_by(Scope::Extension), made_by(Scope::Plain));
    let alone: Vec<_> = extension
        .symmetric_difference(&plain)
        .filter(|name| !name.starts_with('_'))
        .map(String::as_str)
        .collect();
    assert_eq!(alone, ONLY_IN_THE_EXTENSION);
}
