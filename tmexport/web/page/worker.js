// Keeps the page's files, so that it works without its server. A model's address holds its digest: what is kept under it is
// never asked for again. Everything else comes from the server as long as there is one.
const CACHE = "tmexport";

self.addEventListener("install", (event) => event.waitUntil(install()));
self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));
self.addEventListener("fetch", (event) => {
  const sameSite = new URL(event.request.url).origin === self.location.origin;
  if (event.request.method === "GET" && sameSite) event.respondWith(answer(event.request));
});

async function install() {
  const cache = await caches.open(CACHE);
  const page = await (await fetch("page.json")).json();
  await cache.addAll(["./", "page.json", ...page.files]);
  await self.skipWaiting();
}

async function answer(request) {
  const cache = await caches.open(CACHE);
  const isModel = new URL(request.url).searchParams.has("sha256");
  if (isModel) {
    const found = await cache.match(request);
    if (found) return found;
  }
  let fresh;
  try {
    fresh = await fetch(request);
  } catch (error) {
    const found = await cache.match(request);
    if (found) return found;
    throw error;
  }
  if (fresh.ok) await replace(cache, request, fresh.clone(), isModel);
  return fresh;
}

async function replace(cache, request, answer, isModel) {
  if (isModel) await cache.delete(request, { ignoreSearch: true }); // an older model
  cache.put(request, answer).catch(() => {}); // no room: the page works, with its server
}
