// The page: which conversation is shown, and what happens when somebody does something.

import * as api from "./api.js";
import { Chat } from "./chat.js";
import { icon, make, stored } from "./dom.js";
import { CacheMap } from "./map.js";
import { Thread } from "./thread.js";

const $ = (id) => document.getElementById(id);
const running = new Set(); // conversations whose answers come, whether they are shown or not
let chat = new Chat();
let list = [];

const thread = new Thread($("thread"), $("scroll"), { edit, regenerate, fork });
const map = new CacheMap($("map-body"), {
  reveal(turn, role) {
    fold("map", false);
    thread.reveal(turn, role);
  },
  // another program has answered: what it said is read
  idle: (ended) => ended === chat && open(chat.id, true),
});

// showing

function show(next) {
  keepDraft();
  chat = next;
  thread.show(chat);
  map.show(chat);
  if (location.hash.slice(1) !== chat.id) history.pushState(null, "", chat.id ? `#${chat.id}` : location.pathname + location.search);
  message.value = stored.get(draftName());
  grow();
  update();
}

function update() {
  const title = chat.messages.find(({ role }) => role === "user")?.content || "New conversation";
  const short = title.split(/\s+/).join(" ").slice(0, 80);
  $("title").textContent = short;
  document.title = chat.id || chat.messages.length ? `${short} – kvlocal` : "kvlocal";
  $("send").hidden = Boolean(chat.running);
  $("stop").hidden = !chat.running;
  $("note").hidden = !chat.isFork;
  $("note").textContent = "A fork: it begins with your next message, and the other conversation stays as it is.";
  drawList();
}

let frame = 0;
function draw() {
  frame ||= requestAnimationFrame(() => {
    frame = 0;
    thread.update();
  });
}

function drawList() {
  const now = Date.now() / 1000;
  const rows = list.map(({ id, title, turns, last_used, answering }) => {
    const shown = id === chat.id;
    const words = [`${turns} turn${turns === 1 ? "" : "s"}`, answering ? "answering" : ago(now - last_used)];
    const link = { href: `#${id}`, "aria-current": shown ? "page" : undefined, onclick: () => fold("sidebar", false) };
    const button = { type: "button", class: "icon", "aria-label": `Delete “${title}”`, title: "Delete", onclick: () => remove(id, title) };
    return make(
      "li",
      { class: shown ? "current" : "" },
      make("a", link, make("span", {}, title || "…"), make("small", { class: "quiet" }, words.join(" · "))),
      make("button", button, icon("remove")),
    );
  });
  // whoever moves through the list by keyboard stays where he was
  const focused = [...$("conversations").querySelectorAll("a, button")].indexOf(document.activeElement);
  $("conversations").replaceChildren(...rows);
  if (focused >= 0) $("conversations").querySelectorAll("a, button")[focused]?.focus();
  $("none").hidden = list.length > 0;
}

function ago(seconds) {
  if (seconds < 60) return "just now";
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h ago`;
  return new Date(Date.now() - 1000 * seconds).toLocaleDateString();
}

async function refresh() {
  try {
    list = await api.conversations();
  } catch (error) {
    complain(error);
    return;
  }
  drawList();
}

function say(text) {
  $("status").textContent = text;
}

function complain(error) {
  $("complaint").textContent = error.message;
  $("complaint").hidden = false;
  setTimeout(() => ($("complaint").hidden = true), 8000);
}

// conversations

let openings = 0;

async function open(id, again = false) {
  const round = ++openings;
  const known = [...running].find((each) => each.id === id);
  if (known || (id === chat.id && !again)) {
    if (known && known !== chat) show(known);
    return;
  }
  if (!id) {
    show(new Chat());
    return;
  }
  try {
    const messages = await api.messages(id);
    if (round !== openings) return;
    if (again) {
      chat.messages = messages;
      thread.update();
      refresh();
    } else show(new Chat(id, messages));
  } catch (error) {
    // one that is not there any more
    if (round !== openings) return;
    complain(error);
    show(new Chat());
  }
}

async function send(text) {
  chat.messages.push({ role: "user", content: text });
  await answer(text);
}

/** text: what is new, if it is not only another answer. */
async function answer(text = "") {
  const answered = chat;
  const draft = draftName();
  running.add(answered);
  answered.unsent = text;
  keepDraft();
  answered.isFork = false;
  const work = answered.answer((what) => {
    const shown = answered === chat;
    if (what === "begun") {
      // a new conversation has a name now, and the server has what was said
      stored.set(draft, "");
      answered.unsent = "";
      if (shown) {
        keepDraft();
        // after an edit the way back leads to the conversation as it was
        const enter = location.hash ? "pushState" : "replaceState";
        if (location.hash.slice(1) !== answered.id) history[enter](null, "", `#${answered.id}`);
        map.look();
      }
      refresh();
    }
    if (shown) draw();
  });
  update();
  thread.update();
  thread.toEnd();
  map.look();
  say("The answer comes.");
  await work;
  running.delete(answered);
  const last = answered.messages.at(-1);
  if (last.error && !last.content) answered.unsent = text;
  if (answered === chat) {
    if (!answered.id) history.replaceState(null, "", location.pathname + location.search);
    thread.update();
    update();
    map.look();
    keepDraft();
    say(last.error ?? "The answer is there.");
  }
  refresh();
}

function edit(i, text) {
  if (chat.running) return;
  chat.cut(i);
  send(text);
  message.focus();
}

function regenerate(i) {
  if (chat.running) return;
  chat.cut(i);
  answer();
  message.focus();
}

function fork(i) {
  show(chat.fork(i + 1));
  message.focus();
}

async function remove(id, title) {
  $("confirm-text").textContent = `“${title}” is removed from memory and from the disk.`;
  const dialog = $("confirm-dialog");
  dialog.returnValue = "cancel";
  dialog.showModal();
  await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
  if (dialog.returnValue !== "yes") return;
  try {
    await api.remove(id);
    list = list.filter((each) => each.id !== id);
    if (id === chat.id) show(new Chat());
    message.focus();
  } catch (error) {
    complain(error);
  }
  refresh();
}

// the box to write in

const message = $("message");
const draftName = () => `kvlocal-draft-${chat.id || "new"}`;

/** What is in the box, or else what was sent and the server has not got, would be gone with the page. */
function keepDraft() {
  stored.set(draftName(), message.value || chat.unsent);
}

function grow() {
  message.style.height = "auto";
  message.style.height = `${Math.min(message.scrollHeight, innerHeight / 3)}px`;
}

message.addEventListener("input", () => {
  grow();
  keepDraft();
});
message.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("composer").requestSubmit();
  }
});
$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = message.value.trim();
  if (!text || chat.running) return;
  message.value = "";
  grow();
  send(text);
});
$("stop").addEventListener("click", () => {
  chat.stop();
  message.focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
  if (chat.running) {
    chat.stop();
    message.focus();
  } else {
    fold("sidebar", false);
    fold("map", false);
  }
});
$("new").addEventListener("click", () => {
  fold("sidebar", false);
  show(new Chat());
  message.focus();
});

// narrow screens: the list and the map are laid over the conversation

function fold(name, isOpen) {
  if ($(name).classList.contains("open") === isOpen) return;
  $(name).classList.toggle("open", isOpen);
  $(`open-${name}`).setAttribute("aria-expanded", String(isOpen));
  $("shade").hidden = !document.querySelector("#sidebar.open, #map.open");
  (isOpen ? $(`close-${name}`) : $(`open-${name}`)).focus();
}
for (const name of ["sidebar", "map"]) {
  $(`open-${name}`).addEventListener("click", () => fold(name, true));
  $(`close-${name}`).addEventListener("click", () => fold(name, false));
}
$("shade").addEventListener("click", () => {
  fold("sidebar", false);
  fold("map", false);
});

// the link of the keyboard past the list; an address with # is a conversation
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  message.focus();
});

// the key

api.onKeyWanted(async (wasWrong) => {
  const dialog = $("key-dialog");
  $("key-wrong").hidden = !wasWrong;
  $("key").value = "";
  // nothing works without one, so Escape does not lead past it
  dialog.addEventListener("cancel", (event) => event.preventDefault());
  do {
    dialog.showModal();
    await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
  } while (!$("key").value.trim());
  return $("key").value.trim();
});

// the beginning

for (const button of document.querySelectorAll("[data-icon]")) button.append(icon(button.dataset.icon));
addEventListener("hashchange", () => open(location.hash.slice(1)));
addEventListener("focus", refresh);
document.addEventListener("visibilitychange", () => document.hidden || map.look());

const first = location.hash.slice(1);
thread.show(chat);
map.show(chat);
message.value = stored.get(draftName());
update();
message.focus();
await refresh();
if (first) await open(first);
try {
  $("model").textContent = (await api.props()).model_alias;
} catch (error) {
  complain(error);
}
