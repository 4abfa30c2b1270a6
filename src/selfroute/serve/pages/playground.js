"use strict";
// Asks /v1/chat/completions as any client does, and shows the stream as it comes: who writes, the hand-off, the report
// at the end. All text goes in as text, never as HTML.

const at = (id) => document.getElementById(id);
const [form, prompt, model, policy, bias, dial, go, stop] = ["ask", "prompt", "model", "policy", "bias", "dial", "go", "stop"].map(at);
const [turns, facts, idle, said] = ["turns", "facts", "idle", "said"].map(at);

const EXAMPLES = ["3, 7, 25; target 46", "2, 6, 20; target 23", "4, 9, 11; target 55", "5, 8, 14; target 1"].map((numbers) => {
  const [given, target] = numbers.split("; target ");
  return `Use each of the numbers ${given} exactly once with + - * / and parentheses to make ${target}.`;
});
const WHY = {
  help: "The device asks the cloud",
  undecided: "The device came to no decision: the cloud is asked",
  beyond: "The device cannot serve this: the cloud is asked",
  device: "The device failed: the cloud is asked",
};
const DENIED = {
  share: "the share of requests that may ask is used up",
  usd_per_day: "today's money is used up",
  calls_per_minute: "too many calls this minute",
  store: "the budget could not be asked",
  cloud: "the cloud failed",
  rule: "a rule says that it must not leave",
  privacy: "what must not leave could not be checked",
};

let running = null;
let example = 0;

const ms = (value) => (value == null ? "–" : value < 1000 ? `${value.toFixed(value < 10 ? 1 : 0)} ms` : `${(value / 1000).toFixed(1)} s`);
const nats = (value) => (value == null ? "–" : `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(2)}`);

function element(name, kind, text) {
  const made = document.createElement(name);
  made.className = kind;
  if (text !== undefined) made.textContent = text;
  return made;
}

/** The response on the page: turns of the device and the cloud, and what happened between them. */
class Answer {
  constructor(first) {
    this.began = performance.now();
    this.who = first;
    this.turn = null;
    turns.replaceChildren();
    facts.replaceChildren();
    facts.hidden = idle.hidden = true;
  }

  /** The text of one kind in the turn of whoever is writing. */
  write(kind, text) {
    if (!text) return;
    if (!this.turn) {
      this.turn = element("div", `turn writing ${this.who}`);
      this.turn.append(element("h2", "", this.who === "cloud" ? "Cloud" : "Device"), element("pre", "text reasoning", ""), element("div", "text content", ""));
      turns.append(this.turn);
    }
    const place = this.turn.querySelector(`.${kind}`);
    const below = place.scrollHeight - place.scrollTop - place.clientHeight < 40;
    if (place.firstChild) place.firstChild.appendData(text);
    else place.append(text);
    if (below) place.scrollTop = place.scrollHeight;
  }

  event(kind, text, to) {
    this.rest();
    const line = element("div", `event ${kind}`, text);
    line.append(element("small", "", `after ${ms(performance.now() - this.began)}`));
    turns.append(line);
    said.textContent = text;
    this.who = to;
    this.turn = null;
  }

  rest() {
    if (this.turn) this.turn.classList.remove("writing");
  }

  turned({ turn, why }) {
    if (turn === "cloud") this.event("handed", WHY[why] || "The cloud goes on", "cloud");
    else this.event("denied", `Denied: ${DENIED[why] || why}. The device goes on`, "device");
  }

  report(r, id) {
    const route = { device: "device", cloud: "cloud" }[r.route] || "stopped";
    const chip = element("span", `chip ${r.denied ? "denied" : route}`, r.denied ? "denied" : r.route || "nobody");
    const detail = element("a", "", "in the records");
    detail.href = `/dashboard/requests/${encodeURIComponent(id)}`;
    const rows = [
      ["answered by", chip], ["score l", nats(r.score)], ["cost", `${Number(r.cost_usd.toPrecision(3))} USD`],
      ["first token", ms(this.first)], ["device", ms(r.device.ms)], ["cloud", ms(r.cloud.ms)], ["whole", ms(r.total_ms)],
      ["tokens written", `${r.device.completion_tokens} device, ${r.cloud.completion_tokens} cloud`], ["this request", detail],
    ];
    for (const [name, value] of rows) {
      const row = element("div", "");
      const cell = element("dd", "");
      cell.append(value);
      row.append(element("dt", "", name), cell);
      facts.append(row);
    }
    facts.hidden = false;
    said.textContent = `Answered by the ${r.route || "nobody"}.`;
  }
}

/** The data of a stream's events, whatever its chunks are. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) if (part.startsWith("data: ") && part !== "data: [DONE]") yield JSON.parse(part.slice(6));
  }
}

async function ask() {
  const fixed = model.selectedOptions[0].dataset.fixed;
  const chosen = fixed || policy.value;
  const answer = new Answer(chosen === "cloud-only" ? "cloud" : "device");
  running = new AbortController();
  go.disabled = true;
  stop.disabled = false;
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({
        model: model.value,
        messages: [{ role: "user", content: prompt.value }],
        stream: true,
        selfroute: { policy: chosen, bias: Number(bias.value) },
      }),
      signal: running.signal,
    });
    if (!response.ok) {
      const { error } = await response.json();
      return answer.event("failed", error.message, "device");
    }
    const id = response.headers.get("x-selfroute-request-id") || "";
    for await (const event of events(response.body)) {
      if (event.error) return answer.event("failed", event.error.message, "device");
      if (event.selfroute && event.selfroute.turn) answer.turned(event.selfroute);
      const delta = event.choices.length ? event.choices[0].delta : {};
      if (answer.first === undefined && (delta.reasoning_content || delta.content)) answer.first = performance.now() - answer.began;
      answer.write("reasoning", delta.reasoning_content);
      answer.write("content", delta.content);
      if (event.selfroute && event.selfroute.route !== undefined) answer.report(event.selfroute, id);
    }
  } catch (error) {
    if (error.name === "AbortError") answer.event("stopped", "Stopped: nothing runs on", "device");
    else answer.event("failed", "The gateway does not answer", "device");
  } finally {
    answer.rest();
    running = null;
    go.disabled = false;
    stop.disabled = true;
  }
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (!running) ask();
});
stop.addEventListener("click", () => {
  if (running) running.abort();
  go.disabled = false;
  go.focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  if (event.key === "Escape" && running) running.abort();
});
at("example").addEventListener("click", () => {
  prompt.value = EXAMPLES[example++ % EXAMPLES.length];
  prompt.focus();
});
const turned = () => (dial.textContent = `${nats(Number(bias.value))} nats`);
bias.addEventListener("input", turned);
const choose = () => {
  const fixed = model.selectedOptions[0].dataset.fixed;
  policy.disabled = Boolean(fixed);
};
model.addEventListener("change", choose);
turned();
choose();
