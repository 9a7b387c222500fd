// Chat: one conversation, which may be answered while another one is looked at.

import * as api from "./api.js";

const STOP_SECONDS = 10; // for an answer to end that was asked to

/** What is sent of a message: of an answer what it said, as thoughts are not part of a history. */
function sent({ role, content, tool_calls, tool_call_id }) {
  const said = role === "assistant" ? split(content).text : content;
  return { role, content: said, ...(tool_calls && { tool_calls }), ...(tool_call_id && { tool_call_id }) };
}

/** An answer's thought, which a kept conversation has between tags, and the rest of it. */
export function split(content) {
  const text = content ?? "";
  if (!text.startsWith("<think>")) return { thought: "", text };
  const end = text.indexOf("</think>");
  if (end < 0) return { thought: text.slice(7).trim(), text: "" };
  return { thought: text.slice(7, end).trim(), text: text.slice(end + 8).trimStart() };
}

export class Chat {
  /**
   * id: that the server knows it by, "" before its first answer begins
   * messages: as the server has them; the answers of this page also have `thought`, and `error` where they failed
   * isFork: it begins as another one, which stays
   * unsent: a text that the server has not got so far
   */
  constructor(id = "", messages = [], isFork = false) {
    Object.assign(this, { id, messages, isFork, running: null, begun: false, unsent: "" });
  }

  /** Answers what was said last; `changed` is called whenever there is something new, and with "begun" once the server works on it. */
  async answer(changed) {
    const running = (this.running = new AbortController());
    // what failed before it said anything was no answer
    this.messages = this.messages.filter(({ error, content }) => !error || content);
    const asked = this.messages.map(sent);
    const before = this.id;
    let isKept = false;
    const message = { role: "assistant", content: "", thought: "" };
    this.messages.push(message);
    this.begun = false;
    changed();
    try {
      // without an ID it is a conversation of its own, even if there is one that begins in the same way
      for await (const chunk of api.answer({ messages: asked, conversation: this.id }, running.signal)) {
        if (chunk.conversation) this.id = chunk.conversation;
        const delta = chunk.choices[0]?.delta ?? {};
        message.content += delta.content ?? "";
        message.thought += delta.reasoning_content ?? "";
        const reason = chunk.choices[0]?.finish_reason;
        // if it was stopped while the message was read the server has nothing of it
        if (reason) isKept = Boolean(chunk.conversation);
        if (reason === "length") message.end = "It ended at the greatest length that the server allows.";
        const begins = !this.begun && Boolean(chunk.conversation);
        this.begun ||= begins;
        changed(begins ? "begun" : "");
      }
    } catch (error) {
      if (error.name !== "AbortError") message.error = error instanceof api.ApiError ? error.message : String(error);
    } finally {
      if (!isKept && !message.content && !message.thought) {
        this.id = before;
        message.error ??= "It was stopped before the answer began.";
      } else if (!message.content && !message.error) message.end ??= "The answer is empty.";
      this.running = null;
      changed("ended");
    }
  }

  /** Ends the answer: it stays as far as it came. */
  async stop() {
    const running = this.running;
    if (!running) return;
    if (!this.begun) {
      running.abort();
      return;
    }
    setTimeout(() => running.abort(), STOP_SECONDS * 1000);
    try {
      await api.stop(this.id);
    } catch {
      running.abort();
    }
  }

  /** Takes back what is behind the first n messages. The server keeps the conversation as it was beside this one. */
  cut(n) {
    this.messages = this.messages.slice(0, n);
  }

  /** Another conversation that begins with the first n messages of this one. */
  fork(n) {
    return new Chat("", this.messages.slice(0, n).map((message) => ({ ...message })), true);
  }
}

/** The turn of each message, as the map numbers them: each text of the user begins the next. */
export function turns(messages) {
  let turn = 0;
  let before = "";
  return messages.map(({ role }) => {
    if (role === "user" && before !== "user") turn++;
    before = role;
    return turn;
  });
}
