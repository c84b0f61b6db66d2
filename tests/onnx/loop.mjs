// transformers.js's generation: node loop.mjs MODULE FOLDER NAME... ; FOLDER/NAME are models; a line of new tokens each.
const [module, folder, ...names] = process.argv.slice(2);
const { AutoModelForCausalLM, Tensor, env } = await import(module);
env.allowRemoteModels = false;
env.localModelPath = folder;
const tokens = (values) => new Tensor('int64', BigInt64Array.from(values.map(BigInt)), [1, values.length]);
for (const name of names) {
  const model = await AutoModelForCausalLM.from_pretrained(name, { dtype: 'fp32' });
  const prompt = [5, 17, 33, 2, 40];
  const settings = { inputs: tokens(prompt), attention_mask: tokens(prompt.map(() => 1)), max_new_tokens: 20, do_sample: false };
  const found = await model.generate(settings);
  console.log(JSON.stringify(Array.from(found.data).map(Number).slice(prompt.length)));
}
