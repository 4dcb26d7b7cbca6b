-- pg_dump leaves out the rows of an extension's tables unless it is told of them: every table and every sequence.
select pg_catalog.pg_extension_config_dump('nightowls.settings', '');
select pg_catalog.pg_extension_config_dump('nightowls.orgs', '');
select pg_catalog.pg_extension_config_dump('nightowls.org_members', '');
select pg_catalog.pg_extension_config_dump('nightowls.events', '');
select pg_catalog.pg_extension_config_dump('nightowls.events_position_seq', '');
select pg_catalog.pg_extension_config_dump('nightowls.imports', '');
select pg_catalog.pg_extension_config_dump('nightowls.routes', '');
select pg_catalog.pg_extension_config_dump('nightowls.consumers', '');
select pg_catalog.pg_extension_config_dump('nightowls.consumer_generations', '');
select pg_catalog.pg_extension_config_dump('nightowls._consumer_offsets', '');
select pg_catalog.pg_extension_config_dump('nightowls._consumer_failures', '');
select pg_catalog.pg_extension_config_dump('nightowls.projections', '');
select pg_catalog.pg_extension_config_dump('nightowls._projection_states', '');
select pg_catalog.pg_extension_config_dump('nightowls.projection_generations', '');
select pg_catalog.pg_extension_config_dump('nightowls.floors', '');
select pg_catalog.pg_extension_config_dump('nightowls.floor_tickets', '');
select pg_catalog.pg_extension_config_dump('nightowls.published_changes', '');
