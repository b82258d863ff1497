// What both pages share: asking the coordinator, its token, its stream, and words.
// All text of a run is untrusted: it reaches the page only as textContent.

export const ROOT = new URL("..", import.meta.url);
const TOKEN = "switokd-token";
let token = "";
try { token = sessionStorage.getItem(TOKEN) || ""; } catch { /* kept in memory alone */ }

export const find = (id) => document.getElementById(id);

export function element(name, options = {}, ...children) {
  const made = document.createElement(name);
  if (options.text !== undefined) made.textContent = options.text;
  if (options.class) made.className = options.class;
  if (options.href) made.href = options.href;
  if (options.scope) made.scope = options.scope;
  made.append(...children);
  return made;
}

export class NeedsToken extends Error {}
export class NotThere extends Error {}
export class Refused extends Error {}

export async function request(path, more = {}) {
  const headers = { ...(more.headers || {}) };
  if (token) headers.Authorization = `Bearer ${token}`;
  const response = await fetch(new URL(path, ROOT), {
    headers, signal: more.signal, cache: "no-store", credentials: "same-origin", redirect: "error",
  });
  if (response.ok) return response;
  let reason = `status ${response.status}`;
  try { reason = (await response.json()).error || reason; } catch { /* no JSON */ }
  if (response.status === 401) throw new NeedsToken(reason);
  if (response.status === 404 || response.status === 400) throw new NotThere(reason);
  throw new Refused(reason);
}

// Server-sent events by fetch: unlike EventSource it can send a token, which no address may hold.
async function read(path, last, signal, onMessage) {
  const headers = last.id ? { "Last-Event-ID": last.id } : {};
  const guard = new AbortController();
  const stop = () => guard.abort();
  signal.addEventListener("abort", stop);
  let timer = 0;
  // The coordinator sends something every five seconds.
  const expect = () => { clearTimeout(timer); timer = setTimeout(stop, 20000); };
  try {
    expect();
    const response = await request(path, { headers, signal: guard.signal });
    const reader = response.body.getReader();
    const decoder = new TextDecoder();
    let rest = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      expect();
      rest += decoder.decode(value, { stream: true });
      const blocks = rest.split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const fields = {};
        for (const line of block.split("\n")) {
          const colon = line.indexOf(": ");
          if (colon > 0) fields[line.slice(0, colon)] = line.slice(colon + 2);
        }
        if (fields.data === undefined) { onMessage("alive", null); continue; }
        onMessage(fields.event, JSON.parse(fields.data));
        if (fields.id) last.id = fields.id;
      }
    }
  } finally {
    clearTimeout(timer);
    signal.removeEventListener("abort", stop);
    guard.abort();
  }
}

const pause = (seconds) => new Promise((done) => setTimeout(done, seconds * 1000));

export function connection(kind, text) {
  const shown = find("connection");
  if (shown.textContent !== text) shown.textContent = text;
  shown.className = `connection ${kind}`;
}

export function notice(text) {
  const shown = find("notice");
  if (shown.textContent !== text) shown.textContent = text;
  shown.hidden = !text;
}

function askForToken(reason) {
  const form = find("token-form");
  form.hidden = false;
  find("token-wrong").textContent = token ? "This token is not one of the coordinator's." : "";
  if (document.activeElement !== find("token")) find("token").focus();
  connection("", reason);
  return new Promise((done) => {
    form.onsubmit = (event) => {
      event.preventDefault();
      token = find("token").value.trim();
      find("token").value = "";
      try { sessionStorage.setItem(TOKEN, token); } catch { /* kept in memory alone */ }
      form.hidden = true;
      done();
    };
  });
}

// Follow a stream for as long as the page is open: again after a break, and not while it is hidden.
// onMessage(event, data); isOver(): whether nothing more is expected, so that it is asked rarely.
export async function follow(path, onMessage, isOver = () => false) {
  const last = { id: "" };
  let wasThere = false;
  let failures = 0;
  for (;;) {
    if (document.hidden) {
      await new Promise((done) => document.addEventListener("visibilitychange", done, { once: true }));
      continue;
    }
    const hidden = new AbortController();
    const look = () => { if (document.hidden) hidden.abort(); };
    document.addEventListener("visibilitychange", look);
    let isStopping = false;
    try {
      await read(path, last, hidden.signal, (event, data) => {
        if (!wasThere) { find("content").hidden = false; wasThere = true; }
        failures = 0;
        isStopping = event === "stopping";
        notice("");
        connection("live", isOver() ? "the run has ended; the coordinator lives" : "live");
        if (data !== null) onMessage(event, data);
      });
      if (isStopping) gone(wasThere);
      else if (isOver()) connection("live", "the run has ended; the coordinator lives");
    } catch (error) {
      if (error instanceof NeedsToken) { await askForToken(error.message); continue; }
      if (!hidden.signal.aborted) {
        failures += 1;
        if (error instanceof NotThere) {
          notice(wasThere ? `The coordinator no longer has this run; you see its last state. (${error.message})` : error.message);
          connection("", "no such run now");
        } else if (error instanceof Refused) {
          notice(`The coordinator answers, but not with this: ${error.message}`);
          connection("", "waiting");
        } else gone(wasThere);
      }
    } finally {
      document.removeEventListener("visibilitychange", look);
    }
    await pause(isOver() && failures === 0 ? 5 : Math.min(1 + failures, 10));
  }
}

function gone(wasThere) {
  const when = clock(Date.now() / 1000);
  if (!find("connection").classList.contains("gone")) {
    notice(wasThere
      ? `The coordinator is gone since ${when}. You see what it sent last; the page asks again by itself.`
      : "No coordinator answers here. The page asks again by itself.");
  }
  connection("gone", "coordinator gone");
}

export function runAddress(id) { return new URL(`runs/${encodeURIComponent(id)}`, ROOT).href; }

export function number(value, digits = 4) {
  if (value === null || value === undefined) return "–";
  return Number(value).toPrecision(digits).replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, "");
}

export const distance = (value) => (value === null || value === undefined ? "–" : Number(value).toFixed(4));
export const whole = (value) => Number(value).toLocaleString("en");
export const percent = (value) => (value === null || value === undefined ? "–" : `${(100 * value).toFixed(1).replace(".0", "")} %`);

export function duration(seconds) {
  const s = Math.max(0, Math.round(seconds));
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${s % 60} s`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
}

// An estimate: in steps of 5 s, then in whole minutes.
export function roughly(seconds) {
  if (seconds < 57.5) return `${Math.max(5, 5 * Math.round(seconds / 5))} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 60 ? `${minutes} min` : duration(60 * minutes);
}

export const times = (count) => (count === 1 ? "once" : `${whole(count)} times`);

// In the reader's time zone, and in one form everywhere: 2026-11-30 09:05:07.
export function moment(seconds) {
  if (!seconds) return "not known";
  const at = new Date(seconds * 1000);
  const two = (n) => String(n).padStart(2, "0");
  const day = `${at.getFullYear()}-${two(at.getMonth() + 1)}-${two(at.getDate())}`;
  return `${day} ${two(at.getHours())}:${two(at.getMinutes())}:${two(at.getSeconds())}`;
}
export const clock = (seconds) => moment(seconds).split(" ").pop();

export function setText(node, text) { if (node.textContent !== text) node.textContent = text; }
