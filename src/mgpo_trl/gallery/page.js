"use strict";
const PER_PAGE = 20, PER_STEP = 48, SVG = "http://www.w3.org/2000/svg";
const byId = (id) => document.getElementById(id);
const cards = Array.from(document.querySelectorAll("script.card"), (one) => JSON.parse(one.textContent));
cards.forEach((card, number) => {
  card.number = number;
  card.words = [card.id, card.question, card.answer, card.group, ...(card.choices || []), ...card.turns].join("\n").toLowerCase();
});
const FILTERS = ["verdict", "status", "category", "step"];
let chosen = cards, pages = [], page = 0;

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function rectangle(box, className) {
  const rect = document.createElementNS(SVG, "rect");
  rect.setAttribute("class", className);
  const [x1, y1, x2, y2] = box;
  Object.entries({ x: x1, y: y1, width: x2 - x1, height: y2 - y1 }).forEach(([k, v]) => rect.setAttribute(k, v));
  return rect;
}

function pictureOf(card) {
  const element = byId("picture-" + card.number);
  return element ? JSON.parse(element.textContent) : null;
}

function image(data, alt) {
  const element = make("img");
  element.alt = alt;
  element.src = "data:image/jpeg;base64," + data;
  return element;
}

function view(card, picture) {
  const box = make("div", "view");
  if (picture) box.append(image(picture.overview, "The image, " + card.size.join(" by ") + " pixels"));
  else {
    const blank = make("div", "none", "no picture");
    blank.style.aspectRatio = card.size.join(" / ");
    box.append(blank);
  }
  const overlay = document.createElementNS(SVG, "svg");
  overlay.setAttribute("viewBox", "0 0 " + card.size.join(" "));
  overlay.setAttribute("preserveAspectRatio", "none");
  card.targets.forEach((one) => overlay.append(rectangle(one, "target")));
  card.shown.forEach((one, i) => {
    if (one && String(one) !== String(card.boxes[i])) overlay.append(rectangle(one, "shown"));
  });
  card.boxes.forEach((one) => one && overlay.append(rectangle(one, "named")));
  box.append(overlay);
  return box;
}

function crops(card, picture) {
  const column = make("div", "crops");
  card.shown.forEach((region, i) => {
    const data = region && picture && picture.crops[i];
    if (data) column.append(image(data, "The region that came back, " + region.join(", ")));
    else column.append(make("div", "none", region ? "no picture" : "no crop: " + card.status.replaceAll("_", " ")));
  });
  if (!card.shown.length) column.append(make("div", "none", "answered directly"));
  return column;
}

function question(card) {
  const parts = [make("h3", "", card.question)];
  if (card.choices) {
    const list = make("ul", "choices");
    card.choices.forEach((text, i) => {
      const letter = String.fromCharCode(65 + i);
      list.append(make("li", letter === card.answer ? "answer" : "", "(" + letter + ") " + text));
    });
    parts.push(list);
  }
  return parts;
}

function verdict(card) {
  const said = card.said === null ? "no boxed answer" : "says " + card.said;
  if (card.right === null) return "not judged: " + said;
  return card.right ? "right: " + said : "wrong: " + said + ", right is " + card.answer;
}

function words(card) {
  const column = make("div", "words");
  if (!card.group) column.append(...question(card));
  column.append(make("div", "verdict", verdict(card)));
  const facts = Object.entries(card.facts).map(([name, value]) => name + " " + value);
  if (facts.length) column.append(make("div", "facts", facts.join(" · ")));
  column.append(make("div", "meta", [card.id, card.category, card.status && "box " + card.status].filter(Boolean).join(" · ")));
  card.turns.forEach((text, i) => {
    column.append(make("div", "turn-name", "round " + (i + 1)));
    const turn = make("div", "turn", text);
    turn.tabIndex = 0;
    column.append(turn);
  });
  return column;
}

function element(card) {
  const picture = pictureOf(card);
  const article = make("article", "card " + (card.right === null ? "unjudged" : card.right ? "right" : "wrong"));
  article.append(view(card, picture), crops(card, picture), words(card));
  return article;
}

// Neighbours of one group stand under their question, the others by themselves.
function groups(shown) {
  const elements = [];
  let name = "", row = null;
  shown.forEach((card) => {
    if (!card.group) return elements.push(element(card));
    if (card.group !== name) {
      const section = make("section", "group");
      row = make("div", "row");
      section.append(...question(card), make("div", "meta", card.group), row);
      elements.push(section);
      name = card.group;
    }
    row.append(element(card));
  });
  return elements;
}

// A page holds a number of cards. In a training it holds one step, or a part of a long one; no group is torn apart.
function paged(list) {
  const found = [];
  list.forEach((card) => {
    const last = found[found.length - 1];
    const room = last && last.length < (card.step === null ? PER_PAGE : PER_STEP);
    const torn = last && card.group && card.group === last[last.length - 1].group;
    if (last && last[0].step === card.step && (room || torn)) last.push(card);
    else found.push([card]);
  });
  return found.length ? found : [[]];
}

function show() {
  page = Math.min(Math.max(page, 0), pages.length - 1);
  const shown = pages[page], step = shown.length ? shown[0].step : null;
  byId("cards").replaceChildren(...groups(shown));
  byId("count").textContent = chosen.length + " of " + cards.length + " rollouts";
  byId("place").textContent = (step === null ? "" : "step " + step + ", ") + "page " + (page + 1) + " of " + pages.length;
  byId("previous").disabled = page === 0;
  byId("next").disabled = page === pages.length - 1;
}

function filter() {
  const [verdict, status, category, step] = FILTERS.map((id) => byId(id).value);
  const text = byId("search").value.trim().toLowerCase();
  chosen = cards.filter((card) =>
    (!verdict || card.right === (verdict === "right")) && (!status || card.status === status) &&
    (!category || card.category === category) && (!step || String(card.step) === step) &&
    (!text || card.words.includes(text)));
  pages = paged(chosen);
  page = 0;
  show();
}

function options(id, values) {
  const select = byId(id);
  const sorted = [...new Set(values)].filter(Boolean).sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
  sorted.forEach((value) => {
    const option = make("option", "", value);
    option.value = value;
    select.append(option);
  });
  if (select.options.length === 1) select.closest("label").hidden = true;
}

function turn(step) {
  page += step;
  show();
}

options("status", cards.map((card) => card.status));
options("category", cards.map((card) => card.category));
options("step", cards.map((card) => (card.step === null ? "" : String(card.step))));
[...FILTERS, "search"].forEach((id) => byId(id).addEventListener("input", filter));
byId("filters").addEventListener("submit", (event) => event.preventDefault());
byId("previous").addEventListener("click", () => turn(-1));
byId("next").addEventListener("click", () => turn(1));
document.addEventListener("keydown", (event) => {
  if (["INPUT", "SELECT"].includes(document.activeElement.tagName)) return;
  if (event.key === "ArrowRight") turn(1);
  if (event.key === "ArrowLeft") turn(-1);
});
filter();
