-- pgbench: the state of an aggregate at a version, made of the nearest snapshot and what follows it.
select nightowls.state_at('ledgers', :aggregate, :version);
