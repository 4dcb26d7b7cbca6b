// The HTTP status that comes with each SQLSTATE.
import { createClient } from "@supabase/supabase-js";

const supabase = createClient<any>(process.env.SUPABASE_URL!, process.env.SUPABASE_SERVICE_ROLE_KEY!);
const { data: codes } = await supabase.rpc("codes_to_try");
for (const code of codes) {
  if (code === "40001") {
    // PostgREST repeats what ends so, for ever if need be.
    console.log(code, (await supabase.rpc("succeed_at_the_third")).data);
    continue;
  }
  const { error, status } = await supabase.rpc("fail_with", { code });
  const whole = error?.code === code && error?.message === "told" && error?.details === "more" && error?.hint === "try";
  console.log(code, status, whole ? "whole" : JSON.stringify(error));
}
