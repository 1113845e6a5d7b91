// openai for node, as it is: chats, Responses, their streams, a tool, an output of a type.
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { BRIEFLY, CACTUS, KEY, Order, SPOKEN_ORDER, tell, V1 } from "./given.mjs";
import { z } from "zod";

const client = new OpenAI({ baseURL: V1, apiKey: KEY });
const user = (content) => [{ role: "user", content }];
const chat = { model: "pirate", messages: user(CACTUS), max_tokens: BRIEFLY, temperature: 0 };
const response = { model: "pirate", input: CACTUS, max_output_tokens: BRIEFLY, temperature: 0 };
const caller = { model: "caller", messages: user(SPOKEN_ORDER), temperature: 0 };
const place = { type: "function", function: { name: "place_order", parameters: z.toJSONSchema(Order) } };
const calls = { ...caller, tools: [place], tool_choice: "required" };
const asCall = ([{ function: call }]) => ({ name: call.name, arguments: JSON.parse(call.arguments) });

const whole = await client.chat.completions.create(chat);
const chunks = client.chat.completions.stream(chat);
const answered = await client.responses.create(response);
const events = client.responses.stream(response);
const called = await client.chat.completions.create(calls);
const streamedCall = await client.chat.completions.stream(calls).finalMessage();
const parsed = await client.chat.completions.parse({ ...caller, response_format: zodResponseFormat(Order, "order") });
tell({
  plain: [whole.choices[0].message.content, answered.output_text],
  streamed: [await chunks.finalContent(), (await events.finalResponse()).output_text],
  called: asCall(called.choices[0].message.tool_calls),
  streamed_call: asCall(streamedCall.tool_calls),
  structured: parsed.choices[0].message.parsed,
});
