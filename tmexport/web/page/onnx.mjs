// Runs model.onnx (portable form) with onnxruntime-web. The state goes out of one call and into the next.
import { download } from "./download.mjs";
import * as ort from "./vendor/ort.wasm.min.mjs";

ort.env.wasm.wasmPaths = new URL("./vendor/", import.meta.url).href;
ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency || 1) : 1;

async function bytesOf(answer, onBytes) {
  const parts = [];
  let received = 0;
  for (const reader = answer.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) return new Uint8Array(await new Blob(parts).arrayBuffer());
    parts.push(value);
    onBytes((received += value.length));
  }
}

export async function open(answer, onBytes) {
  const config = await (await download("model.config.json")).json();
  const bytes = await bytesOf(answer, onBytes);
  return new OnnxModel(config, await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] }));
}

class OnnxModel {
  constructor(config, session) {
    this.config = config;
    this.session = session;
    this.grows = config.state.some((s) => s.shape.includes("past"));
    this.reset();
  }

  // The state before the first token: keys and values of attention have no positions yet.
  reset() {
    this.state = this.config.state.map((entry) => {
      const dims = entry.shape.map((d) => (d === "batch" ? 1 : d === "past" ? 0 : d));
      return new ort.Tensor("float32", new Float32Array(dims.reduce((a, b) => a * b, 1)), dims);
    });
  }

  sizes() {
    return { state: 4 * this.state.reduce((sum, tensor) => sum + tensor.data.length, 0) };
  }

  save() {
    return this.state.map(({ data, dims }) => ({ data: data.slice(), dims }));
  }

  restore(state) {
    this.state = state.map(({ data, dims }) => new ort.Tensor("float32", data, dims));
  }

  async read(ids) {
    this.reset();
    return this.#run(ids);
  }

  step(token) {
    return this.#run([token]);
  }

  // Feeds ids; returns the logits of the last position.
  async #run(ids) {
    const feeds = { input_ids: new ort.Tensor("int64", BigInt64Array.from(ids, BigInt), [1, ids.length]) };
    this.config.state.forEach((s, i) => (feeds[s.input] = this.state[i]));
    const results = await this.session.run(feeds);
    this.state = this.config.state.map((s) => results[s.output]);
    return results.logits.data.subarray(-results.logits.dims[2]);
  }
}
