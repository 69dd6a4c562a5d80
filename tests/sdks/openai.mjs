// OpenAI's SDK for JavaScript against the scripted server: node openai.mjs URL
import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { join } from "node:path";

const require = createRequire(join(process.env.NODE_PATH, "any.js"));
const OpenAI = require("openai").default;
const { zodResponseFormat, zodFunction } = require("openai/helpers/zod");
const { z } = require("zod");

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "none", maxRetries: 0 });
const ask = (content, more = {}) => ({ model: "scripted", messages: [{ role: "user", content }], ...more });
const Read = z.object({ path: z.string() });
const read = { type: "function", function: { name: "read", parameters: {
  type: "object", properties: { path: { type: "string" } }, required: ["path"] } } };

// whole and streamed
const whole = await client.chat.completions.create(ask("say one two"));
assert.equal(whole.choices[0].message.content, "one two");
assert.equal(whole.usage.prompt_tokens_details.cached_tokens, 4);
let text = "";
for await (const chunk of await client.chat.completions.create(ask("say one two", { stream: true })))
  text += chunk.choices[0]?.delta.content ?? "";
assert.equal(text, "one two");
const response = await client.responses.create({ model: "scripted", input: "say one two" });
assert.equal(response.output_text, "one two");
const events = [];
for await (const event of await client.responses.create({ model: "scripted", input: "say one", stream: true }))
  events.push(event.type);
assert.deepEqual([events.at(0), events.at(-1)], ["response.created", "response.completed"]);

// tools
const stream = client.chat.completions.stream(ask('call read {"path": "a b"}', { tools: [read] }));
const called = (await stream.finalChatCompletion()).choices[0].message;
assert.deepEqual(JSON.parse(called.tool_calls[0].function.arguments), { path: "a b" });
const runner = client.chat.completions.runTools(ask('call read {"path": "a"}', { tools: [
  zodFunction({ name: "read", parameters: Read, function: ({ path }) => `file ${path}` })] }));
assert.equal(await runner.finalContent(), "read says file a");

// structured output
const parsed = await client.chat.completions.parse(ask('say {"path":"a"}', {
  response_format: zodResponseFormat(Read, "read") }));
assert.deepEqual(parsed.choices[0].message.parsed, { path: "a" });

// cancellation: again and again, since an early one reaches no server
const howManyGone = async () =>
  Number((await client.chat.completions.create(ask("how many gone"))).choices[0].message.content);
const before = await howManyGone();
let gone;
do {
  const abort = new AbortController();
  const waiting = client.chat.completions.create(ask("wait", { stream: true }), { signal: abort.signal });
  setTimeout(() => abort.abort(), 50);
  await assert.rejects(waiting, OpenAI.APIUserAbortError);
  gone = await howManyGone();
} while (gone === before);

// errors
await assert.rejects(client.chat.completions.create(ask("full")), OpenAI.RateLimitError);
await assert.rejects(client.chat.completions.create(ask("long")),
  (error) => error instanceof OpenAI.BadRequestError && error.code === "context_length_exceeded");
await assert.rejects(client.chat.completions.create(ask("missing")), OpenAI.NotFoundError);
await assert.rejects(async () => {
  for await (const _ of await client.chat.completions.create(ask("fail", { stream: true })));
}, /The disk is full\./);
