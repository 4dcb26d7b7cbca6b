-- the newest events, and the state of one file now and at its first version
select * from nightowls.recent_events(max_events => 5);
select nightowls.state('files', 'README.md'), nightowls.state_at('files', 'README.md', 1);

-- what a consumer reads: everything after a position, nothing ever skipped
select position, event_type, aggregate_id from nightowls.read_events(after => 0, max_events => 10);

-- an event of your own, with a projection that counts
select nightowls.create_projection('carts', 'cart',
  '{"on": {"item_added": [{"op": "add", "path": "total", "value": "$.price"}, {"op": "push", "path": "items", "value": "$.sku"}]}}');
select nightowls.append_event('cart', 'c1', 'item_added', '{"sku": "owl", "price": 12.50}', expected_version => 0);
select nightowls.state('carts', 'c1');

-- make a projection anew from the log, beside the live one
select nightowls.rebuild_projection('files');
