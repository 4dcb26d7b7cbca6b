// A JWT of the test's project, with these claims. Signs with what only the tests know.
import { createHmac } from "node:crypto";

export const secret = "a secret of at least thirty-two characters";

export const token = (claims, key = secret) => {
  const part = (value) => Buffer.from(JSON.stringify(value)).toString("base64url");
  const body = `${part({ alg: "HS256", typ: "JWT" })}.${part({ exp: 4102444800, ...claims })}`;
  return `${body}.${createHmac("sha256", key).update(body).digest("base64url")}`;
};
