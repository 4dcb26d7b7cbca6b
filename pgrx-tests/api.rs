//! docs/api.md: the public objects and their comments, as the database has them.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use nightowls::install::FILES;

use crate::support::{Install, Session, on_install};

const HEADING: &str = "\
# API

Written by `make docs` from the comments in the database: to change this page, change a `comment on` in `sql/`.

Everything is in schema `nightowls`. Call functions with named arguments (`name => value`): parameter names are part of the
interface, their order is not. Errors are listed in [errors.md](errors.md).
";

// What does not begin with `_` is public.
const OBJECTS: &str = r#"
set search_path to pg_catalog;
select kind, name, code, comment, columns from (
  select case p.prokind when 'a' then 'aggregate' when 'p' then 'procedure' else 'function' end as kind,
         p.proname::text as name,
         'nightowls.' || p.proname || '('
           || coalesce(E'\n' || (
                select string_agg(format('  %s %s%s', p.proargnames[a.number], format_type(a.type, null),
                         coalesce(' default ' || regexp_replace(pg_get_function_arg_default(p.oid, a.number::int),
                           '^(NULL)?(.*?)(::[a-z0-9. ]+)?$', '\1\2'), '')), E',\n' order by a.number)
                  from unnest(p.proargtypes) with ordinality as a (type, number)) || E'\n', '')
           || ')' || coalesce(' returns ' || pg_get_function_result(p.oid), '')
           || E'\n-- ' || concat_ws(', ',
                case p.provolatile when 'i' then 'immutable' when 's' then 'stable' else 'volatile' end,
                case when p.proisstrict then 'strict' end,
                'parallel ' || case p.proparallel when 's' then 'safe' when 'r' then 'restricted' else 'unsafe' end,
                case when p.prosecdef then 'security definer' end) as code,
         obj_description(p.oid, 'pg_proc') as comment,
         null as columns
    from pg_proc p
   where p.pronamespace = 'nightowls'::regnamespace
     and p.prorettype not in ('trigger'::regtype, 'event_trigger'::regtype)
  union all
  select case c.relkind when 'v' then 'view' when 'm' then 'materialized view' when 'c' then 'type' else 'table' end,
         c.relname::text,
         null,
         coalesce(obj_description(c.oid, 'pg_class'), obj_description(c.reltype, 'pg_type')),
         (select string_agg(format('| `%s` | %s | %s |', a.attname, format_type(a.atttypid, a.atttypmod),
                   replace(coalesce(col_description(c.oid, a.attnum), ''), '|', '\|')), E'\n' order by a.attnum)
            from pg_attribute a
           where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped)
    from pg_class c
   where c.relnamespace = 'nightowls'::regnamespace
     and c.relkind in ('r', 'p', 'v', 'm', 'c')
) as object
where name not like '\_%'
order by name collate "C""#;

struct Object {
    place: (usize, usize),
    kind: String,
    name: String,
    code: String,
    comment: String,
    columns: String,
}

#[test]
fn the_reference_is_current() {
    on_install(Install::Extension, |db| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/api.md");
        let current = reference(&mut db.superuser());
        if std::env::var_os("NIGHTOWLS_WRITE_DOCS").is_some() {
            fs::write(&path, &current).expect("docs/api.md can be written");
        }
        let written = fs::read_to_string(&path).unwrap_or_default();
        let differs = current
            .lines()
            .zip(written.lines().chain(std::iter::repeat("")))
            .find(|(new, old)| new != old);
        assert!(
            written == current,
            "docs/api.md is not what the database says, so run `make docs`; the first difference: {differs:?}"
        );
    });
}

fn reference(session: &mut Session) -> String {
    let mut objects: Vec<_> = session
        .rows(OBJECTS)
        .into_iter()
        .map(|row| {
            let mut columns = row.into_iter().map(Option::unwrap_or_default);
            let mut next = || columns.next().expect("the query has five columns");
            let (kind, name) = (next(), next());
            Object {
                place: place_of(&kind, &name),
                kind,
                name,
                code: next(),
                comment: next(),
                columns: next(),
            }
        })
        .collect();
    objects.sort_by(|one, other| (one.place, &one.name).cmp(&(other.place, &other.name)));

    let mut text = HEADING.to_owned();
    let mut concern = "";
    for object in &objects {
        let heading = FILES[object.place.0].concern;
        if heading != concern {
            concern = heading;
            write!(text, "\n## {}\n", concern.replace('_', " ")).expect("a string takes all");
        }
        render(object, &mut text);
    }
    text
}

fn render(object: &Object, text: &mut String) {
    let Object { kind, name, .. } = object;
    let label = match kind.as_str() {
        "function" => String::new(),
        kind => format!(" ({kind})"),
    };
    write!(text, "\n### {name}{label}\n").expect("a string takes all");
    if !object.code.is_empty() {
        let code = object
            .code
            .replace("NULL", "null")
            .replace(" TABLE(", " table(")
            .replace(" SETOF ", " setof ");
        write!(text, "\n```sql\n{code}\n```\n").expect("a string takes all");
    }
    if !object.comment.is_empty() {
        write!(text, "\n{}\n", object.comment.replace('<', "\\<")).expect("a string takes all");
    }
    if !object.columns.is_empty() {
        write!(
            text,
            "\n| column | type | |\n| --- | --- | --- |\n{}\n",
            object.columns
        )
        .expect("a string takes all");
    }
}

/// The file that makes the object, and where in it: the order of the page.
///
/// # Panics
///
/// If no file of the install makes it.
fn place_of(kind: &str, name: &str) -> (usize, usize) {
    let start = format!("create {kind} nightowls.{name}");
    let made_here = |text: &str| {
        text.match_indices(&start).map(|(at, _)| at).find(|at| {
            !text[at + start.len()..].starts_with(|c: char| c == '_' || c.is_alphanumeric())
        })
    };
    FILES
        .iter()
        .enumerate()
        .find_map(|(number, file)| Some((number, made_here(file.text)?)))
        .unwrap_or_else(|| panic!("no file has `{start}`"))
}
