// A Mamba-2 in WebAssembly with its weights packed, one token at a time: runtime_ref's preset `exact`, bit for bit.
import { download } from "./download.mjs";
import { readHeader, Source, TYPES } from "./gguf.mjs";
import { layout } from "./layout.mjs";

const WRONG = ["", "a code that is none", "a scale that is not finite", "scales that differ inside a group"];

export async function open(answer, onBytes) {
  const kernels = await download("kernels.wasm");
  return PackedModel.load(answer.body, await kernels.arrayBuffer(), onBytes);
}

export class PackedModel {
  // stream: of a GGUF; kernels: the bytes of kernels.wasm; onBytes(received).
  static async load(stream, kernels, onBytes) {
    const source = new Source(stream, onBytes);
    const header = await readHeader(source);
    const plan = layout(header);
    const memory = new WebAssembly.Memory({ initial: Math.ceil(plan.end / 65536) });
    const { instance } = await WebAssembly.instantiate(kernels, { env: { memory } });
    const model = new PackedModel(plan, memory, instance.exports);
    for (const info of header.tensors) await model.#read(source, info, plan.places.get(info.name));
    model.fileBytes = source.received;
    return model;
  }

  constructor(plan, memory, kernels) {
    this.plan = plan;
    this.memory = memory;
    this.kernels = kernels;
    this.bytes = new Uint8Array(memory.buffer);
    this.weightBytes = plan.weightBytes;
    this.stateBytes = plan.state[1] - plan.state[0];
    this.logits = new Float32Array(memory.buffer, plan.work.logits, plan.vocab);
  }

  async #read(source, info, place) {
    if (place.kind === "vector" || place.kind === "dense") await this.#readValues(source, info, place);
    else await this.#readTiles(source, info, place);
    // the gap after the last tensor may be missing
    for (let gap = info.gap; gap > 0 && (source.rest.length || (source.rest = (await source.more()) ?? source.rest).length); ) {
      const step = Math.min(gap, source.rest.length);
      source.rest = source.rest.subarray(step);
      gap -= step;
    }
  }

  async #readValues(source, info, place) {
    const step = 2 ** 20;
    for (let done = 0; done < info.bytes; done += step) {
      const part = await source.take(Math.min(step, info.bytes - done), info.name);
      this.bytes.set(part, place.at + done);
    }
    if (place.half && this.kernels.halves(place.at, info.bytes / 2)) throw new Error(`${info.name} holds a value that is not finite`);
    if (!place.transposed) return;
    const [rows, columns] = place.transposed; // [channels, taps] to [taps, channels]
    const to = new Float32Array(this.memory.buffer, place.at, rows * columns);
    const from = to.slice();
    for (let i = 0; i < rows; i++) for (let j = 0; j < columns; j++) to[j * rows + i] = from[i * columns + j];
  }

  async #readTiles(source, info, place) {
    const { rows } = this.plan.work;
    const { k, n, tiles, type, group } = place;
    const rowBytes = (k / TYPES[type][1]) * TYPES[type][2];
    for (let tile = 0; tile < tiles; tile++) {
      const here = Math.min(16, n - 16 * tile);
      const part = await source.take(here * rowBytes, info.name);
      if (here < 16) this.bytes.fill(0, rows, rows + 16 * rowBytes);
      this.bytes.set(part, rows);
      const scales = place.scales + (tile * 32 * k) / group;
      const wrong =
        place.kind === "bytes"
          ? this.kernels.packBytes(rows, k, place.at + tile * 16 * k, scales)
          : this.kernels.packTernary(rows, type, k, group, place.at + tile * 4 * k, scales);
      if (wrong) throw new Error(`${info.name}, rows ${16 * tile} to ${16 * tile + here - 1}: ${WRONG[wrong]}; the file is damaged`);
    }
  }

  // The state before the first token.
  reset() {
    this.bytes.fill(0, ...this.plan.state);
  }

  save() {
    return this.bytes.slice(...this.plan.state);
  }

  restore(state) {
    if (state.length !== this.stateBytes) throw new Error("the kept state is another model's");
    this.bytes.set(state, this.plan.state[0]);
  }

  sizes() {
    return { weights: this.weightBytes, state: this.stateBytes, memory: this.memory.buffer.byteLength };
  }

  // A prompt from the state before the first token; the logits after it.
  async read(ids, breathe) {
    this.reset();
    for (const id of ids.slice(0, -1)) {
      this.step(id, false);
      await breathe();
    }
    return this.step(ids.at(-1));
  }

  // Feeds a token; the logits after it, if they are wanted, are a view that the next call overwrites.
  step(token, wanted = true) {
    const { plan, kernels } = this;
    const { d, eps, work } = plan;
    this.#embed(token);
    plan.layers.forEach((layer, i) => {
      kernels.rmsNorm(work.x, layer.norm, d, eps, work.normed);
      this.#mix(layer);
      kernels.add(work.x, work.out, d);
      if (!kernels.finite(work.x, d)) throw new Error(`layer ${i}'s output holds an Inf or a NaN`);
    });
    if (!wanted) return null;
    kernels.rmsNorm(work.x, plan.finalNorm, d, eps, work.normed);
    this.#multiply(plan.head, work.normed, work.logits);
    return this.logits;
  }

  #embed(token) {
    const { embedding, work, d, vocab } = this.plan;
    if (!(token >= 0 && token < vocab)) throw new Error(`token ${token} is not among the model's ${vocab}`);
    if (embedding.kind === "bytes") this.kernels.bytesRow(embedding.at, embedding.scales, d, token, work.x);
    else if (embedding.half) this.kernels.halfRow(embedding.at, d, token, work.x);
    else this.bytes.copyWithin(work.x, embedding.at + 4 * d * token, embedding.at + 4 * d * (token + 1));
  }

  #mix(layer) {
    const { kernels, plan } = this;
    const { work, inner, channels, heads, taps, width, n, groups, eps } = plan;
    const xbc = work.projected + 4 * inner;
    const b = xbc + 4 * inner;
    const c = b + 4 * groups * n;
    const dt = xbc + 4 * channels;
    this.#multiply(layer.inProj, work.normed, work.projected);
    kernels.convolve(layer.convWeight, layer.convBias, layer.conv, xbc, channels, taps);
    kernels.steps(dt, layer.dtBias, layer.a, work.decay, heads);
    kernels.scan(layer.ssm, xbc, b, c, dt, work.decay, layer.skip, work.y, heads, width, n, groups);
    kernels.gate(work.y, work.projected, inner);
    const part = inner / groups;
    for (let at = 0; at < 4 * inner; at += 4 * part) kernels.rmsNorm(work.y + at, layer.gateNorm + at, part, eps, work.y + at);
    this.#multiply(layer.outProj, work.y, work.out);
  }

  #multiply(matrix, x, y) {
    const { kernels } = this;
    const { q, qScales, qSums } = this.plan.work;
    const { kind, at, scales, tiles, n, k, group, half } = matrix;
    if (kind === "dense") return kernels.dense(at, n, k, half, x, y);
    kernels.quantize(x, k, group, q, qScales, qSums);
    if (kind === "bytes") kernels.bytes(at, scales, tiles, k, q, qScales, y);
    else kernels.ternary(at, scales, tiles, k, group, q, qScales, qSums, y);
  }

  // SHA-256 of the logits as scripts/machines/logit_hashes.py makes it: after each of `prompt` tokens with fixed ids, then of
  // `decoded` more, chosen greedily. breathe: awaited between tokens. The state is afterwards what it was.
  async digest(breathe = async () => {}, prompt = 256, decoded = 64) {
    if (!globalThis.crypto?.subtle) throw new Error("the browser computes digests on https and localhost only");
    const { vocab } = this.plan;
    const kept = this.save();
    const all = new Float32Array((prompt + decoded) * vocab);
    this.reset();
    try {
      for (let i = 0; i < prompt + decoded; i++) {
        const token = i < prompt ? (7919 * i + 11) % vocab : greedy(this.logits);
        all.set(this.step(token), i * vocab);
        await breathe();
      }
    } finally {
      this.restore(kept);
    }
    const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", all));
    return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
  }
}

export function greedy(logits) {
  let best = 0;
  for (let i = 1; i < logits.length; i++) if (logits[i] > logits[best]) best = i;
  return best;
}
