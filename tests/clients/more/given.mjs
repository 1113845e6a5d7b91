// What each script here is given, and how it tells what it got; in its own process, under node. Must not know
// the service: a script is given a URL and texts, as anybody is.
import { readFileSync } from "node:fs";
import { z } from "zod";

const given = JSON.parse(readFileSync(0, "utf8"));
export const V1 = `${given.url}/v1`;
export const CACTUS = given.cactus;
export const SPOKEN_ORDER = given.order;
export const KEY = "none";
export const BRIEFLY = given.tokens; // of an answer

export const Order = z.object({
  name: z.string(),
  item: z.string(),
  quantity: z.number().int(),
  city: z.string(),
});

export function tell(results) {
  console.log(JSON.stringify(results));
}

export async function joined(pieces) {
  let text = "";
  for await (const piece of pieces) text += piece;
  return text;
}
