// A job for two clients of Node: an agent loop of several steps, streamed, and a wrong key.
// node clients.mjs openai|ai BASE_URL KEY MODEL
const [client, baseURL, apiKey, model] = process.argv.slice(2);
const question = "Find out how Paris is and book it.";
const results = { get_weather: "21 degrees", book: "order 7" };

async function withOpenAI() {
  const { default: OpenAI } = await import("openai");
  const tools = Object.keys(results).map((name) => ({
    type: "function",
    function: { name, parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] } },
  }));
  const api = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
  const messages = [{ role: "user", content: question }];
  const calls = [];
  for (;;) {
    const stream = api.chat.completions.stream({ model, messages, tools, temperature: 0.7 });
    const message = await stream.finalMessage();
    messages.push(message);
    if (!message.tool_calls?.length) break;
    for (const call of message.tool_calls) {
      calls.push(call.function.name);
      if (JSON.parse(call.function.arguments).city !== "Paris") throw new Error("wrong arguments");
      messages.push({ role: "tool", tool_call_id: call.id, content: results[call.function.name] });
    }
  }
  const wrong = new OpenAI({ baseURL, apiKey: "wrong", maxRetries: 0 });
  const status = await wrong.models.list().then(() => 200, (error) => error.status);
  return { calls, text: messages.at(-1).content, status };
}

async function withAISDK() {
  const { streamText, tool, jsonSchema, stepCountIs, generateText } = await import("ai");
  const { createOpenAICompatible } = await import("@ai-sdk/openai-compatible");
  const provider = (key) => createOpenAICompatible({ name: "kimi2api", baseURL, apiKey: key });
  const calls = [];
  const tools = Object.fromEntries(Object.keys(results).map((name) => [name, tool({
    inputSchema: jsonSchema({ type: "object", properties: { city: { type: "string" } }, required: ["city"] }),
    execute: async ({ city }) => {
      calls.push(name);
      if (city !== "Paris") throw new Error("wrong arguments");
      return results[name];
    },
  })]));
  const { textStream } = streamText({
    model: provider(apiKey)(model), prompt: question, tools, stopWhen: stepCountIs(5), maxRetries: 0, temperature: 0.7,
  });
  let text = "";
  for await (const part of textStream) text += part;
  const status = await generateText({ model: provider("wrong")(model), prompt: "x", maxRetries: 0 })
    .then(() => 200, (error) => error.statusCode);
  return { calls, text: text.replace("Nice.", ""), status };
}

console.log(JSON.stringify(await (client === "openai" ? withOpenAI() : withAISDK())));
