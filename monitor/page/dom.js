// Elements made by hand. Strings become text, never markup: most of them were written by strangers.

/**
 * An element. properties: attributes, and functions named "onclick" and so on; null, undefined and false are left out,
 * true is an attribute without value. children: strings, elements, arrays of both; null and false are left out.
 */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export const byId = (id) => document.getElementById(id);

/** Change a text only if it differs: what screen-readers announce, and what a person has selected, stays. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Put other children in; a link that had the focus keeps it if it is still there. */
export function replaceChildren(place, ...children) {
  const focused = place.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
  place.replaceChildren(...children.filter(Boolean));
  if (focused) [...place.querySelectorAll("a")].find((link) => link.getAttribute("href") === focused)?.focus();
}

/** An entry of a description list. */
export function entry(term, ...description) {
  return make("div", {}, make("dt", {}, term), make("dd", {}, ...description));
}

/** The same with a figure in large and what it means. mood: "good", "bad", "thin" or null. */
export function figure(term, value, detail, mood = null) {
  const shown = entry(term, make("strong", {}, value), make("span", { class: "muted" }, detail));
  if (mood) shown.dataset.mood = mood;
  return shown;
}

/**
 * Calls `draw` when the element can be seen: now, or once it comes near. Returns a function that says that there is
 * something new to draw; out of sight that costs nothing.
 */
export function whenSeen(element, draw) {
  let seen = false;
  let dirty = false;
  const observer = new IntersectionObserver(
    ([one]) => {
      seen = one.isIntersecting;
      if (seen && dirty) redraw();
    },
    { rootMargin: "400px" },
  );
  observer.observe(element);
  function redraw() {
    dirty = false;
    draw();
  }
  return () => {
    dirty = true;
    if (seen) redraw();
  };
}
