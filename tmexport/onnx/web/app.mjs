// Runs model.onnx (portable form) with onnxruntime-web. The state goes out of one call and into the next.
import * as ort from "./vendor/ort.wasm.min.mjs";
import { Tokenizer } from "./vendor/tokenizers.min.mjs";

const element = (id) => document.getElementById(id);
const megabytes = (bytes) => (bytes / 1e6).toFixed(bytes < 1e7 ? 2 : 1) + " MB";
const LONGEST_CHARACTER = 8; // tokens held back for an unfinished character

ort.env.wasm.wasmPaths = new URL("./vendor/", import.meta.url).href;
ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency || 1) : 1;

let session, tokenizer, config;
let stopped = false;

function status(text, isError = false) {
  element("status").textContent = text;
  element("status").dataset.error = isError;
}

async function download(name) {
  const answer = await fetch(name);
  if (!answer.ok) throw new Error(`${name}: ${answer.status} ${answer.statusText}`);
  return answer;
}

async function downloadWithProgress(name) {
  const answer = await download(name);
  const total = Number(answer.headers.get("Content-Length")) || 0;
  const parts = [];
  let received = 0;
  for (const reader = answer.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    received += value.length;
    status(`Loading the model: ${megabytes(received)}${total ? ` of ${megabytes(total)}` : ""}`);
  }
  const bytes = new Uint8Array(received);
  let offset = 0;
  for (const part of parts) {
    bytes.set(part, offset);
    offset += part.length;
  }
  return bytes;
}

async function load() {
  config = await (await download("model.config.json")).json();
  tokenizer = new Tokenizer(await (await download("model.tokenizer.json")).json(), {});
  const bytes = await downloadWithProgress("model.onnx");
  element("size").textContent = megabytes(bytes.length);
  showState(newState());
  status("Preparing the model");
  session = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
  element("go").disabled = false;
  status("Ready");
}

// The state before the first token: keys and values of attention have no positions yet.
const dims = (entry) => entry.shape.map((d) => (d === "batch" ? 1 : d === "past" ? 0 : d));
const elements = (entry) => dims(entry).reduce((a, b) => a * b, 1);

function newState() {
  return config.state.map((s) => new ort.Tensor("float32", new Float32Array(elements(s)), dims(s)));
}

function showState(state) {
  if (config.state.some((s) => s.shape.includes("past"))) element("state-of").textContent = "state, which grows with the text";
  element("state").textContent = megabytes(4 * state.reduce((sum, tensor) => sum + tensor.data.length, 0));
}

// Feed ids; returns the logits of the last position and the next state.
async function step(ids, state) {
  const feeds = { input_ids: new ort.Tensor("int64", BigInt64Array.from(ids, BigInt), [1, ids.length]) };
  config.state.forEach((s, i) => (feeds[s.input] = state[i]));
  const results = await session.run(feeds);
  const vocab = results.logits.dims[2];
  return { logits: results.logits.data.subarray(-vocab), state: config.state.map((s) => results[s.output]) };
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

function show(prompt) {
  const output = element("output");
  const start = document.createElement("span");
  start.className = "prompt";
  start.textContent = prompt;
  const text = document.createElement("span");
  text.id = "text";
  output.replaceChildren(start, text);
  return text;
}

async function generate() {
  const prompt = element("prompt").value;
  const count = Number(element("count").value);
  const temperature = Number(element("temperature").value);
  const ids = tokenizer.encode(prompt, { add_special_tokens: false }).ids;
  if (!ids.length) return status("Type at least one character", true);
  const text = show(prompt);
  const tokens = [];
  status("Reading the prompt");
  await breathe();
  let time = performance.now();
  let { logits, state } = await step(ids, newState());
  element("prefill").textContent = ((1000 * ids.length) / (performance.now() - time)).toFixed(1);
  status("Writing");
  time = performance.now();
  let pending = 0;
  while (!stopped) {
    const token = choose(logits, temperature);
    tokens.push(token);
    const decoded = tokenizer.decode(tokens, { skip_special_tokens: true, clean_up_tokenization_spaces: false });
    if (!decoded.endsWith("\ufffd") || ++pending >= LONGEST_CHARACTER) {
      text.textContent = decoded;
      pending = 0;
    }
    element("position").textContent = ids.length + tokens.length;
    showState(state);
    if (token === config.model.eos_token_id || tokens.length >= count) break;
    ({ logits, state } = await step([token], state));
    element("rate").textContent = ((1000 * tokens.length) / (performance.now() - time)).toFixed(1);
    await breathe();
  }
  element("output").dataset.tokens = JSON.stringify(tokens);
  status("Ready");
}

// Let the browser paint and take clicks.
const breathe = () => new Promise((resolve) => setTimeout(resolve, 0));

element("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  stopped = false;
  element("go").disabled = true;
  element("stop").disabled = false;
  try {
    await generate();
  } catch (error) {
    status(String(error), true);
  } finally {
    element("go").disabled = false;
    element("stop").disabled = true;
  }
});
element("stop").addEventListener("click", () => (stopped = true));
load().catch((error) => status(String(error), true));
