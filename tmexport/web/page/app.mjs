// The page: what is typed and shown. What runs the model is another module, which page.json names.
import { download } from "./download.mjs";
import { keep, kept } from "./storage.mjs";
import { Tokenizer } from "./vendor/tokenizers.min.mjs";

const element = (id) => document.getElementById(id);
const megabytes = (bytes) => (bytes / 1e6).toFixed(bytes < 1e7 ? 2 : 1) + " MB";
const PAINT = 40; // milliseconds between two looks at what the user wants

let page, engine, tokenizer;
let stopped = false;
let text = null; // {prompt, ids, tokens, state}: what the page shows, and the model's state before the last token

function status(message, isError = false) {
  element("status").textContent = message.slice(0, 300); // a file's own names can be long
  element("status").dataset.error = isError;
}

// Let the browser paint and take clicks, if it is time. A timer would wait for 4 ms.
const channel = new MessageChannel();
let painted = performance.now();
async function breathe(always = false) {
  if (!always && performance.now() - painted < PAINT) return false;
  await new Promise((resolve) => {
    channel.port1.onmessage = resolve;
    channel.port2.postMessage(0);
  });
  painted = performance.now();
  return true;
}

async function breatheUnlessStopped() {
  await breathe();
  if (stopped) throw new Error("stopped");
}

// Keeps the page's files for when its server is gone; browsers allow it on https and localhost.
async function keepFiles() {
  if (!("serviceWorker" in navigator)) return;
  try {
    await navigator.serviceWorker.register("worker.js");
    await navigator.serviceWorker.ready;
  } catch (error) {
    console.info(`the page will not work without its server: ${error.message}`);
  }
}

async function load() {
  await keepFiles();
  page = await (await download("page.json")).json();
  tokenizer = new Tokenizer(await (await download("model.tokenizer.json")).json(), {});
  const { open } = await import(page.engine === "packed" ? "./packed.mjs" : "./onnx.mjs");
  let shown = 0;
  engine = await open(await download(`${page.model}?sha256=${page.sha256}`), (received) => {
    if (received - shown < 2 ** 18 && received < page.bytes) return;
    shown = received;
    status(`Loading the model: ${megabytes(received)} of ${megabytes(page.bytes)}`);
  });
  element("size").textContent = megabytes(page.bytes);
  element("digest-row").hidden = !engine.digest;
  if (engine.grows) element("state-of").textContent = "state, which grows with the text";
  text = await kept(page.sha256).catch(() => null);
  if (text) show(true);
  showSizes();
  ready();
}

function ready() {
  status("Ready");
  for (const id of ["go", "digest"]) element(id).disabled = false;
  element("more").disabled = !text;
  element("stop").disabled = true;
}

function showSizes() {
  const { weights, state, memory } = engine.sizes();
  element("state").textContent = megabytes(state);
  element("memory").textContent = weights ? megabytes(weights) : "–";
  element("all-memory").textContent = memory ? megabytes(memory) : "–";
}

function choose(logits, temperature) {
  let best = 0;
  for (let i = 1; i < logits.length; i++) if (logits[i] > logits[best]) best = i;
  if (!(temperature > 0)) return best;
  const weights = Float64Array.from(logits, (x) => Math.exp((x - logits[best]) / temperature));
  let rest = Math.random() * weights.reduce((a, b) => a + b, 0);
  for (let i = 0; i < weights.length; i++) if ((rest -= weights[i]) < 0) return i;
  return best;
}

function show(whole) {
  const decoded = text.tokens.length ? tokenizer.decode(text.tokens, { skip_special_tokens: true, clean_up_tokenization_spaces: false }) : "";
  element("prompt-text").textContent = text.prompt;
  element("text").textContent = whole ? decoded : decoded.replace(/\ufffd+$/, ""); // an unfinished character waits
  element("position").textContent = text.ids.length + text.tokens.length;
  element("output").dataset.tokens = JSON.stringify(text.tokens);
}

async function generate(more) {
  const count = Number(element("count").value);
  const temperature = Number(element("temperature").value);
  if (!more) await start();
  else engine.restore(text.state);
  status("Writing");
  await breathe(true);
  const from = text.tokens.length;
  const time = performance.now();
  let logits = more ? await engine.step(text.tokens.at(-1)) : text.logits;
  for (;;) {
    const token = choose(logits, temperature);
    text.tokens.push(token);
    if (stopped || page.stop.includes(token) || text.tokens.length - from >= count) break;
    logits = await engine.step(token);
    if (await breathe()) {
      show(false);
      showRate("rate", text.tokens.length - from, time);
    }
  }
  showRate("rate", text.tokens.length - from, time);
  show(true);
  text = { prompt: text.prompt, ids: text.ids, tokens: text.tokens, state: engine.save() };
  showSizes();
  await keep(page.sha256, text).catch((error) => console.info(`the state is not kept: ${error.message}`));
}

async function start() {
  const prompt = element("prompt").value;
  const ids = tokenizer.encode(prompt, { add_special_tokens: false }).ids;
  if (!ids.length) throw new Error("type at least one character");
  text = { prompt, ids, tokens: [] };
  show(true);
  status("Reading the prompt");
  await breathe(true);
  const time = performance.now();
  text.logits = await engine.read(ids, breatheUnlessStopped);
  showRate("prefill", ids.length, time);
}

function showRate(id, count, since) {
  element(id).textContent = ((1000 * count) / (performance.now() - since)).toFixed(1);
}

async function digest() {
  status("Computing the digest");
  element("sha256").textContent = await engine.digest(breatheUnlessStopped);
}

async function run(action) {
  stopped = false;
  for (const id of ["go", "more", "digest"]) element(id).disabled = true;
  element("stop").disabled = false;
  try {
    await action();
    ready();
  } catch (error) {
    if (text && !text.state) text = null;
    ready();
    status(error.message, true);
  }
}

element("form").addEventListener("submit", (event) => {
  event.preventDefault();
  run(() => generate(false));
});
element("more").addEventListener("click", () => run(() => generate(true)));
element("digest").addEventListener("click", () => run(digest));
element("stop").addEventListener("click", () => (stopped = true));
load().catch(async (error) => {
  status(error.message, true);
  await self.caches?.delete("tmexport"); // a model that does not load is not kept
});
