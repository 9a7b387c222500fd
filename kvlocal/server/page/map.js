// The map of the cache: how much of each text of a conversation is in the cache, in the archive, or back from there, and what the answer looked at.

import * as api from "./api.js";
import { make } from "./dom.js";

const MILLISECONDS = 300; // between two looks while an answer comes
const NAMES = { user: "you", assistant: "answer", system: "system prompt", nexus: "Nexus tokens", tool: "tool" };

const number = (value) => Math.round(value).toLocaleString("en");
const percent = (share) => (share > 0 && share < 0.005 ? "<1 %" : `${Math.round(100 * share)} %`);

export class CacheMap {
  /** actions: reveal(turn, role) shows a text, idle() is called when an answer has ended that this page does not get itself */
  constructor(element, actions) {
    Object.assign(this, { element, actions, chat: null, rows: new Map(), timer: 0, round: 0 });
    this.gauge = make("div", { class: "fill" });
    this.budget = make("div", { class: "budget" });
    this.figure = make("p", { class: "figure" });
    this.numbers = make("p", { class: "quiet" });
    this.list = make("ol", { class: "parts" });
    this.looked = make("p", { class: "quiet looked" });
    this.note = make("p", { class: "quiet" });
    const legend = make("ul", { class: "legend" });
    for (const [kind, text] of [["cached", "in the cache"], ["recalled", "recalled"], ["archived", "in the archive"], ["gone", "gone"]]) {
      legend.append(make("li", {}, make("span", { class: `swatch ${kind}` }), text));
    }
    const gauge = make("div", { class: "gauge", role: "presentation" }, this.gauge, this.budget);
    this.content = make("div", {}, this.figure, gauge, this.numbers, this.head(), this.list, this.looked, legend);
    element.append(this.note, this.content);
  }

  head() {
    return make("p", { class: "head quiet", "aria-hidden": "true" }, make("span", {}, "turn"), make("span", {}, "attention"));
  }

  /** Shows the cache of a conversation from now on. */
  show(chat) {
    if (chat !== this.chat) {
      this.rows.clear();
      this.list.replaceChildren();
    }
    this.chat = chat;
    this.look();
  }

  /** Looks at once, and again and again while there is an answer. */
  async look() {
    clearTimeout(this.timer);
    const round = ++this.round;
    const { chat } = this;
    if (!chat.id) {
      this.empty(chat.messages.length ? "" : "Nothing is in it yet.");
      if (chat.running) this.again(round);
      return;
    }
    let found = null;
    try {
      if (!document.hidden) found = await api.cacheMap(chat.id);
    } catch {
      // it is asked again
    }
    if (round !== this.round) return;
    if (found) this.draw(found);
    const others = Boolean(found?.answering) && !chat.running;
    if (this.waits && !others && found) {
      this.waits = false;
      this.actions.idle(chat);
    }
    this.waits ||= others;
    if (chat.running || others || (!found && document.hidden)) this.again(round);
  }

  again(round) {
    this.timer = setTimeout(() => round === this.round && this.look(), MILLISECONDS);
  }

  empty(text) {
    this.note.textContent = text;
    this.note.hidden = !text;
    this.content.hidden = true;
  }

  draw({ cache, attention, parts, answering }) {
    if (!cache) {
      this.empty(answering ? "" : "Nothing of this conversation is in the cache now. It comes back with your next message.");
      return;
    }
    this.note.hidden = true;
    this.content.hidden = false;
    this.element.dataset.archive = String(cache.archived > 0);
    this.figure.replaceChildren(make("strong", {}, number(cache.used)), ` cells, budget ${number(cache.budget)}`);
    this.figure.title = `Between two compressions the cache grows a little past its budget; there is room for ${number(cache.capacity)} cells.`;
    this.budget.style.left = `${(100 * cache.budget) / cache.capacity}%`;
    this.gauge.style.width = `${Math.min(100, (100 * cache.used) / cache.capacity)}%`;
    const words = [`${number(cache.tokens)} tokens so far`];
    if (cache.archived) words.push(`${number(cache.archived)} archived`);
    if (cache.recalled) words.push(`${number(cache.recalled)} cells recalled just now`);
    this.numbers.textContent = words.join(" · ");
    this.drawParts(parts);
    this.looked.hidden = !attention;
    if (attention) {
      this.looked.textContent =
        `The answer looked ${percent(attention.earlier)} at earlier turns, ${percent(attention.current)} at its own, ` +
        `${percent(attention.beginning)} at the beginning.${attention.everything ? "" : " Of what the cache still held."}`;
    }
  }

  drawParts(parts) {
    const most = Math.max(1, ...parts.map((part) => part.tokens));
    const old = new Set(this.rows.keys());
    for (const part of parts) {
      const key = `${part.turn} ${part.role}`;
      old.delete(key);
      let row = this.rows.get(key);
      if (!row) this.rows.set(key, (row = this.row(part)));
      this.fill(row, part, most);
      // they come in order, so a new one is the last
      if (!row.item.isConnected) this.list.append(row.item);
    }
    for (const key of old) {
      this.rows.get(key).item.remove();
      this.rows.delete(key);
    }
  }

  row({ turn, role }) {
    const row = {
      label: make("span", { class: "label" }),
      text: make("span", { class: "words" }),
      share: make("span", { class: "share" }),
      cached: make("span", { class: "cached" }),
      recalled: make("span", { class: "recalled" }),
      bar: make("span", { class: "cells" }),
      last: "",
    };
    row.bar.append(row.cached, row.recalled);
    const properties = { type: "button", class: role, onclick: () => this.actions.reveal(turn, role) };
    row.button = make("button", properties, row.label, row.text, row.share, row.bar);
    row.item = make("li", {}, row.button);
    return row;
  }

  /** How the answer begins that comes: the server notes it when it is complete. */
  coming() {
    const { role, content } = this.chat.messages.at(-1) ?? {};
    return (role === "assistant" && content?.slice(0, 60)) || "…";
  }

  fill(row, part, most) {
    const state = JSON.stringify([part, most, part.text ? "" : this.coming()]);
    if (row.last === state) return;
    row.last = state;
    const { role, turn, tokens, cached, archived, recalled, pinned, attention } = part;
    row.label.textContent = turn ? String(turn) : "";
    row.text.textContent = role === "assistant" || role === "user" ? part.text || this.coming() : NAMES[role] ?? role;
    row.share.textContent = attention === null ? "" : percent(attention);
    row.share.dataset.strength = attention === null ? "0" : String(Math.min(4, Math.ceil(4 * Math.sqrt(attention))));
    // a square root: a pasted document does not make the others vanish
    row.bar.style.width = `${Math.max(6, 100 * Math.sqrt(tokens / most))}%`;
    row.bar.dataset.kept = archived >= tokens * 0.5 ? "archive" : cached >= tokens - 0.5 ? "cache" : "gone";
    const share = (n) => `${tokens ? Math.min(100, (100 * n) / tokens) : 0}%`;
    row.cached.style.width = share(Math.max(0, cached - recalled));
    row.recalled.style.width = share(recalled);
    const words = [`${NAMES[role] ?? role}: ${number(tokens)} tokens`, `${number(cached)} in the cache${pinned ? ", where they stay" : ""}`];
    if (archived) words.push(`${number(archived)} in the archive`);
    if (recalled >= 0.05) words.push(`${recalled.toFixed(1)} recalled`);
    if (attention) words.push(`${percent(attention)} of the answer's attention`);
    row.button.title = words.join(", ");
    row.button.setAttribute("aria-label", `${turn ? `Turn ${turn}, ` : ""}${words.join(", ")}`);
  }
}
