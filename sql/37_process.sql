-- Process: messages handled and acked in one transaction.

-- Acks a message that was handled. One that its handler has settled, or has put off, is left as the handler left it.
-- Definer: nobody else may write to the queue's tables.
create function nightowls._settle_processed(org uuid, name text, msg_id bigint, receipt uuid)
  returns void
  language plpgsql
  volatile
  parallel unsafe
  security definer
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_queue nightowls.queues := nightowls._queue(_settle_processed.org, _settle_processed.name);
begin
  perform nightowls._finish(v_queue, _settle_processed.msg_id, _settle_processed.receipt, true, v_queue.archive_acked);
end;
$$;

revoke all on function nightowls._settle_processed(uuid, text, bigint, uuid) from public;

create function nightowls.process(queue text, handler text, qty int default 1, org uuid default null)
  returns table (msg_id bigint, read_ct int, done boolean, error text)
  language plpgsql
  volatile
  parallel unsafe
  set search_path to pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_org      uuid := nightowls.current_org(process.org);
  v_handler  text := (nightowls._resolve_handler(process.handler, '{(nightowls.queue_message)}')).name;
  v_left     int := process.qty;
  v_messages nightowls.queue_message[];
  v_message  nightowls.queue_message;
begin
  if (process.qty between 0 and 1000) is not true then
    perform nightowls._check_read(0, process.qty);
    raise exception 'qty must be at most 1000' using errcode = 'invalid_parameter_value', hint = 'Call again for more: each call is one transaction.';
  end if;
  loop
    -- The rows stay locked until the transaction ends, so nobody else gets them, however long it takes.
    v_messages := array(select r from nightowls.read(process.queue, 604800, v_left, v_org) r);
    exit when v_messages = '{}';
    foreach v_message in array v_messages loop
      process.msg_id := v_message.msg_id;
      process.read_ct := v_message.read_ct;
      begin
        -- User code, as the caller.
        execute 'select ' || v_handler || '($1)' using v_message;
        perform nightowls._settle_processed(v_org, process.queue, v_message.msg_id, v_message.receipt);
        process.done := true;
        process.error := null;
      exception
        when transaction_rollback then
          -- The whole transaction is to be tried again.
          raise;
        when others then
          process.done := false;
          process.error := sqlstate || ' ' || sqlerrm;
      end;
      if not process.done then
        perform nightowls._nack(v_org, process.queue, v_message.msg_id, v_message.receipt, process.error, null);
      end if;
      return next;
    end loop;
    -- What follows in a group is ready now.
    v_left := v_left - cardinality(v_messages);
    exit when v_left <= 0;
  end loop;
end;
$$;

comment on function nightowls.process(text, text, int, uuid) is
  'Takes up to qty messages of a queue and calls a handler with each, in the caller''s transaction, which then has all that the handlers did and the acks: what '
  'a handler writes to this database is written exactly once, whatever crashes. queue: its name; handler: schema.name of a function (message nightowls.queue_message), '
  'looked up at each call and run as the caller; qty: at most 1000; org: the tenant. If a handler fails, what it did is rolled back, the message is '
  'nacked with the error (SQLSTATE and message), and the rest goes on; after max_attempts it is a dead letter. Returns a row for each message: msg_id, read_ct, done, error. '
  'A deadlock or a serialization failure is not the handler''s fault: it ends the call, and so does a cancellation or a lost connection: then nothing has '
  'happened, nor is the attempt counted. Waits for nobody but who the handler waits for. Raises NW007 if the queue does not exist, 42883 if the handler '
  'does not, NW010 if there is no org, 22004 or 22023 if qty is null or not valid.';

revoke all on function nightowls.process(text, text, int, uuid) from public;
