// Tables of runs sort and filter; pictures name the point under the pointer.
// Everything is in the document already: without this script it is a plain table and a plain picture.
"use strict";

// ---- tables of runs ---------------------------------------------------------------------------------------

const inOrder = new Intl.Collator("en", {numeric: true}).compare;  // "rank 8" comes before "rank 16"

// Numbers by value, before text. direction: 1 (ascending) or -1; a cell without a value comes last in both.
function compareCells(a, b, direction) {
  const missing = a.hasAttribute("data-missing") - b.hasAttribute("data-missing");
  if (missing || a.hasAttribute("data-missing")) return missing;
  const text = ("value" in b.dataset) - ("value" in a.dataset);
  if (text) return direction * text;
  if ("value" in a.dataset) return direction * (a.dataset.value - b.dataset.value);
  return direction * inOrder(a.textContent, b.textContent);
}

// Rows that are equal in this column keep their order: to sort by two columns, click the greater key last.
function sortBy(table, header) {
  const direction = header.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
  const column = header.cellIndex;
  const body = table.tBodies[0];
  body.append(...[...body.rows].sort((a, b) => compareCells(a.cells[column], b.cells[column], direction)));
}

// A row stays if it has every chosen value, and the free text in some cell.
function filterRows(table, controls) {
  const search = controls.querySelector("input").value.trim().toLowerCase();
  const chosen = [...controls.querySelectorAll("select")].filter(select => select.selectedIndex > 0);
  const rows = [...table.tBodies[0].rows];
  for (const row of rows) {
    row.hidden = !([...row.cells].some(cell => cell.textContent.toLowerCase().includes(search))
                   && chosen.every(select => row.cells[select.dataset.column].textContent === select.value));
  }
  const shown = rows.filter(row => !row.hidden).length;
  table.caption.textContent = `${shown} of ${rows.length} rows`;
}

for (const box of document.querySelectorAll(".runs")) {
  const table = box.querySelector("table");
  const controls = box.querySelector("form");
  for (const header of table.tHead.rows[0].cells) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    button.addEventListener("click", () => sortBy(table, header));
    header.append(button);
  }
  controls.hidden = false;
  controls.addEventListener("input", () => filterRows(table, controls));
  controls.addEventListener("submit", event => event.preventDefault());
  filterRows(table, controls);
}

// ---- pictures with points ---------------------------------------------------------------------------------

const REACH = 20;  // CSS pixels: the pointer means the nearest point within them
const tip = document.createElement("div");
tip.className = "tip";
tip.setAttribute("role", "tooltip");
tip.hidden = true;
document.body.append(tip);
let current = null;

// Beside the point, on the side that has room, and inside the window in any case.
function place() {
  if (!current) return;
  const gap = 6;
  const dot = current.getBoundingClientRect();
  const x = dot.left + dot.width / 2;
  const y = dot.top + dot.height / 2;
  const fits = (start, size, room) => Math.max(gap, Math.min(start, room - size - gap));
  const {clientWidth: width, clientHeight: height} = document.documentElement;
  const right = x + 12 + tip.offsetWidth + gap <= width ? x + 12 : x - 12 - tip.offsetWidth;
  const below = y + 12 + tip.offsetHeight + gap <= height ? y + 12 : y - 12 - tip.offsetHeight;
  tip.style.left = `${fits(right, tip.offsetWidth, width)}px`;
  tip.style.top = `${fits(below, tip.offsetHeight, height)}px`;
}

function show(dot) {
  if (current) current.classList.remove("on");
  current = dot;
  tip.hidden = !dot;
  if (!dot) return;
  dot.classList.add("on");
  tip.textContent = dot.getAttribute("aria-label");
  tip.style.left = tip.style.top = "0px";  // its size must not depend on where it stood before
  place();
}

// The point nearest to the pointer, or null where none is in reach.
function nearest(dots, event) {
  const distance = dot => {
    const box = dot.getBoundingClientRect();
    return Math.hypot(box.left + box.width / 2 - event.clientX, box.top + box.height / 2 - event.clientY);
  };
  const dot = dots.reduce((best, other) => distance(other) < distance(best) ? other : best);
  return distance(dot) <= REACH ? dot : null;
}

for (const picture of document.querySelectorAll(".picture svg")) {
  const dots = [...picture.querySelectorAll("circle")];
  for (const [i, dot] of dots.entries()) {
    const title = dot.querySelector("title");
    dot.setAttribute("aria-label", title.textContent);
    // one Tab stop a picture; the arrow keys go from point to point
    dot.setAttribute("tabindex", i ? -1 : 0);
    title.remove();  // or the browser would show it beside ours
    dot.addEventListener("focus", () => show(dot));
    dot.addEventListener("blur", () => show(null));
  }
  const focused = () => dots.find(dot => dot === document.activeElement) || null;
  picture.addEventListener("pointermove", event => show(nearest(dots, event) || focused()));
  picture.addEventListener("pointerleave", () => show(focused()));
  // for a tap: its pointer leaves with the finger
  picture.addEventListener("click", event => show(nearest(dots, event)));
  picture.addEventListener("keydown", event => {
    const step = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key];
    if (!step) return;
    event.preventDefault();
    dots[(dots.indexOf(document.activeElement) + step + dots.length) % dots.length].focus();
  });
}
document.addEventListener("click", event => { if (!event.target.closest(".picture svg")) show(null); });
document.addEventListener("keydown", event => { if (event.key === "Escape") show(null); });
addEventListener("scroll", place, true);
addEventListener("resize", place);
