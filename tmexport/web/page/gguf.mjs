// Reads a GGUF (ggml/docs/gguf.md) from a stream: the header, then the tensors' bytes in order. The file is never held whole.

// number -> name, weights a block, bytes a block
export const TYPES = {
  0: ["F32", 1, 4], 1: ["F16", 1, 2], 8: ["Q8_0", 32, 34], 34: ["TQ1_0", 256, 54], 35: ["TQ2_0", 256, 66], 42: ["Q2_0", 64, 18],
};
const WIDTHS = { 0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8 };
const STRING = 8, ARRAY = 9;
const LARGEST_HEADER = 2 ** 28;

class Short extends Error {}

// Bytes of a ReadableStream, so many at a time.
export class Source {
  constructor(stream, onBytes = () => {}) {
    this.reader = stream.getReader();
    this.onBytes = onBytes;
    this.rest = new Uint8Array(0);
    this.received = 0;
  }

  // The next chunk, or null at the end.
  async more() {
    const { done, value } = await this.reader.read();
    if (done) return null;
    this.received += value.length;
    this.onBytes(this.received);
    return value;
  }

  // Exactly count bytes; `what` names them if the stream ends before.
  async take(count, what) {
    if (this.rest.length < count) {
      const parts = [this.rest];
      let length = this.rest.length;
      while (length < count) {
        const part = await this.more();
        if (part === null) throw new Error(`the file ends inside ${what}; it is truncated`);
        parts.push(part);
        length += part.length;
      }
      this.rest = joined(parts, length);
    }
    const taken = this.rest.subarray(0, count);
    this.rest = this.rest.subarray(count);
    return taken;
  }
}

function joined(parts, length) {
  const bytes = new Uint8Array(length);
  let offset = 0;
  for (const part of parts) {
    bytes.set(part, offset);
    offset += part.length;
  }
  return bytes;
}

// {metadata, tensors: [{name, shape (rows first), type, bytes}]}; the source then stands at the first tensor.
export async function readHeader(source) {
  let parts = [], length = 0, tried = 0;
  for (;;) {
    const part = await source.more();
    if (part !== null) {
      parts.push(part);
      length += part.length;
      if (length < 2 * tried) continue; // so that a long header is parsed a few times, not once a chunk
    }
    parts = [joined(parts, length)];
    tried = length;
    try {
      const { start, ...header } = parse(parts[0]);
      source.rest = parts[0].subarray(start);
      return header;
    } catch (error) {
      if (!(error instanceof Short)) throw error;
      if (part === null || length > LARGEST_HEADER) throw new Error("the file ends inside its header; it is truncated or no GGUF");
    }
  }
}

function parse(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  let at = 0;
  const take = (count) => {
    if (!(count <= bytes.length - at)) throw new Short();
    at += count;
    return at - count;
  };
  const u32 = () => view.getUint32(take(4), true);
  const u64 = () => Number(view.getBigUint64(take(8), true));
  const text = () => {
    const length = u64();
    const start = take(length);
    return new TextDecoder().decode(bytes.subarray(start, start + length));
  };
  const scalar = (type) => {
    const where = take(WIDTHS[type]);
    if (type === 6) return view.getFloat32(where, true);
    if (type === 12) return view.getFloat64(where, true);
    if (type === 7) return view.getUint8(where) === 1;
    if (WIDTHS[type] === 8) return Number(type === 10 ? view.getBigUint64(where, true) : view.getBigInt64(where, true));
    const read = { 0: "getUint8", 1: "getInt8", 2: "getUint16", 3: "getInt16", 4: "getUint32", 5: "getInt32" }[type];
    return view[read](where, true);
  };
  const value = (key) => {
    const type = u32();
    if (type === STRING) return text();
    if (type !== ARRAY) {
      if (!(type in WIDTHS)) throw new Error(`the value of ${key} has the unknown type ${type}; the file is damaged`);
      return scalar(type);
    }
    const kind = u32(), count = u64(); // the page needs no array
    if (kind === STRING) for (let i = 0; i < count; i++) take(u64());
    else if (kind in WIDTHS) take(WIDTHS[kind] * count);
    else throw new Error(`the value of ${key} is an array of the unknown type ${kind}; the file is damaged`);
    return undefined;
  };
  const magic = String.fromCharCode(...bytes.subarray(0, 4));
  if (magic !== "GGUF".slice(0, magic.length)) throw new Error("the file is no GGUF: it does not start with GGUF");
  take(4);
  const version = u32();
  if (version !== 2 && version !== 3) throw new Error(`the file is GGUF version ${version}; expected 2 or 3`);
  const nTensors = u64(), nKeys = u64();
  const metadata = Object.create(null), tensors = [];
  for (let i = 0; i < nKeys; i++) {
    const key = text();
    metadata[key] = value(key);
  }
  let expected = 0;
  const alignment = metadata["general.alignment"] ?? 32;
  if (!(alignment >= 8 && alignment <= 2 ** 20 && Number.isInteger(Math.log2(alignment))))
    throw new Error(`general.alignment is ${alignment}; expected a power of two from 8 to ${2 ** 20}`);
  const aligned = (n) => Math.ceil(n / alignment) * alignment;
  for (let i = 0; i < nTensors; i++) {
    const name = text();
    const dimensions = u32();
    if (!(dimensions >= 1 && dimensions <= 4)) throw new Error(`${name} has ${dimensions} dimensions; the file is damaged`);
    const shape = Array.from({ length: dimensions }, u64).reverse();
    const type = u32(), offset = u64();
    if (!(type in TYPES)) {
      const known = Object.values(TYPES).map(([name]) => name).join(", ");
      throw new Error(`${name} has the type ${type}, which this page does not know; it runs ${known}`);
    }
    const [, size, blockBytes] = TYPES[type];
    const weights = shape.reduce((a, b) => a * b, 1);
    if (!(weights > 0) || shape.at(-1) % size) throw new Error(`${name} has the shape ${shape}; the file is damaged`);
    if (offset !== expected) throw new Error(`${name} does not follow the tensor before it; the file is damaged`);
    const length = (weights / size) * blockBytes;
    tensors.push({ name, shape, type, bytes: length, gap: aligned(offset + length) - offset - length });
    expected = aligned(offset + length);
  }
  const start = aligned(at);
  if (start > bytes.length) throw new Short();
  return { metadata, tensors, start };
}
