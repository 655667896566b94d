// One streamed answer, without a package: ktx serve; node examples/clients/chat.mjs 'What is 7 + 5?'
const url = process.env.KTX_URL ?? 'http://127.0.0.1:10002';
const response = await fetch(`${url}/v1/chat/completions`, {
  method: 'POST',
  headers: { 'Content-Type': 'application/json', Authorization: `Bearer ${process.env.KTX_API_KEY ?? 'none'}` },
  body: JSON.stringify({ messages: [{ role: 'user', content: process.argv[2] ?? 'What is 7 + 5?' }], stream: true }),
});
if (!response.ok) throw new Error((await response.json()).error.message);

let rest = '';
for await (const text of response.body.pipeThrough(new TextDecoderStream())) {
  const events = (rest + text).split('\n\n');
  rest = events.pop();
  for (const event of events) {
    const data = event.replace(/^data: /, '');
    if (data === '[DONE]') break;
    process.stdout.write(JSON.parse(data).choices[0]?.delta.content ?? '');
  }
}
console.log();
