// The messages of a conversation, and what can be done with each.

import { make } from "./dom.js";
import { render } from "./markdown.js";
import { split, turns } from "./chat.js";

const NAMES = { user: "You", assistant: "Answer", system: "System prompt", tool: "Tool" };
const NEAR = 80; // pixels from the end, within which the view follows what comes

export class Thread {
  /** actions: edit(index, text), regenerate(index), fork(index), looked(turn, role): what the page does */
  constructor(element, scroll, actions) {
    Object.assign(this, { element, scroll, actions, chat: null, shown: [] });
  }

  /** Shows a conversation from anew. */
  show(chat) {
    this.chat = chat;
    this.shown = [];
    this.element.replaceChildren();
    this.update();
    this.toEnd();
  }

  toEnd() {
    this.scroll.scrollTop = this.scroll.scrollHeight;
  }

  /** Shows what is new. */
  update() {
    const { messages, running } = this.chat;
    const follows = this.scroll.scrollHeight - this.scroll.scrollTop - this.scroll.clientHeight < NEAR;
    const numbers = turns(messages);
    while (this.shown.length > messages.length) this.shown.pop().element.remove();
    messages.forEach((message, i) => {
      const isLast = i === messages.length - 1;
      const { role, content, thought, error, end } = message;
      const state = JSON.stringify([role, content, thought, error, end, isLast, Boolean(running), this.chat.begun]);
      if (this.shown[i]?.state === state) return;
      const element = this.message(message, i, numbers[i], isLast);
      if (!this.shown[i]) {
        this.element.append(element);
        this.shown[i] = { state, element };
      } else this.shown[i] = { state, element: changed(this.shown[i].element, element) };
    });
    this.element.setAttribute("aria-busy", String(Boolean(running)));
    if (!messages.length) {
      if (!this.element.firstChild) this.element.append(welcome());
    } else this.element.querySelector(".welcome")?.remove();
    if (follows) this.toEnd();
  }

  message(message, i, turn, isLast) {
    const { running } = this.chat;
    const isAnswer = message.role === "assistant";
    const { thought, text } = isAnswer ? split(message.content) : { thought: "", text: message.content ?? "" };
    const comes = isAnswer && isLast && running;
    const body = make("div", { class: "text" });
    const thinks = Boolean(comes && !text);
    const allThought = message.thought || thought;
    if (allThought) {
      const properties = { class: "thought", open: thinks, "data-thinks": String(thinks) };
      body.append(make("details", properties, make("summary", {}, "Thought"), make("div", {}, render(allThought))));
    }
    if (isAnswer) body.append(render(text));
    else body.append(make("div", { class: "as-typed" }, text));
    for (const { function: called } of message.tool_calls ?? []) {
      body.append(make("pre", { tabIndex: 0 }, make("code", {}, `${called?.name}(${called?.arguments})`)));
    }
    if (comes) {
      if (!text && !allThought) body.append(make("p", { class: "quiet waits" }, this.chat.begun ? "Reading" : "Waiting"));
      else body.classList.add("comes");
    }
    if (message.end) body.append(make("p", { class: "quiet" }, message.end));
    if (message.error) body.append(make("p", { class: "error", role: "alert" }, message.error));
    const buttons = make("div", { class: "actions" });
    const add = (label, action, name) => buttons.append(make("button", { type: "button", "aria-label": name, onclick: action }, label));
    const which = `${isAnswer ? "answer" : "message"} of turn ${turn}`;
    if (!comes) {
      if (text) add("Copy", (event) => copy(text, event.target), `Copy the ${which}`);
      if (message.role === "user" && !running) add("Edit", () => this.edit(i), `Edit the ${which}`);
      if (isAnswer && isLast && !running) add("Regenerate", () => this.actions.regenerate(i), `Regenerate the ${which}`);
      if (isAnswer && !running && !message.error) add("Fork", () => this.actions.fork(i), `Fork after the ${which}`);
    }
    const label = `${NAMES[message.role] ?? message.role}, turn ${turn}`;
    const properties = { class: `message ${message.role}`, tabIndex: -1, "aria-label": label, "data-turn": String(turn), "data-role": message.role };
    return make("article", properties, body, buttons);
  }

  /** A message becomes a box to write in. */
  edit(i) {
    const { element } = this.shown[i];
    const before = this.chat.messages[i].content ?? "";
    const box = make("textarea", { value: before, rows: Math.min(12, before.split("\n").length + 1), "aria-label": "Edit the message" });
    const end = (event) => {
      event?.preventDefault();
      this.shown[i].state = "";
      this.update();
      this.shown[i].element.querySelector(".actions button")?.focus();
    };
    const save = (event) => {
      event.preventDefault();
      const text = box.value.trim();
      if (text) this.actions.edit(i, text);
    };
    const cancel = make("button", { type: "button", onclick: end }, "Cancel");
    const send = make("button", { type: "submit", class: "main" }, "Send");
    const form = make("form", { class: "editor", onsubmit: save }, box, make("div", { class: "buttons" }, cancel, send));
    box.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        end(event);
      } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) save(event);
    });
    element.replaceChildren(form);
    box.focus();
  }

  /** Brings a text into view. */
  reveal(turn, role) {
    const found = this.element.querySelector(`[data-turn="${turn}"][data-role="${role}"]`);
    if (!found) return;
    found.scrollIntoView({ block: "center", behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
    found.focus({ preventScroll: true });
  }
}

/** Makes a message another one. What is the same in both stays, so that a selection in it does, and a thought that somebody opened or closed. */
function changed(before, after) {
  const [old, now] = [before, after].map((element) => element.querySelector(":scope > .text"));
  if (!old || before.className !== after.className) {
    before.replaceWith(after);
    return after;
  }
  const [oldThought, thought] = [old, now].map((text) => text.querySelector(":scope > .thought"));
  if (oldThought && thought && oldThought.dataset.thinks === thought.dataset.thinks) thought.open = oldThought.open;
  old.className = now.className;
  const wanted = [...now.childNodes];
  wanted.forEach((node, i) => {
    const there = old.childNodes[i];
    if (!there) old.append(node);
    else if (!there.isEqualNode(node)) there.replaceWith(node);
  });
  while (old.childNodes.length > wanted.length) old.lastChild.remove();
  before.querySelector(":scope > .actions").replaceWith(after.querySelector(":scope > .actions"));
  return before;
}

async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Not allowed";
  }
  setTimeout(() => (button.textContent = "Copy"), 1500);
}

function welcome() {
  return make(
    "div",
    { class: "welcome" },
    make("p", {}, "Ask something."),
    make("p", { class: "quiet" }, "However long a conversation becomes, its cache stays small. The map shows what of each turn is in there."),
  );
}
