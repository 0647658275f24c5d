// A table of any number of rows: sorted by a click on a heading, shown a page at a time. Rows that stay keep their
// elements, so that focus and selection survive an update.

import { make, setText } from "./dom.js";
import { MISSING, number } from "./format.js";

export class PagedTable {
  /**
   * columns: each {id, title, about, value(row), text(row), fill(cell, row), numeric, head}. value: to sort by; missing
   * ones come last. text: what the cell says, else the value. fill: makes its contents instead, called at every update.
   * head: it names the row.
   */
  constructor(place, { caption, columns, key, sort, descending = false, pageSize = 50, empty }) {
    Object.assign(this, { columns, key, sort, descending, pageSize, empty });
    this._rows = [];
    this._page = 0;
    this._elements = new Map();
    this._build(place, caption);
  }

  /** Show these. selected: the key of the row to mark. */
  update(rows, selected = null) {
    this._rows = rows;
    this._selected = selected;
    this._draw();
  }

  /** Turn to the page of a row. */
  reveal(key) {
    const index = this._sorted().findIndex((row) => this.key(row) === key);
    if (index >= 0) this._page = Math.floor(index / this.pageSize);
    this._draw();
  }

  _build(place, caption) {
    this._headings = this.columns.map((column) => {
      const click = () => this._sortBy(column);
      const sign = make("span", { class: "sign", "aria-hidden": "true" });
      const button = make("button", { type: "button", class: "sorter", title: column.about, onclick: click });
      button.append(column.title, sign);
      return make("th", { scope: "col", class: column.numeric ? "numeric" : null }, button);
    });
    this._body = make("tbody");
    const head = make("thead", {}, make("tr", {}, this._headings));
    const table = make("table", {}, make("caption", { class: "unseen" }, caption), head, this._body);
    this._count = make("span", { role: "status" });
    this._before = make("button", { type: "button", onclick: () => this._turn(-1) }, "Previous");
    this._after = make("button", { type: "button", onclick: () => this._turn(1) }, "Next");
    this._pager = make("div", { class: "pager" }, this._count, this._before, this._after);
    place.append(
      make("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": caption }, table),
      this._pager,
    );
  }

  _sortBy(column) {
    this.descending = this.sort === column.id ? !this.descending : false;
    this.sort = column.id;
    this._page = 0;
    this._draw();
  }

  _turn(pages) {
    this._page += pages;
    this._draw();
  }

  _sorted() {
    const { value } = this.columns.find((column) => column.id === this.sort);
    const sign = this.descending ? -1 : 1;
    const keyed = this._rows.map((row, index) => ({ row, index, value: value(row) }));
    keyed.sort((one, other) => compare(one.value, other.value, sign) || one.index - other.index);
    return keyed.map(({ row }) => row);
  }

  _draw() {
    const last = Math.max(0, Math.ceil(this._rows.length / this.pageSize) - 1);
    this._page = Math.min(Math.max(0, this._page), last);
    const first = this._page * this.pageSize;
    const rows = this._sorted().slice(first, first + this.pageSize);
    const elements = new Map(rows.map((row) => [this.key(row), this._element(row)]));
    for (const [key, element] of this._elements) if (!elements.has(key)) element.remove();
    this._elements = elements;
    let at = this._body.firstChild;
    if (this._nothing) {
      if (at === this._nothing) at = at.nextSibling;
      this._nothing.remove();
      this._nothing = null;
    }
    for (const element of elements.values()) {
      if (element === at) at = at.nextSibling;
      else this._body.insertBefore(element, at);
    }
    if (!rows.length) {
      this._nothing = make("tr", {}, make("td", { colspan: this.columns.length, class: "muted" }, this.empty));
      this._body.append(this._nothing);
    }
    this._describe(first, rows.length, last);
  }

  _describe(first, shown, last) {
    const total = this._rows.length;
    setText(this._count, `${total ? number(first + 1) : 0} to ${number(first + shown)} of ${number(total)}`);
    this._pager.hidden = last === 0;
    this._before.disabled = this._page === 0;
    this._after.disabled = this._page === last;
    this._headings.forEach((heading, index) => {
      const chosen = this.columns[index].id === this.sort;
      heading.setAttribute("aria-sort", !chosen ? "none" : this.descending ? "descending" : "ascending");
      setText(heading.querySelector(".sign"), !chosen ? "" : this.descending ? "\u00a0▾" : "\u00a0▴");
    });
  }

  _element(row) {
    const key = this.key(row);
    const element = this._elements.get(key) ?? this._newRow();
    element.classList.toggle("selected", key === this._selected);
    this.columns.forEach((column, index) => {
      const cell = element.children[index];
      if (column.fill) column.fill(cell, row);
      else setText(cell, column.text ? column.text(row) : String(column.value(row) ?? MISSING));
    });
    return element;
  }

  _newRow() {
    const cells = this.columns.map((column) => {
      const properties = { class: column.numeric ? "numeric" : null };
      return column.head ? make("th", { scope: "row", ...properties }) : make("td", properties);
    });
    return make("tr", {}, cells);
  }
}

const isMissing = (value) => value === null || value === undefined || value === "";

function compare(one, other, sign) {
  if (isMissing(one) || isMissing(other)) return isMissing(one) - isMissing(other);
  if (typeof one === "number" && typeof other === "number") return sign * (one - other);
  return sign * String(one).localeCompare(String(other), "en", { numeric: true });
}
