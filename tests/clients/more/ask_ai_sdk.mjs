// The Vercel AI SDK, as it is: @ai-sdk/openai by its default, OpenAI's Responses, and @ai-sdk/openai-compatible.
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, streamText, tool } from "ai";
import { BRIEFLY, CACTUS, joined, KEY, Order, SPOKEN_ORDER, tell, V1 } from "./given.mjs";

const WAYS = [
  createOpenAI({ baseURL: V1, apiKey: KEY }),
  createOpenAICompatible({ name: "adapterd", baseURL: V1, apiKey: KEY, supportsStructuredOutputs: true }),
];
const tools = { place_order: tool({ description: "Places an order.", inputSchema: Order }) };
const asCall = ([call]) => ({ name: call.toolName, arguments: call.input });

const told = { plain: [], streamed: [], called: [], streamed_call: [], structured: [], pieces: [] };
for (const server of WAYS) {
  const chat = { model: server("pirate"), prompt: CACTUS, maxOutputTokens: BRIEFLY, temperature: 0 };
  const calls = { model: server("caller"), prompt: SPOKEN_ORDER, tools, toolChoice: "required", temperature: 0 };
  told.plain.push((await generateText(chat)).text);
  told.streamed.push(await joined(streamText(chat).textStream));
  told.called.push(asCall((await generateText(calls)).toolCalls));
  const stream = streamText(calls);
  let pieces = 0;
  for await (const part of stream.fullStream) pieces += part.type === "tool-input-delta";
  told.pieces.push(pieces);
  told.streamed_call.push(asCall(await stream.toolCalls));
  const output = Output.object({ schema: Order });
  const order = { model: server("caller"), prompt: SPOKEN_ORDER, temperature: 0 };
  told.structured.push((await generateText({ ...order, output })).output);
}
tell(told);
