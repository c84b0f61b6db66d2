// node digest.mjs PAGE CHUNK PROMPT DECODED MODEL.gguf ...: for each file, read in chunks of so many bytes, a line of JSON with the
// digest of its logits and the sizes, or with what is wrong with it.
import { createReadStream, readFileSync } from "node:fs";
import { Readable } from "node:stream";
import { pathToFileURL } from "node:url";

const [page, chunk, prompt, decoded, ...files] = process.argv.slice(2);
const { PackedModel } = await import(pathToFileURL(`${page}/packed.mjs`));
const kernels = readFileSync(`${page}/kernels.wasm`);

for (const path of files) {
  const stream = Readable.toWeb(createReadStream(path, { highWaterMark: Number(chunk) }));
  try {
    const model = await PackedModel.load(stream, kernels);
    const start = performance.now();
    const sha256 = await model.digest(undefined, Number(prompt), Number(decoded));
    const seconds = (performance.now() - start) / 1000;
    console.log(JSON.stringify({ sha256, seconds, file: model.fileBytes, ...model.sizes() }));
  } catch (error) {
    console.log(JSON.stringify({ error: error.message, kind: error.constructor.name }));
  }
}
