-- What the demo keeps beside the extension: the commits it has taken in, and how a path becomes an aggregate's id.

create schema demo;

-- git's output, one row a line, between reading and staging.
create unlogged table demo.lines (
  no   bigint generated always as identity,
  line text collate "C" not null
);

-- Commits that are still to be appended, each with the whole of its append_many.
create unlogged table demo.staged (
  no          int         not null,
  commit      text        collate "C" not null,
  author      text        not null,
  authored_at timestamptz not null,
  subject     text        not null,
  appends     jsonb       not null,
  constraint staged_pkey primary key (no)
);
alter table demo.staged alter column appends set storage external;

-- One row a commit of the main line (the first parents) that is in the log, oldest first. position: of its last
-- event; the events of a commit lie after the position of the one before, up to its own.
create table demo.commits (
  no          int         not null,
  commit      text        collate "C" not null,
  author      text        not null,
  authored_at timestamptz not null,
  subject     text        not null,
  "position"  bigint      not null,
  constraint commits_pkey primary key (no),
  constraint commits_commit_key unique (commit)
);

-- One row for each time the history was read and something new was in it.
create table demo.runs (
  at      timestamptz not null default clock_timestamp(),
  commits int         not null,
  events  bigint      not null,
  seconds numeric     not null
);

-- git writes a path with unusual bytes in double quotes, as C does: "caf\303\251".
create function demo.path_bytes(quoted text)
  returns bytea
  language sql
  immutable
  parallel safe
  return decode(
    replace(replace(replace(replace(replace(replace(replace(replace(replace(
      substr(quoted, 2, length(quoted) - 2),
      '\\', '\134'), '\"', '"'), '\a', '\007'), '\b', '\010'), '\t', '\011'), '\n', '\012'), '\v', '\013'), '\f', '\014'), '\r', '\015'),
    'escape');

-- The aggregate's id for a path as git writes it: the path itself. A path that is no UTF-8, or begins with a double
-- quote itself, stays as git writes it, quotes and all; one too long for an id goes by its hash, and its events say it.
create function demo.path_id(quoted text)
  returns text
  language plpgsql
  immutable
  parallel safe
as $$
#variable_conflict use_column
declare
  v_id text := path_id.quoted;
begin
  if v_id like '"%' then
    begin
      v_id := convert_from(demo.path_bytes(path_id.quoted), 'UTF8');
      if v_id like '"%' then
        v_id := path_id.quoted;
      end if;
    exception when character_not_in_repertoire or untranslatable_character then
      null;
    end;
  end if;
  if octet_length(v_id) > 1024 then
    return '"sha256 ' || encode(sha256(convert_to(path_id.quoted, 'UTF8')), 'hex');
  end if;
  return v_id;
end;
$$;

-- The way back, byte for byte what git writes.
create function demo.path_quoted(id text)
  returns text
  language plpgsql
  immutable
  parallel safe
as $$
#variable_conflict use_column
declare
  v_text text;
begin
  if path_quoted.id like '"%' or path_quoted.id ~ '^[ !#-\[\]-~]*$' then
    return path_quoted.id;
  end if;
  -- Backslashes and bytes above 127 are written by encode(), the rest here.
  v_text := replace(encode(convert_to(path_quoted.id, 'UTF8'), 'escape'), '"', '\"');
  for i in 1 .. 31 loop
    v_text := replace(v_text, chr(i), case
      when i between 7 and 13 then '\' || substr('abtnvfr', i - 6, 1)
      else '\' || lpad(to_char(i / 8 * 10 + i % 8, 'FM99'), 3, '0') end);
  end loop;
  return '"' || replace(v_text, chr(127), '\177') || '"';
end;
$$;

-- Text of commits: git says UTF-8, but nobody checks; what is not is read as Latin-1.
create function demo.text_of(latin1 text)
  returns text
  language plpgsql
  immutable
  parallel safe
as $$
begin
  if latin1 ~ '^[\x01-\x7f]*$' then
    return latin1;
  end if;
  return convert_from(convert_to(latin1, 'LATIN1'), 'UTF8');
exception when character_not_in_repertoire or untranslatable_character then
  return latin1;
end;
$$;

-- Takes git's lines apart and makes of each commit the argument of its append_many: one append to its author, one to
-- each path it changed. Event ids made from the commit turn a repeated append into a retry; the expected versions would
-- refuse one out of order.
create procedure demo.stage()
  language plpgsql
as $$
#variable_conflict use_column
declare
  v_last int := coalesce((select max(c.no) from demo.commits c), 0);
begin
  truncate demo.staged;

  insert into demo.staged (no, commit, author, authored_at, subject, appends)
  with lines as (
    select l.line, v_last + count(*) filter (where l.line like '@%') over (order by l.no) as no
      from demo.lines l
  ), commits as materialized (
    select c.no, c.commit, c.author, c.authored_at, c.subject,
           jsonb_build_object('actor_id', c.author, 'authored_at', c.authored_at at time zone 'UTC') as metadata
      from (select l.no,
                   substr(split_part(l.line, e'\t', 1), 2) as commit,
                   left(coalesce(nullif(btrim(demo.text_of(split_part(l.line, e'\t', 3))), ''), 'nobody'), 200) as author,
                   to_timestamp(least(greatest(case when split_part(l.line, e'\t', 2) ~ '^-?[0-9]{1,12}$'
                                                    then split_part(l.line, e'\t', 2)::bigint else 0 end, 0), 253402300799)) as authored_at,
                   left(demo.text_of(split_part(l.line, e'\t', 4)), 200) as subject
              from lines l
             where l.line like '@%') c
  ), changes as (
    select l.no,
           l.quoted,
           demo.path_id(l.quoted) as aggregate_id,
           case l.words[5] when 'A' then 'file_added' when 'D' then 'file_removed' else 'file_modified' end as event_type,
           case l.words[5] when 'D' then substr(l.words[1], 2) else l.words[2] end as mode,
           case l.words[5] when 'D' then l.words[3] else l.words[4] end as blob
      from (select l.no,
                   string_to_array(split_part(l.line, e'\t', 1), ' ') as words,
                   substr(l.line, strpos(l.line, e'\t') + 1) as quoted
              from lines l
             where l.line like ':%') l
  ), heads as (
    select e.aggregate_id, max(e.version) as version
      from nightowls.events e
     where v_last > 0 and e.org_id = nightowls.current_org() and e.aggregate_type = 'file'
     group by e.aggregate_id
  ), appends as (
    select x.no, count(*) as changes,
           jsonb_agg(jsonb_build_object(
             'aggregate_type', 'file',
             'aggregate_id', x.aggregate_id,
             'expected_version', coalesce(h.version, 0) + x.nth - 1,
             'events', jsonb_build_array(jsonb_build_object(
               'event_type', x.event_type,
               'event_id', md5(c.commit || '/' || x.aggregate_id)::uuid,
               'metadata', c.metadata,
               'payload', jsonb_build_object('commit', c.commit, 'mode', x.mode, 'blob', x.blob)
                          || case when x.aggregate_id like '"sha256 %' then jsonb_build_object('path', x.quoted) else '{}' end)))) as appends
      from (select x.*, row_number() over (partition by x.aggregate_id order by x.no) as nth from changes x) x
      join commits c on c.no = x.no
      left join heads h on h.aggregate_id = x.aggregate_id
     group by x.no
  )
  select c.no, c.commit, c.author, c.authored_at, c.subject,
         jsonb_build_array(jsonb_build_object(
           'aggregate_type', 'author',
           'aggregate_id', c.author,
           'events', jsonb_build_array(jsonb_build_object(
             'event_type', 'commit_made',
             'event_id', md5(c.commit)::uuid,
             'metadata', c.metadata,
             'payload', jsonb_build_object('commit', c.commit, 'subject', c.subject, 'changes', coalesce(a.changes, 0))))))
         || coalesce(a.appends, '[]')
    from commits c
    left join appends a on a.no = c.no;

  truncate demo.lines;
end;
$$;

-- Appends what is staged: each commit one append_many. Says every half second how far it is.
create procedure demo.ingest()
  language plpgsql
as $$
#variable_conflict use_column
declare
  v_began  timestamptz := clock_timestamp();
  v_told   timestamptz := v_began;
  v_total  int;
  v_done   int := 0;
  v_events bigint := 0;
  v_no     int;
begin
  select count(*), min(s.no) into v_total, v_no from demo.staged s;
  while v_done < v_total loop
    insert into demo.commits (no, commit, author, authored_at, subject, "position")
    select s.no, s.commit, s.author, s.authored_at, s.subject,
           (select max(a."position") from nightowls.append_many(s.appends) a)
      from demo.staged s
     where s.no = v_no + v_done;
    if not found then
      raise exception 'commit % is not staged any more', v_no + v_done using hint = 'Is another run at work?';
    end if;
    v_events := v_events + (select jsonb_array_length(s.appends) from demo.staged s where s.no = v_no + v_done);
    v_done := v_done + 1;

    if v_done % 250 = 0 then
      commit;
    end if;
    if clock_timestamp() > v_told + interval '0.5 s' or v_done = v_total then
      v_told := clock_timestamp();
      raise info 'progress % % % %', v_done, v_total, v_events,
        round(v_events / greatest(extract(epoch from v_told - v_began), 0.001));
    end if;
  end loop;

  insert into demo.runs (commits, events, seconds)
  values (v_total, v_events, extract(epoch from clock_timestamp() - v_began));
  truncate demo.staged;
end;
$$;

-- What `git ls-tree -r` prints, from states of files.
create function demo.entry(path text, state jsonb)
  returns text
  language sql
  immutable
  parallel safe
  return format(e'%s %s %s\t%s', state ->> 'mode', case state ->> 'mode' when '160000' then 'commit' else 'blob' end,
                state ->> 'blob', coalesce(state ->> 'path', demo.path_quoted(path)));

-- The files there are now, as the projection has them.
create function demo.listing()
  returns setof text
  language sql
  stable
begin atomic
  select demo.entry(s.aggregate_id, s.state)
    from nightowls.projection_states s
   where s.org_id = nightowls.current_org()
     and s.projection = 'files'
     and s.state is not null;
end;

-- The files there were at a commit: of each the state at the version it had then.
create function demo.listing_at(no int)
  returns setof text
  language sql
  volatile
begin atomic
  with versions as materialized (
    select e.aggregate_id, max(e.version) as version
      from nightowls.events e
     where e.org_id = nightowls.current_org()
       and e.aggregate_type = 'file'
       and e."position" <= (select c."position" from demo.commits c where c.no = listing_at.no)
     group by e.aggregate_id
  ), states as materialized (
    select v.aggregate_id, nightowls.state_at('files', v.aggregate_id, v.version) as state
      from versions v
  )
  select demo.entry(s.aggregate_id, s.state) from states s where s.state is not null;
end;

-- A commit's append_many once more, from the log.
create function demo.appends_of(no int)
  returns jsonb
  language sql
  stable
begin atomic
  select jsonb_agg(jsonb_build_object(
           'aggregate_type', e.aggregate_type,
           'aggregate_id', e.aggregate_id,
           'expected_version', e.version - 1,
           'events', jsonb_build_array(jsonb_build_object(
             'event_type', e.event_type, 'event_id', e.event_id, 'metadata', e.metadata, 'payload', e.payload))))
    from nightowls.events e
   where e.org_id = nightowls.current_org()
     and e."position" <= (select c."position" from demo.commits c where c.no = appends_of.no)
     and e."position" > coalesce((select c."position" from demo.commits c where c.no = appends_of.no - 1), 0);
end;

select nightowls.set_default_org(nightowls.create_org('demo'));

-- What a file is now: its blob and mode, and the commit they came with. Gone when it is removed.
select nightowls.create_projection('files', 'file', '{
  "on": {
    "file_removed": [{"op": "tombstone"}]
  },
  "otherwise": [
    {"op": "set", "path": "blob", "value": "$.blob"},
    {"op": "set", "path": "mode", "value": "$.mode"},
    {"op": "set", "path": "commit", "value": "$.commit"},
    {"op": "set", "path": "path", "value": "$.path"}
  ]
}');
