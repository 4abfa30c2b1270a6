"use strict";
// Brings #live up to date every two seconds. Elements that stay are changed in place and never moved, so that focus,
// selection, scrolling and what was opened stay as they are; where nothing differs, nothing is touched.

const live = document.getElementById("live");
const state = document.getElementById("state");
const pause = document.getElementById("pause");
let paused = false;
let timer = 0;

const keyOf = (node) => (node.nodeType === Node.ELEMENT_NODE ? node.id : "");

/** The sibling from `at` on that is the same thing as `fresh`: of its id, or where it has none, the next one. */
function counterpart(at, fresh) {
  const key = keyOf(fresh);
  let found = at;
  while (key && found && keyOf(found) !== key) found = found.nextSibling;
  return found && found.nodeName === fresh.nodeName && keyOf(found) === key ? found : null;
}

function update(old, fresh) {
  if (old.nodeType !== Node.ELEMENT_NODE) {
    if (old.nodeValue !== fresh.nodeValue) old.nodeValue = fresh.nodeValue;
    return;
  }
  if (old.isEqualNode(fresh)) return;
  // What somebody opened stays open.
  for (const { name } of [...old.attributes]) if (!fresh.hasAttribute(name) && name !== "open") old.removeAttribute(name);
  for (const { name, value } of fresh.attributes) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  children(old, fresh);
}

function children(old, fresh) {
  let at = old.firstChild;
  for (const next of [...fresh.childNodes]) {
    const same = counterpart(at, next);
    if (!same) {
      old.insertBefore(next, at);
      continue;
    }
    while (at !== same) {
      const gone = at;
      at = at.nextSibling;
      gone.remove();
    }
    update(same, next);
    at = same.nextSibling;
  }
  while (at) {
    const gone = at;
    at = at.nextSibling;
    gone.remove();
  }
}

function say(text, lost) {
  if (state.textContent !== text) state.textContent = text;
  state.classList.toggle("lost", lost);
}

async function refresh() {
  clearTimeout(timer);
  let wait = 2000;
  if (!paused && !document.hidden) {
    try {
      const answer = await fetch(live.dataset.source, { cache: "no-store", signal: AbortSignal.timeout(10000) });
      if (answer.status === 401) return location.reload();
      if (!answer.ok) throw new Error(answer.statusText);
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      if (!paused) {
        children(live, page.body);
        say(`live · ${new Date().toISOString().slice(11, 19)}`, false);
      }
    } catch {
      say("The gateway does not answer; trying again", true);
      wait = 5000;
    }
  }
  timer = setTimeout(refresh, wait);
}

pause.hidden = false;
pause.addEventListener("click", () => {
  paused = !paused;
  pause.setAttribute("aria-pressed", String(paused));
  pause.textContent = paused ? "Go on" : "Pause";
  if (paused) say("paused", false);
  else refresh();
});
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) refresh();
});
// Time changes every two seconds, and would be read out each time.
state.removeAttribute("role");
refresh();
