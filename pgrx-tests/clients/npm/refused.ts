// What a key that is not the service's gets.
import { createClient } from "@supabase/supabase-js";

const supabase = createClient(process.env.SUPABASE_URL!, process.env.SUPABASE_SERVICE_ROLE_KEY!);
for (const [name, args] of [
  ["pop_queue", { queue_name: "jobs" }],
  ["ack_message", { message_id: "1" }],
  ["send", { queue: "jobs", message: 1 }],
] as const) {
  const { data, error } = await supabase.rpc(name, args);
  console.log(name, data, error?.code);
}
