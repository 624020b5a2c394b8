// What the page can do where scripts may run; without them it says the same.
"use strict";

// Click on a picture, or press Enter on it: it fills the window. Escape closes it.
const zoom = document.createElement("dialog");
zoom.append(new Image(), document.createElement("p"));
zoom.setAttribute("aria-label", "enlarged picture");
zoom.addEventListener("click", () => zoom.close());
document.body.append(zoom);
function enlarge(picture) {
  zoom.firstChild.src = picture.src;
  zoom.firstChild.alt = picture.alt;
  zoom.lastChild.textContent = picture.alt;
  zoom.showModal();
}
for (const picture of document.querySelectorAll("figure > img")) {
  picture.tabIndex = 0;
  picture.setAttribute("role", "button");
  picture.addEventListener("click", () => enlarge(picture));
  picture.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      enlarge(picture);
    }
  });
}

// The change between original and poisoned image, times what the slider says, on grey.
const slider = document.getElementById("gain");
function pixels(picture) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [picture.naturalWidth, picture.naturalHeight];
  const context = canvas.getContext("2d");
  context.drawImage(picture, 0, 0);
  return [canvas, context, context.getImageData(0, 0, canvas.width, canvas.height)];
}
function amplify() {
  document.getElementById("times").textContent = slider.value;
  for (const row of document.querySelectorAll(".pictures")) {
    const [original, poisoned, change] = ["original", "poisoned", "residual"].map((kind) =>
      row.querySelector(`[data-kind="${kind}"] img`),
    );
    const [canvas, context, image] = pixels(poisoned);
    const before = pixels(original)[2].data;
    for (let i = 0; i < image.data.length; i++) {
      if (i % 4 < 3) image.data[i] = 127.5 + slider.value * (image.data[i] - before[i]);
    }
    context.putImageData(image, 0, 0);
    change.src = canvas.toDataURL();
    change.nextElementSibling.textContent = `change, x ${slider.value}`;
  }
}
if (slider) {
  slider.closest("[hidden]").hidden = false;
  slider.addEventListener("input", amplify);
}

// Click on the head of a column: its rows in order, and again the other way round.
const number = (text) => parseFloat(text.replace(/[^0-9.+-].*$/, ""));
for (const head of document.querySelectorAll("th")) {
  const button = document.createElement("button");
  button.append(...head.childNodes);
  head.append(button);
  button.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    const place = [...head.parentNode.children].indexOf(head);
    const body = head.closest("table").tBodies[0];
    const text = (row) => row.children[place].textContent.trim();
    const order = (a, b) =>
      isNaN(number(text(a))) || isNaN(number(text(b)))
        ? text(a).localeCompare(text(b))
        : number(text(a)) - number(text(b));
    const rows = [...body.rows].sort((a, b) => (down ? -order(a, b) : order(a, b)));
    for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    body.append(...rows);
  });
}
