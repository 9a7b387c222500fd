// Elements, made without any HTML: what a model or a person wrote is only ever text.

/** An element with properties, attributes (those with a hyphen, role and for), listeners (onclick and the like) and children. */
export function make(name, properties = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (key === "class") element.className = value;
    else if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key.includes("-") || key === "role" || key === "for") element.setAttribute(key, value === true ? "" : value);
    else element[key] = value;
  }
  element.append(...children);
  return element;
}

const paths = {
  menu: "M4 7h16M4 12h16M4 17h16",
  close: "M6 6l12 12M18 6L6 18",
  theme: "M12 4a8 8 0 1 0 0 16a8 8 0 1 0 0-16zM12 4a8 8 0 0 1 0 16z",
  map: "M5 7h14M5 12h8M5 17h11M17 12h2",
  remove: "M5 7h14M10 7V5h4v2M7 7l1 12h8l1-12M10.5 10.5v5M13.5 10.5v5",
};

/** A drawing for a button, which has a label of its own. */
export function icon(name) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(space, "path");
  path.setAttribute("d", paths[name]);
  svg.append(path);
  return svg;
}

/** Texts of a session's storage; where the browser has none they last as long as the page. */
export const stored = (() => {
  const here = new Map();
  return {
    get(name) {
      try {
        return sessionStorage.getItem(name) ?? here.get(name) ?? "";
      } catch {
        return here.get(name) ?? "";
      }
    },
    set(name, value) {
      here.set(name, value);
      try {
        if (value) sessionStorage.setItem(name, value);
        else sessionStorage.removeItem(name);
      } catch {
        // kept here
      }
    },
  };
})();
