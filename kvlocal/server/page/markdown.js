// Markdown as models write it, as elements. HTML in it is text, links lead to the web or to mail alone, and pictures are not loaded.
// It takes time in proportion to the text, whatever that is, so that no answer makes the page hang.

import { make } from "./dom.js";

const MAX_DEPTH = 12; // of lists and quotes in each other; what is deeper is text
const MAX_OPEN = 200; // marks that wait for their ends at once; more are text
const MAX_URL = 2000;

/** A text as elements. */
export function render(text) {
  const fragment = document.createDocumentFragment();
  fragment.append(...blocks(text.replace(/\r\n?/g, "\n").replace(/\t/g, "    ").split("\n"), 0));
  return fragment;
}

const FENCE = /^ {0,3}(`{3,}|~{3,})(.*)$/;
const HEADING = /^ {0,3}(#{1,6})(?: +(.*))?$/;
const RULE = /^ {0,3}(?:(?:\* *){3,}|(?:- *){3,}|(?:_ *){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])( +|$)/;
const TABLE_RULE = /^\|? *:?-+:? *(?:\| *:?-+:? *)*\|?$/;

function blocks(lines, depth) {
  const found = [];
  let paragraph = [];
  const endParagraph = () => {
    if (paragraph.length) found.push(make("p", {}, ...inline(paragraph.join("\n").trim())));
    paragraph = [];
  };
  for (let i = 0; i < lines.length; ) {
    const line = lines[i];
    let match;
    if (!line.trim()) {
      endParagraph();
      i++;
    } else if ((match = FENCE.exec(line)) && !(match[1][0] === "`" && match[2].includes("`"))) {
      endParagraph();
      i = fence(lines, i, match, found);
    } else if ((match = HEADING.exec(line))) {
      endParagraph();
      // below the title of the page
      found.push(make(`h${Math.min(match[1].length + 2, 6)}`, {}, ...inline((match[2] ?? "").trim())));
      i++;
    } else if (RULE.test(line)) {
      endParagraph();
      found.push(make("hr"));
      i++;
    } else if (depth < MAX_DEPTH && QUOTE.test(line)) {
      endParagraph();
      const inner = [];
      while (i < lines.length && QUOTE.test(lines[i])) inner.push(lines[i++].replace(QUOTE, ""));
      found.push(make("blockquote", {}, ...blocks(inner, depth + 1)));
    } else if (depth < MAX_DEPTH && (match = ITEM.exec(line)) && (!paragraph.length || match[3])) {
      endParagraph();
      i = list(lines, i, match, depth, found);
    } else if (isTable(line, lines[i + 1])) {
      endParagraph();
      i = table(lines, i, found);
    } else {
      paragraph.push(line);
      i++;
    }
  }
  endParagraph();
  return found;
}

function fence(lines, start, [, marks, info], found) {
  const indent = lines[start].search(/\S/);
  const inner = [];
  let i = start + 1;
  for (; i < lines.length; i++) {
    const line = lines[i].trim();
    if (line.length >= marks.length && line === marks[0].repeat(line.length)) break;
    inner.push(lines[i].slice(Math.min(indent, Math.max(0, lines[i].search(/\S|$/)))));
  }
  const code = make("code", {}, inner.join("\n"));
  found.push(make("pre", { tabIndex: 0, "data-language": info.trim().split(/\s/)[0] || undefined }, code));
  return i + 1;
}

function list(lines, start, first, depth, found) {
  const ordered = /\d/.test(first[2]);
  const items = [];
  let loose = false;
  let i = start;
  while (i < lines.length) {
    const match = ITEM.exec(lines[i]);
    if (!match || /\d/.test(match[2]) !== ordered || RULE.test(lines[i])) break;
    const width = match[3].length > 4 ? match[1].length + match[2].length + 1 : match[0].length || 2;
    const inner = [lines[i].slice(match[0].length)];
    for (i++; i < lines.length; i++) {
      const line = lines[i];
      if (!line.trim()) {
        const next = lines[i + 1]?.trim() ? i + 1 : i + 2;
        if (!lines[next]?.trim()) break;
        const goesOn = lines[next].search(/\S/) >= width;
        if (!goesOn && !ITEM.test(lines[next])) break;
        if (!goesOn) {
          loose = true;
          i = next;
          break;
        }
        inner.push("");
      } else if (line.search(/\S/) >= width) inner.push(line.slice(width));
      else if (ITEM.test(line) || FENCE.test(line) || HEADING.test(line) || QUOTE.test(line) || !inner.at(-1)) break;
      else inner.push(line.trimStart());
    }
    items.push(inner);
  }
  const properties = ordered ? { start: parseInt(first[2], 10) } : {};
  found.push(make(ordered ? "ol" : "ul", properties, ...items.map((inner) => item(inner, loose, depth))));
  return i;
}

function item(lines, loose, depth) {
  const task = /^\[([ xX])\] +/.exec(lines[0]);
  if (task) lines[0] = lines[0].slice(task[0].length);
  const inner = blocks(lines, depth + 1);
  const element = make("li", {});
  if (task) {
    const checked = task[1] !== " ";
    element.append(make("input", { type: "checkbox", checked, disabled: true, "aria-label": checked ? "done" : "to do" }), " ");
  }
  for (const block of inner) {
    if (!loose && block.tagName === "P") element.append(...block.childNodes);
    else element.append(block);
  }
  return element;
}

function isTable(line, below) {
  return line.includes("|") && below?.includes("-") && TABLE_RULE.test(below.trim()) && cells(line).length === cells(below).length;
}

function cells(line) {
  const found = [""];
  const inner = line.trim().replace(/^\|/, "").replace(/([^\\]|^)\|$/, "$1");
  for (let i = 0; i < inner.length; i++) {
    if (inner[i] === "\\" && inner[i + 1] === "|") found[found.length - 1] += inner[++i];
    else if (inner[i] === "|") found.push("");
    else found[found.length - 1] += inner[i];
  }
  return found.map((each) => each.trim());
}

function table(lines, start, found) {
  const sides = cells(lines[start + 1]).map((each) => (each.endsWith(":") ? (each.startsWith(":") ? "center" : "right") : "left"));
  const row = (line, kind) => {
    const given = cells(line);
    return make("tr", {}, ...sides.map((side, i) => make(kind, { class: side }, ...inline(given[i] ?? ""))));
  };
  const head = make("thead", {}, row(lines[start], "th"));
  const body = make("tbody", {});
  let i = start + 2;
  for (; i < lines.length && lines[i].trim() && lines[i].includes("|"); i++) body.append(row(lines[i], "td"));
  found.push(make("div", { class: "table", tabIndex: 0 }, make("table", {}, head, body)));
  return i;
}

const SPECIAL = /[\\`*_~[\]!<\n]|https?:\/\//g;
const ESCAPED = /[!-/:-@[-`{-~]/;
const EMPHASIS = { "*": ["em", "strong"], _: ["em", "strong"], "~": [null, "del"] };

/** What is inside a paragraph. Marks that may begin something wait on a stack until what ends it comes; those that wait in vain are text. */
function inline(text) {
  const nodes = [];
  const open = [];
  const noEnd = new Set(); // lengths of runs of backticks that nothing ends
  let plain = "";
  const flush = () => {
    if (plain) nodes.push(document.createTextNode(plain));
    plain = "";
  };
  const close = (opener, element) => {
    flush();
    element.append(...nodes.splice(opener.at + 1));
    nodes[opener.at] = element;
  };
  for (let i = 0; i < text.length; ) {
    SPECIAL.lastIndex = i;
    const next = SPECIAL.exec(text);
    if (!next) {
      plain += text.slice(i);
      break;
    }
    plain += text.slice(i, next.index);
    i = next.index;
    const mark = next[0];
    if (mark === "\\") {
      if (text[i + 1] === "\n") {
        flush();
        nodes.push(make("br"));
        i += 2;
      } else if (i + 1 < text.length && ESCAPED.test(text[i + 1])) {
        plain += text[i + 1];
        i += 2;
      } else {
        plain += mark;
        i++;
      }
    } else if (mark === "\n") {
      flush();
      // models end lines where they mean it
      nodes.push(make("br"));
      i++;
    } else if (mark === "`") {
      i = codeSpan(text, i, noEnd, (code) => (flush(), nodes.push(code)), (raw) => (plain += raw));
    } else if (mark === "<") {
      const link = /^<((?:https?:\/\/|mailto:)[^\s<>]{1,2000})>/.exec(text.slice(i, i + MAX_URL));
      if (link) {
        flush();
        nodes.push(anchor(link[1], [document.createTextNode(link[1])]));
      } else plain += mark;
      i += link ? link[0].length : 1;
    } else if (mark.startsWith("http")) {
      const url = /^[^\s<>"'`*|]+/.exec(text.slice(i, i + MAX_URL))[0].replace(/[.,:;!?)\]]+$/, "");
      const follows = i > 0 && /\w/.test(text[i - 1]);
      if (url.length > mark.length && !follows && !open.some((each) => each.mark === "[")) {
        flush();
        nodes.push(anchor(url, [document.createTextNode(url)]));
        i += url.length;
      } else {
        plain += mark;
        i += mark.length;
      }
    } else if (mark === "[" || mark === "!") {
      const isLink = (mark === "[" || text[i + 1] === "[") && open.length < MAX_OPEN;
      if (isLink) {
        flush();
        const raw = mark === "[" ? "[" : "![";
        open.push({ mark: "[", at: nodes.length, raw });
        nodes.push(document.createTextNode(raw));
        i += raw.length;
      } else {
        plain += mark;
        i++;
      }
    } else if (mark === "]") {
      i = linkEnd(text, i, open, close, (raw) => (plain += raw));
    } else {
      i = emphasis(text, i, open, nodes, flush, close);
    }
  }
  flush();
  return nodes;
}

function codeSpan(text, start, noEnd, add, literal) {
  let n = 1;
  while (text[start + n] === "`") n++;
  const run = "`".repeat(n);
  let end = -1;
  if (!noEnd.has(n)) {
    end = text.indexOf(run, start + n);
    while (end >= 0 && (text[end + n] === "`" || text[end - 1] === "`")) {
      let after = end + n;
      while (text[after] === "`") after++;
      end = text.indexOf(run, after);
    }
    if (end < 0) noEnd.add(n);
  }
  if (end < 0) {
    literal(run);
    return start + n;
  }
  const code = text.slice(start + n, end).replace(/\n/g, " ");
  add(make("code", {}, /^ .*[^ ].* $/.test(code) ? code.slice(1, -1) : code));
  return end + n;
}

function linkEnd(text, at, open, close, literal) {
  const index = open.findLastIndex((each) => each.mark === "[");
  const target = /^\]\( *<?([^\s<>()]*(?:\([^\s<>()]*\)[^\s<>()]*)*)>?(?: +"[^"\n]{0,500}")? *\)/.exec(text.slice(at, at + MAX_URL));
  if (index < 0 || !target) {
    // a bracket that is no link does not wait any more
    if (index >= 0) open.splice(index, 1);
    literal("]");
    return at + 1;
  }
  const [opener] = open.splice(index);
  const element = anchor(target[1], []);
  close(opener, element);
  if (opener.raw === "![" && !element.textContent) element.append(target[1]);
  return at + target[0].length;
}

/** A link where it leads to the web or to mail, else only what it says. */
function anchor(url, children) {
  const safe = /^(https?:\/\/|mailto:)/i.test(url);
  return safe ? make("a", { href: url, target: "_blank", rel: "noopener noreferrer nofollow" }, ...children) : make("span", {}, ...children);
}

function emphasis(text, start, open, nodes, flush, close) {
  const mark = text[start];
  let n = 1;
  while (text[start + n] === mark) n++;
  const before = start ? text[start - 1] : " ";
  const after = text[start + n] ?? " ";
  const inWord = mark === "_" && /[\p{L}\p{N}]/u.test(before) && /[\p{L}\p{N}]/u.test(after);
  const opens = !/\s/.test(after) && !inWord;
  const closes = !/\s/.test(before) && !inWord;
  let left = n;
  while (closes && left) {
    const index = open.findLastIndex((each) => each.mark === mark);
    if (index < 0) break;
    const opener = open[index];
    const width = mark === "~" ? 2 : Math.min(2, opener.left, left);
    if (opener.left < width || left < width) break;
    const element = make(EMPHASIS[mark][width - 1], {});
    open.length = index + 1;
    opener.left -= width;
    left -= width;
    if (opener.left) {
      // the rest of its marks stays before the element, and may still be ended
      flush();
      element.append(...nodes.splice(opener.at + 1));
      nodes[opener.at].data = mark.repeat(opener.left);
      nodes.push(element);
    } else {
      open.pop();
      close(opener, element);
    }
  }
  if (left) {
    flush();
    if (opens && open.length < MAX_OPEN && (mark !== "~" || left >= 2)) open.push({ mark, at: nodes.length, left });
    nodes.push(document.createTextNode(mark.repeat(left)));
  }
  return start + n;
}
