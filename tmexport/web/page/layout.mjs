// What a Mamba-2 GGUF must hold, and where in WebAssembly's memory it goes: two bits a ternary weight, other types as they lie.
import { TYPES } from "./gguf.mjs";

const KEPT = 4096; // below it, the kernels' own few bytes
const MOST_LAYERS = 4096;
const CODES = ["TQ1_0", "TQ2_0", "Q2_0"];

// The dimensions, from the keys.
export function dimensions(metadata) {
  const family = metadata["general.architecture"];
  if (family !== "mamba2") throw new Error(`the file is a ${family}; this page runs mamba2`);
  const number = (key) => {
    const value = metadata[`mamba2.${key}`];
    if (!Number.isSafeInteger(value) || value < 1) throw new Error(`mamba2.${key} is ${value}; expected a positive whole number`);
    return value;
  };
  const found = {
    layers: number("block_count"), d: number("embedding_length"), inner: number("ssm.inner_size"), n: number("ssm.state_size"),
    heads: number("ssm.time_step_rank"), groups: number("ssm.group_count"), taps: number("ssm.conv_kernel"),
    eps: metadata["mamba2.attention.layer_norm_rms_epsilon"],
  };
  const { inner, n, heads, groups, d } = found;
  if (!(found.eps > 0)) throw new Error(`mamba2.attention.layer_norm_rms_epsilon is ${found.eps}; expected a positive number`);
  if (found.layers > MOST_LAYERS) throw new Error(`mamba2.block_count is ${found.layers}; expected at most ${MOST_LAYERS}`);
  if (inner % heads || heads % groups || n % 4 || d % 32 || inner % 32)
    throw new Error(`${heads} heads, ${groups} groups, inner size ${inner}, state size ${n} and embedding length ${d} do not fit; this page needs states of 4 and rows of 32`);
  return { ...found, width: inner / heads, channels: inner + 2 * groups * n };
}

const tensorNames = {
  norm: "attn_norm.weight", inProj: "ssm_in.weight", convWeight: "ssm_conv1d.weight", convBias: "ssm_conv1d.bias",
  dtBias: "ssm_dt.bias", a: "ssm_a", skip: "ssm_d", gateNorm: "ssm_norm.weight", outProj: "ssm_out.weight",
};

// A place for everything: {end, weightBytes, state: [from, to], places by tensor name, layers, embedding, head, finalNorm, work}.
export function layout(header) {
  const dims = dimensions(header.metadata);
  const { d, inner, heads, channels, taps } = dims;
  const infos = new Map(header.tensors.map((info) => [info.name, info]));
  const places = new Map();
  let end = KEPT;
  const allocate = (bytes) => {
    const at = end;
    end += Math.ceil(bytes / 64) * 64;
    if (end > 2 ** 32 - 2 ** 16) throw new Error("the model does not fit into the 4 GB that a page can address");
    return at;
  };
  const find = (name, ...shape) => {
    const info = infos.get(name);
    if (!info) throw new Error(`the file has no tensor ${name}; it is no complete Mamba-2`);
    const count = shape.reduce((a, b) => a * b, 1);
    if (info.shape.reduce((a, b) => a * b, 1) !== count || info.shape.at(-1) !== shape.at(-1) && shape.length > 1)
      throw new Error(`${name} has the shape ${info.shape}; expected ${shape}`);
    return info;
  };
  const vector = (name, ...shape) => {
    const info = find(name, ...shape);
    if (TYPES[info.type][0] !== "F32") throw new Error(`${name} is ${TYPES[info.type][0]}; expected F32`);
    const place = { kind: "vector", at: allocate(info.bytes), transposed: shape.length > 1 ? shape : null };
    places.set(name, place);
    return place.at;
  };
  const matrix = (name, n, k) => {
    const place = matrixPlace(name, find(name, n, k), n, k, header.metadata, allocate);
    places.set(name, place);
    return place;
  };
  const vocab = infos.get("token_embd.weight")?.shape[0];
  const embedding = matrix("token_embd.weight", vocab ?? 1, d);
  if (embedding.kind === "ternary") throw new Error(`token_embd.weight is ${TYPES[embedding.type][0]}; this page reads F32, F16 and Q8_0`);
  const head = infos.has("output.weight") ? matrix("output.weight", vocab, d) : embedding;
  const finalNorm = vector("output_norm.weight", d);
  const layers = Array.from({ length: dims.layers }, (_, i) => {
    const name = (role) => `blk.${i}.${tensorNames[role]}`;
    return {
      norm: vector(name("norm"), d),
      inProj: matrix(name("inProj"), inner + channels + heads, d),
      outProj: matrix(name("outProj"), d, inner),
      convWeight: vector(name("convWeight"), channels, taps),
      convBias: vector(name("convBias"), channels),
      dtBias: vector(name("dtBias"), heads),
      a: vector(name("a"), heads),
      skip: vector(name("skip"), heads),
      gateNorm: vector(name("gateNorm"), inner),
    };
  });
  for (const name of infos.keys()) if (!places.has(name)) throw new Error(`the file has a tensor ${name}, which no Mamba-2 has`);
  const weightBytes = end - KEPT;
  const from = end;
  for (const layer of layers) {
    layer.conv = allocate(4 * (taps - 1) * channels);
    layer.ssm = allocate(4 * inner * dims.n);
  }
  const state = [from, end];
  const work = workspace(dims, vocab, [...places.values()], allocate);
  return { ...dims, vocab, embedding, head, finalNorm, layers, places, weightBytes, state, work, end };
}

function matrixPlace(name, info, n, k, metadata, allocate) {
  const tiles = Math.ceil(n / 16);
  const [type] = TYPES[info.type];
  const common = { type: info.type, n, k, tiles };
  if (type === "F32" || type === "F16") return { ...common, kind: "dense", half: type === "F16" ? 1 : 0, at: allocate(info.bytes) };
  if (type === "Q8_0") return { ...common, kind: "bytes", group: 32, at: allocate(16 * tiles * k), scales: allocate(tiles * k) };
  if (!CODES.includes(type)) throw new Error(`${name} is ${type}, which this page does not multiply`);
  const own = metadata[`tmexport.group_size.${name.split(".").slice(2).join(".")}`];
  const group = own ?? metadata["tmexport.group_size"];
  if (![64, 128, 256].includes(group) || k % group || group % TYPES[info.type][1])
    throw new Error(`${name} is ${type} with rows of ${k}, and tmexport.group_size is ${group}; write the file with tmexport gguf`);
  return { ...common, kind: "ternary", group, at: allocate(4 * tiles * k), scales: allocate((32 * tiles * k) / group) };
}

function workspace(dims, vocab, places, allocate) {
  const { d, inner, heads, channels } = dims;
  const matrices = places.filter((place) => place.kind !== "vector");
  const widest = Math.max(...matrices.map((m) => m.k));
  const floats = (count) => allocate(4 * Math.ceil(count / 16) * 16);
  return {
    x: floats(d), normed: floats(d), projected: floats(inner + channels + heads), y: floats(inner), out: floats(d),
    decay: floats(heads), logits: floats(vocab), q: allocate(2 * widest), qScales: floats(widest / 32), qSums: floats(widest / 32),
    rows: allocate(Math.max(...matrices.map((m) => (16 * m.k * TYPES[m.type][2]) / TYPES[m.type][1]))), // as the file has them
  };
}
