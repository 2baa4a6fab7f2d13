// The server's limits: magma_jax.data.images, ImageRules and ServerConfig; a test compares them.
const KINDS = { PNG: /^\x89PNG/, JPEG: /^\xff\xd8\xff/, WEBP: /^RIFF.{4}WEBP/s, GIF: /^GIF8/, BMP: /^BM/ };
const LIMITS = { pixels: 40_000_000, bytes: 10 * 2 ** 20, body: 32 * 2 ** 20 };
const PREVIEW = 768;  // pixels of the longer side
const LINK = /\b(https?|ftp|file):\/\/\S|\bdata:image\//i;
const NO_LINKS = "Links are refused: this page fetches nothing. Save the image and add the file, or copy the image and paste it.";

const $ = (id) => document.getElementById(id);
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const element = (tag, properties, ...children) => {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
};

let model = null, key = null, running = null;

// The server. URLs are absolute: browsers refuse relative ones if the page's address contains a password.
const base = location.origin + location.pathname.replace(/\/?$/, "/");

async function call(route, body, signal) {
  const headers = {};
  if (typeof body === "string") headers["Content-Type"] = "application/json";  // a form brings its own type
  // Sent as a password, which may contain any character, unlike a bearer token.
  if (key !== null) headers.Authorization = "Basic " + btoa(String.fromCharCode(...new TextEncoder().encode(":" + key)));
  let response;
  try {
    response = await fetch(base + route, {
      method: body ? "POST" : "GET", headers, body, signal, credentials: key === null ? "same-origin" : "omit",
    });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error("the server cannot be reached; is it running?");
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => null);
  const advice = {
    401: "open this page with the key behind its address, as #key=...",
    413: "take smaller or fewer images", 429: "try again in a moment", 503: "try again in a moment",
  }[response.status];
  const reason = said?.error?.message || `the server answers ${response.status} ${response.statusText}`.trim();
  throw Object.assign(new Error(advice ? `${reason}; ${advice}` : reason), { reason, status: response.status });
}

async function connect() {
  try {
    model = (await (await call("v1/models")).json()).data[0].id;
    $("name").textContent = document.title = model;
    if (!running) say("ready");
  } catch (error) {
    const again = !(error.status < 500);  // the server may be starting
    if (!running) say(again && error.reason || error.message, error.status !== 503);
    if (again) setTimeout(connect, 1000);
  }
}

// A key in the address, #key=..., stays in this browser: the fragment is never sent.
function takeKey() {
  if (!location.hash.startsWith("#key=")) return;
  key = location.hash.slice(5);
  try { key = decodeURIComponent(key); } catch { /* a literal percent sign */ }
  history.replaceState(null, "", location.pathname + location.search);
  connect();
}

const BROKEN = "the connection broke off before the answer was complete";

function read(json) {
  try { return JSON.parse(json); } catch { throw new Error("what the server sent cannot be read"); }
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : new Error(BROKEN);
    });
    if (done) return;
    buffer += value;
    let end;
    while ((end = buffer.indexOf("\n\n")) >= 0) {
      const data = buffer.slice(0, end).replace(/^(event: .*\n)?data: /, "");
      buffer = buffer.slice(end + 2);
      if (data !== "[DONE]") yield read(data);
    }
  }
}

function say(text, bad = false) {
  if ($("status").textContent !== text) $("status").textContent = text;  // screen readers announce every change
  $("status").classList.toggle("error", bad);
}

// The numbers of a section that opens, by name, without empty fields; null after it has shown one that is wrong.
function numbers(section) {
  const found = {};
  for (const input of all("input[type=number]", $(section))) {
    if (!input.checkValidity()) {
      $(section).open = true;
      input.reportValidity();
      say(`${input.parentNode.firstChild.textContent}: ${input.validationMessage}`, true);
      return null;
    }
    if (input.value) found[input.id] = Number(input.value);
  }
  return found;
}

// Reads an image to send, with a preview as the model gets it: an animation gives its first frame.
async function readImage(file) {
  let head;
  try {
    head = String.fromCharCode(...new Uint8Array(await file.slice(0, 12).arrayBuffer()));
  } catch {
    throw new Error("it cannot be read; is it a folder?");
  }
  if (!file.size) throw new Error("it is empty");
  if (!Object.values(KINDS).some((kind) => kind.test(head))) {
    const kind = file.type && !KINDS[file.type.replace("image/", "").toUpperCase()] ? `, but ${file.type}` : ", by its content";
    throw new Error(`it is no image of a kind that is taken (${Object.keys(KINDS).join(", ")})${kind}`);
  }
  if (file.size > LIMITS.bytes) {
    throw new Error(`it has ${(file.size / 2 ** 20).toFixed(1)} MB, an image may have ${LIMITS.bytes / 2 ** 20} MB`);
  }
  const bitmap = await createImageBitmap(file).catch(() => { throw new Error("it is damaged, or no image"); });
  const { width, height } = bitmap;
  if (width * height > LIMITS.pixels) {
    throw new Error(`it has ${Math.ceil(width * height / 1e6)} megapixels, an image may have ${LIMITS.pixels / 1e6}`);
  }
  const scale = Math.min(1, PREVIEW / Math.max(width, height));
  const canvas = element("canvas", { width: Math.max(1, Math.round(width * scale)), height: Math.max(1, Math.round(height * scale)) });
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  const image = await new Promise((done, fail) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = () => fail(new Error("it cannot be read"));
    reader.readAsDataURL(file);
  });
  return { image, canvas };
}

// Connects, with the key in the address if there is one.
function begin() {
  if (document.URL.startsWith(location.origin)) {
    addEventListener("hashchange", takeKey);
    takeKey();
    if (key === null) connect();
  } else {
    // Removes a password from the address; the browser remembers it.
    location.replace(base + location.search + location.hash);
  }
}
