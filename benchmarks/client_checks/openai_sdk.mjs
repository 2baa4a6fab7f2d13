// The official JavaScript SDK, and the `ai` SDK over its OpenAI-compatible provider. Lines of JSON, as checks.py says.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, streamText } from "ai";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const [url, model, folder, which] = process.argv.slice(2);
const row = JSON.parse(readFileSync(join(folder, "questions.json")))[0];
const image = readFileSync(join(folder, row.picture));
const text = `${row.question}\nAnswer the question using a single word or phrase.`;
const seen = z.object({ hand: z.boolean() });

const client = new OpenAI({ baseURL: url, apiKey: "none", maxRetries: 0 });
const image_url = { url: `data:image/png;base64,${image.toString("base64")}` };
const asked = { role: "user", content: [{ type: "text", text }, { type: "image_url", image_url }] };
const chat = async (options = {}, messages = [asked]) =>
  (await client.chat.completions.create({ model, messages, ...options })).choices[0].message;

const openai = {
  "models": async () => (await client.models.retrieve((await client.models.list()).data[0].id)).id,
  "question about an image": async () => (await chat()).content,
  "stream": async () => {
    const stream = await client.chat.completions.create({
      model, messages: [asked], stream: true, stream_options: { include_usage: true },
    });
    let said = "", tokens = 0;
    for await (const chunk of stream) {
      said += chunk.choices[0]?.delta?.content ?? "";
      tokens = chunk.usage?.completion_tokens ?? tokens;
    }
    return tokens > 0 && said;
  },
  "answers as history": async () => (await chat({}, [asked, await chat(), asked])).content,
  "fields that ask for nothing": async () => (await chat({
    tools: [], tool_choice: "none", response_format: { type: "text" }, logit_bias: {}, store: false,
    parallel_tool_calls: true, modalities: ["text"], service_tier: "auto", metadata: { a: "b" }, verbosity: "medium",
    reasoning_effort: "none", audio: null, frequency_penalty: null, stop: null, seed: null, n: null, logprobs: null,
  })).content,
  "field that asks for something": async () => {
    try {
      await chat({ tools: [{ type: "function", function: { name: "f" } }] });
    } catch (error) {
      return error.status === 400 && error.message.includes("not supported") && error.message;
    }
  },
  "max_tokens beyond the context": async () => (await chat({ max_tokens: 4096 })).content,
  "completions": async () =>
    (await client.completions.create({ model, prompt: "A picture of", max_tokens: 8 })).choices[0].text,
  "structured: parse": async () => JSON.stringify((await client.chat.completions.parse({
    model, messages: [asked], response_format: zodResponseFormat(seen, "seen"),
  })).choices[0].message.parsed),
};

const provider = createOpenAICompatible({ name: "magma", baseURL: url, apiKey: "none", supportsStructuredOutputs: true });
const messages = [{ role: "user", content: [{ type: "text", text }, { type: "image", image }] }];
const ai = {
  "generateText": async () => (await generateText({ model: provider(model), messages, maxRetries: 0 })).text,
  "streamText": async () => {
    let said = "";
    for await (const piece of streamText({ model: provider(model), messages, maxRetries: 0 }).textStream) said += piece;
    return said;
  },
  "structured: generateObject": async () =>
    JSON.stringify((await generateObject({ model: provider(model), messages, schema: seen, maxRetries: 0 })).object),
};

for (const [check, work] of Object.entries({ openai, ai }[which])) {
  let ok = false, says;
  try {
    says = await work();
    ok = Boolean(says);
  } catch (error) {
    says = `${error.name}: ${error.message}`;
  }
  console.log(JSON.stringify({ check, ok, says: String(says).slice(0, 300) }));
}
