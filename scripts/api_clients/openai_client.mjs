// OpenAI's npm package against a server with the built-in model.
import assert from 'node:assert/strict';
import OpenAI from 'openai';

const client = new OpenAI({ baseURL: `${process.env.KTX_URL}/v1`, apiKey: process.env.KTX_API_KEY });
const messages = [{ role: 'user', content: 'What is the opposite of hot?' }];
const cold = 'The opposite of hot is cold.';

const models = await client.models.list();
assert.deepEqual(models.data.map((model) => model.id), ['pip']);

const answer = await client.chat.completions.create({ model: 'pip', messages, temperature: 0 });
assert.equal(answer.choices[0].message.content, cold);

let text = '';
const stream = await client.chat.completions.create({ model: 'pip', messages, temperature: 0, stream: true });
for await (const piece of stream) text += piece.choices[0]?.delta?.content ?? '';
assert.equal(text, cold);

const final = await client.chat.completions.stream({ model: 'pip', messages, temperature: 0 }).finalContent();
assert.equal(final, cold);

const left = await client.chat.completions.create({ model: 'pip', messages, stream: true, max_tokens: 60 });
for await (const piece of left) { if (piece.choices.length) break; }

await assert.rejects(
  client.chat.completions.create({ model: 'pip', messages, temperature: 9 }),
  (error) => error instanceof OpenAI.BadRequestError && error.param === 'temperature',
);
await assert.rejects(
  new OpenAI({ baseURL: client.baseURL, apiKey: 'wrong' }).models.list(),
  (error) => error instanceof OpenAI.AuthenticationError,
);
console.log("openai's npm package understands the server");
