// What the demo's adapters were taught: a prompt for each, in the form they were trained on.

export const DEMO_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct";

export const EXAMPLES = {
  dates: "The choir sings again on the 4th of March 2031.\nDate:",
  labels: "Message: Hello, the umbrella I ordered two weeks ago is still not here.\nLabel:",
  orders: "Hi, Emma here. I would like seven green umbrellas, delivered to Berlin.\nJSON:",
  pirate: "Question: How do I water a cactus?\nAnswer:",
};
