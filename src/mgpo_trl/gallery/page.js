"use strict";
const PER_PAGE = 20, SVG = "http://www.w3.org/2000/svg";
const byId = (id) => document.getElementById(id);
const cards = Array.from(document.querySelectorAll("script.card"), (one) => JSON.parse(one.textContent));
cards.forEach((card, number) => {
  card.number = number;
  card.words = [card.id, card.question, card.answer, ...(card.choices || []), ...card.turns].join("\n").toLowerCase();
});
let chosen = cards, page = 0;

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

function words(card) {
  const column = make("div", "words");
  column.append(make("h3", "", card.question));
  if (card.choices) {
    const list = make("ul", "choices");
    card.choices.forEach((text, i) => {
      const letter = String.fromCharCode(65 + i);
      list.append(make("li", letter === card.answer ? "answer" : "", "(" + letter + ") " + text));
    });
    column.append(list);
  }
  const said = card.said === null ? "no boxed answer" : "says " + card.said;
  column.append(make("div", "verdict", (card.right ? "right: " : "wrong: ") + said + (card.right ? "" : ", right is " + card.answer)));
  const facts = Object.entries(card.facts).map(([name, value]) => name + " " + value);
  column.append(make("div", "meta", [card.id, card.category, card.status && "box " + card.status, ...facts].filter(Boolean).join(" · ")));
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
  const article = make("article", card.right ? "card right" : "card");
  article.append(view(card, picture), crops(card, picture), words(card));
  return article;
}

function show() {
  const pages = Math.max(1, Math.ceil(chosen.length / PER_PAGE));
  page = Math.min(Math.max(page, 0), pages - 1);
  byId("cards").replaceChildren(...chosen.slice(page * PER_PAGE, (page + 1) * PER_PAGE).map(element));
  byId("count").textContent = chosen.length + " of " + cards.length + " rollouts";
  byId("place").textContent = "page " + (page + 1) + " of " + pages;
  byId("previous").disabled = page === 0;
  byId("next").disabled = page === pages - 1;
}

function filter() {
  const [verdict, status, category] = ["verdict", "status", "category"].map((id) => byId(id).value);
  const text = byId("search").value.trim().toLowerCase();
  chosen = cards.filter((card) =>
    (!verdict || card.right === (verdict === "right")) && (!status || card.status === status) &&
    (!category || card.category === category) && (!text || card.words.includes(text)));
  page = 0;
  show();
}

function options(id, values) {
  const select = byId(id);
  [...new Set(values)].filter(Boolean).sort().forEach((value) => {
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
["verdict", "status", "category", "search"].forEach((id) => byId(id).addEventListener("input", filter));
byId("filters").addEventListener("submit", (event) => event.preventDefault());
byId("previous").addEventListener("click", () => turn(-1));
byId("next").addEventListener("click", () => turn(1));
document.addEventListener("keydown", (event) => {
  if (["INPUT", "SELECT"].includes(document.activeElement.tagName)) return;
  if (event.key === "ArrowRight") turn(1);
  if (event.key === "ArrowLeft") turn(-1);
});
show();
