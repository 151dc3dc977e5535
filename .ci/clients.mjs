// A job for two clients of Node, with chat completions or responses: an agent loop of several steps, streamed, and a
// wrong key.
// node clients.mjs openai|openai-responses|ai|ai-responses BASE_URL KEY MODEL
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

// The server keeps what was said: each request has only the results of the calls before it
async function withResponses() {
  const { default: OpenAI } = await import("openai");
  const tools = Object.keys(results).map((name) => ({
    type: "function", name, strict: false,
    parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
  }));
  const api = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
  const calls = [];
  let input = question;
  let previous_response_id;
  for (;;) {
    const request = { model, input, tools, previous_response_id, temperature: 0.7 };
    const response = calls.length === 1
      ? await api.responses.create(request)
      : await api.responses.stream(request).finalResponse();
    previous_response_id = response.id;
    input = [];
    for (const call of response.output.filter((item) => item.type === "function_call")) {
      calls.push(call.name);
      if (JSON.parse(call.arguments).city !== "Paris") throw new Error("wrong arguments");
      input.push({ type: "function_call_output", call_id: call.call_id, output: results[call.name] });
    }
    if (!input.length) break;
  }
  const text = (await api.responses.retrieve(previous_response_id)).output_text;
  await api.responses.delete(previous_response_id);
  const forgotten = await api.responses.retrieve(previous_response_id).then(() => 200, (error) => error.status);
  if (forgotten !== 404) throw new Error(`a response that was deleted: ${forgotten}`);
  const wrong = new OpenAI({ baseURL, apiKey: "wrong", maxRetries: 0 });
  const status = await wrong.responses.create({ model, input: "x" }).then(() => 200, (error) => error.status);
  return { calls, text, status };
}

async function withAISDK(makeProvider) {
  const { streamText, tool, jsonSchema, stepCountIs, generateText } = await import("ai");
  const provider = (key) => makeProvider({ name: "kimi2api", baseURL, apiKey: key });
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

const jobs = {
  "openai": withOpenAI,
  "openai-responses": withResponses,
  "ai": async () => withAISDK((await import("@ai-sdk/openai-compatible")).createOpenAICompatible),
  "ai-responses": async () => withAISDK((await import("@ai-sdk/openai")).createOpenAI),
};
console.log(JSON.stringify(await jobs[client]()));
