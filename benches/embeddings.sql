-- A table whose rows were all embedded, an hour ago.
create table public.docs (id bigint primary key, title text not null, embedding real[]);
insert into public.docs (id, title) select n, 'title ' || n from generate_series(1, :rows) n;
select nightowls.create_endpoint('model', 'https://example.com', org => :'org');
select nightowls.create_embedding_source('docs', 'public.docs', 'id', 'title', 'embedding', 'model', 'small', 3, org => :'org');
do $$
begin
  loop
    perform nightowls.save_embedding('docs', c.key, c.claim, '{1,2,3}') from nightowls.claim_embeddings('docs', 1000) c;
    exit when not found;
  end loop;
end;
$$;
