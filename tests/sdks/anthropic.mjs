// Anthropic's SDK for JavaScript against the scripted server: node anthropic.mjs URL
import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { join } from "node:path";

const require = createRequire(join(process.env.NODE_PATH, "any.js"));
const Anthropic = require("@anthropic-ai/sdk").default;

const client = new Anthropic({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const ask = (content, more = {}) =>
  ({ model: "scripted", max_tokens: 100, messages: [{ role: "user", content }], ...more });
const schema = { type: "object", properties: { path: { type: "string" } }, required: ["path"] };

// whole and streamed
const whole = await client.messages.create(ask("say one two"));
assert.equal(whole.content[0].text, "one two");
assert.deepEqual([whole.usage.input_tokens, whole.usage.cache_read_input_tokens], [6, 4]);
const thought = await client.messages.stream(ask("think one two")).finalMessage();
assert.deepEqual(thought.content.map((block) => block.type), ["thinking", "text"]);

// tools
const tools = [{ name: "read", input_schema: schema }];
const called = await client.messages.stream(ask('call read {"path": "a"}', { tools })).finalMessage();
assert.equal(called.stop_reason, "tool_use");
assert.deepEqual(called.content[0].input, { path: "a" });
const heard = ask('call read {"path": "a"}', { tools });
heard.messages.push({ role: "assistant", content: called.content },
  { role: "user", content: [{ type: "tool_result", tool_use_id: called.content[0].id, content: "hello" }] });
assert.equal((await client.messages.create(heard)).content[0].text, "read says hello");
assert.equal((await client.messages.countTokens({ model: "scripted", messages: heard.messages })).input_tokens, 42);

// cancellation: again and again, since an early one reaches no server
const howManyGone = async () =>
  Number((await client.messages.create(ask("how many gone"))).content[0].text);
const before = await howManyGone();
let gone;
do {
  const abort = new AbortController();
  const waiting = client.messages.create(ask("wait", { stream: true }), { signal: abort.signal });
  setTimeout(() => abort.abort(), 50);
  await assert.rejects(waiting, Anthropic.APIUserAbortError);
  gone = await howManyGone();
} while (gone === before);

// errors
await assert.rejects(client.messages.create(ask("full")), (error) => error.status === 529);
await assert.rejects(client.messages.create(ask("long")), Anthropic.BadRequestError);
await assert.rejects(client.messages.create(ask("missing")), Anthropic.NotFoundError);
await assert.rejects(client.messages.stream(ask("fail")).finalMessage(), /The disk is full\./);
