// Errors arrive with code, message and hint.
import { createClient } from "@supabase/supabase-js";

const supabase = createClient(process.env.SUPABASE_URL!, process.env.SUPABASE_SERVICE_ROLE_KEY!);
const { error } = await supabase.rpc("pop_queue", { queue_name: "jbos", batch_size: 1, visibility_timeout: 30 });
console.log(error?.code, error?.message, error?.hint);
const { data: sent } = await supabase.rpc("send", { queue: "jobs", message: { to: "eve" } });
const { data: read } = await supabase.rpc("read", { queue: "jobs", vt: 30, qty: 5 });
console.log(typeof sent, read.length, read[0].message.to);
const { data: acked } = await supabase.rpc("ack", { queue: "jobs", msg_id: read[0].msg_id, receipt: read[0].receipt });
const { data: late } = await supabase.rpc("ack_message", { message_id: `1.${read[0].msg_id}.${read[0].receipt}` });
console.log(acked, late);
