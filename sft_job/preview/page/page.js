"use strict";
// Rows are drawn in blocks of some hundred tokens, each when it comes near the screen.
const BLOCK_TOKENS = 400;
const rows = JSON.parse(document.getElementById("data").textContent);
const tip = document.getElementById("tip");
let here = null;

document.getElementById("boundaries").addEventListener("change", (event) => {
  document.body.classList.toggle("boundaries", event.target.checked);
});

function prepare(row) {
  // Token at which each piece begins, and a flag for each token that is trained.
  const lengths = new Map(row.long);
  row.starts = new Array(row.pieces.length + 1);
  row.starts[0] = 0;
  for (let piece = 0; piece < row.pieces.length; piece++) {
    row.starts[piece + 1] = row.starts[piece] + (lengths.get(piece) || 1);
  }
  row.trained = new Uint8Array(row.ids.length);
  for (const [start, count] of row.spans) row.trained.fill(1, start, start + count);
  row.isSpecial = new Set(row.special);
  // A block ends at a line break where there is one in its second half.
  row.blocks = [];
  let first = 0;
  while (first < row.pieces.length) {
    let last = first, broken = -1;
    while (last < row.pieces.length && row.starts[last] - row.starts[first] < BLOCK_TOKENS) {
      if (row.pieces[last].endsWith("\n") && row.starts[last] - row.starts[first] > BLOCK_TOKENS / 2) broken = last + 1;
      last++;
    }
    if (last < row.pieces.length && broken > 0) last = broken;
    row.blocks.push([first, last]);
    first = last;
  }
}

function draw(block, row) {
  if (block.firstChild) return;
  const [first, last] = row.blocks[block.dataset.block];
  let text = null;
  for (let piece = first; piece < last; piece++) {
    text = text || newLine(block, row.position + row.starts[piece]);
    const token = document.createElement("span");
    token.className = "t" + (row.trained[row.starts[piece]] ? " tr" : "") + (row.isSpecial.has(piece) ? " sp" : "");
    token.dataset.piece = piece;
    const shown = row.pieces[piece];
    const ends = shown.endsWith("\n");
    token.textContent = ends ? shown.slice(0, -1) : shown;
    text.append(token);
    if (ends) text = null;
  }
  block.style.minHeight = "";
}

function linesOf(row, number) {
  // About: the line breaks, and what 80 characters a line make of the rest.
  const [first, last] = row.blocks[number];
  let lines = 1, width = 0;
  for (let piece = first; piece < last; piece++) {
    width += row.pieces[piece].length;
    if (row.pieces[piece].endsWith("\n") || width > 80) { lines++; width = 0; }
  }
  return lines;
}

function newLine(block, position) {
  const line = document.createElement("div");
  line.className = "line";
  const at = document.createElement("span");
  at.className = "at";
  at.textContent = position.toLocaleString("en");
  const text = document.createElement("span");
  text.className = "text";
  line.append(at, text);
  block.append(line);
  return text;
}

const near = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    near.unobserve(entry.target);
    draw(entry.target, rows[entry.target.parentNode.dataset.row]);
  }
}, { rootMargin: "800px" });

for (const box of document.querySelectorAll(".tokens")) {
  const row = rows[box.dataset.row];
  prepare(row);
  box.textContent = "";
  row.blocks.forEach((_, number) => {
    const block = document.createElement("div");
    block.className = "block";
    block.dataset.block = number;
    block.style.minHeight = 1.75 * linesOf(row, block.dataset.block) + "em";
    box.append(block);
    near.observe(block);
  });
}

function line(name, value) {
  const shown = document.createElement("div");
  shown.textContent = name + " " + value;
  return shown;
}

function show(token) {
  hide();
  here = token;
  token.classList.add("here");
  const row = rows[token.closest(".tokens").dataset.row];
  const piece = Number(token.dataset.piece);
  const first = row.starts[piece], last = row.starts[piece + 1] - 1;
  const range = (offset) => (offset + first).toLocaleString("en") + (last > first ? "–" + (offset + last).toLocaleString("en") : "");
  const ids = row.ids.slice(first, last + 1);
  const trained = row.trained[first];
  const text = document.createElement("b");
  text.textContent = row.pieces[piece].replace("\n", "");
  const label = trained
    ? ids.join(" ") + ": trained, predicted at position " + (row.position + first - 1).toLocaleString("en")
    : "-100: not trained";
  const rank = row.rank + Math.floor((row.start + first) / row.share);
  tip.replaceChildren(
    text,
    line(ids.length > 1 ? "ids" : "id", ids.join(" ") + (row.isSpecial.has(piece) ? " (special token)" : "")),
    line("position", range(row.position)),
    line("in the pack", range(row.start) + ", on rank " + rank),
    line("label", label),
  );
  tip.hidden = false;
  place();
}

function place() {
  const at = here.getClientRects()[0] || here.getBoundingClientRect();
  const left = Math.max(8, Math.min(at.left, innerWidth - tip.offsetWidth - 8));
  const below = at.bottom + 8 + tip.offsetHeight < innerHeight;
  tip.style.left = left + "px";
  tip.style.top = (below ? at.bottom + 8 : Math.max(8, at.top - tip.offsetHeight - 8)) + "px";
}

function hide() {
  if (here) here.classList.remove("here");
  here = null;
  tip.hidden = true;
}

function tokenAt(box, piece) {
  const row = rows[box.dataset.row];
  const wanted = Math.max(0, Math.min(piece, row.pieces.length - 1));
  const number = row.blocks.findIndex(([first, last]) => first <= wanted && wanted < last);
  const block = box.children[number];
  draw(block, row);
  return block.querySelector(`[data-piece="${wanted}"]`);
}

function stretch(row, piece, step) {
  // First piece of the next or the previous trained stretch; where there is none, the piece itself.
  const begins = (at) => row.trained[row.starts[at]] && !(at && row.trained[row.starts[at - 1]]);
  for (let at = piece + step; at >= 0 && at < row.pieces.length; at += step) if (begins(at)) return at;
  return Math.max(piece, 0);
}

document.addEventListener("mouseover", (event) => {
  const token = event.target.closest(".tokens .t");
  if (token) show(token); else hide();
});
function go(box, piece, block) {
  const token = tokenAt(box, piece);
  const move = () => {
    token.scrollIntoView({ block });
    show(token);
  };
  move();
  // Blocks on the way are drawn now, and are seldom as high as was guessed.
  setTimeout(() => { if (here === token) move(); }, 120);
}

function pieceHere(box) {
  return here && box.contains(here) ? Number(here.dataset.piece) : -1;
}

document.addEventListener("click", (event) => {
  const token = event.target.closest(".tokens .t");
  const jump = event.target.closest("[data-jump]");
  if (token) {
    show(token);
  } else if (jump) {
    const box = document.querySelector(`.tokens[data-row="${jump.dataset.row}"]`);
    const before = Number(box.dataset.at || -1);
    box.dataset.at = stretch(rows[jump.dataset.row], before, Number(jump.dataset.jump));
    go(box, Number(box.dataset.at), "center");
  } else {
    hide();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") return hide();
  const box = document.activeElement.closest && document.activeElement.closest(".tokens");
  if (!box || event.ctrlKey || event.metaKey || event.altKey) return;
  const row = rows[box.dataset.row];
  const piece = pieceHere(box);
  const moves = {
    ArrowRight: () => piece + 1, ArrowLeft: () => piece - 1, Home: () => 0, End: () => row.pieces.length - 1,
    n: () => stretch(row, piece, 1), p: () => stretch(row, piece, -1),
  };
  if (!(event.key in moves)) return;
  event.preventDefault();
  go(box, moves[event.key](), "nearest");
});
document.addEventListener("scroll", () => {
  if (!here) return;
  const token = here.getBoundingClientRect(), box = here.closest(".tokens").getBoundingClientRect();
  const seen = token.bottom > Math.max(0, box.top) && token.top < Math.min(innerHeight, box.bottom);
  if (seen) place(); else hide();
}, { capture: true, passive: true });
