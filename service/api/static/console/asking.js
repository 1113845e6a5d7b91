// The two ways to send a prompt: as a chat message, in the base's own template, or as plain text to go on from. Draws nothing.

/** A way: `request(prompt, id, values)` → {path, body}; `read(event)` → {more, text, tokens, finish, digest}, each only where the event tells it. */
export const WAYS = {
  chat: {
    title: "chat",
    request: (prompt, id, { max_new_tokens, ...values }) => ({
      path: "v1/chat/completions",
      body: {
        model: id || "base",
        messages: [{ role: "user", content: prompt }],
        max_tokens: max_new_tokens,
        ...values,
        stream: true,
        stream_options: { include_usage: true },
      },
    }),
    read: ({ choices: [choice], usage, adapter }) => ({
      more: choice?.delta.content,
      finish: choice?.finish_reason,
      tokens: usage?.completion_tokens,
      digest: adapter?.digest,
    }),
  },
  plain: {
    title: "plain text",
    request: (prompt, id, values) => ({
      path: "generate_stream",
      body: { inputs: prompt, parameters: { ...(id && { adapter_id: id }), ...values, details: true } },
    }),
    read: ({ token, generated_text, details, adapter }) => ({
      more: token.special ? "" : token.text,
      text: generated_text,
      finish: details?.finish_reason,
      tokens: details?.generated_tokens,
      digest: adapter?.digest,
    }),
  },
};
