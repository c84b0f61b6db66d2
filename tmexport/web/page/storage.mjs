// What the browser keeps between two visits: for a model, by its file's digest, a text and the state after it.
const request = (asked) =>
  new Promise((resolve, reject) => {
    asked.onsuccess = () => resolve(asked.result);
    asked.onerror = () => reject(asked.error);
  });

async function store(mode) {
  const opening = indexedDB.open("tmexport", 1);
  opening.onupgradeneeded = () => opening.result.createObjectStore("states");
  return (await request(opening)).transaction("states", mode).objectStore("states");
}

export const kept = async (model) => (await request((await store("readonly")).get(model))) ?? null;
export const keep = async (model, text) => request((await store("readwrite")).put(text, model));
