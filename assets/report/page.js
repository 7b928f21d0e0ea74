// Sorts tables by their column headings, and shows the values of drawings beside the pointer. The page is well-formed XML and
// holds this text as it is: it has neither of the two characters that XML would take for markup.
(() => {
  "use strict";

  // --- tables: ascending, descending, then the order that the page came with

  const names = new Intl.Collator("en", { numeric: true });

  function values(row, column, numbers) {
    const cell = row.cells[column];
    if (numbers) return "number" in cell.dataset ? Number(cell.dataset.number) : null;
    const text = cell.textContent.trim();
    return ["", "-", "–"].includes(text) ? null : text;
  }

  function sorted(rows, column, direction) {
    const numbers = rows.some((row) => "number" in row.cells[column].dataset);
    const pairs = rows.map((row) => [values(row, column, numbers), row]);
    const known = pairs.filter(([value]) => value !== null);
    known.sort(([a], [b]) => direction * (numbers ? a - b : names.compare(a, b)));
    // Cells without a value come last in both directions.
    return [...known, ...pairs.filter(([value]) => value === null)].map(([, row]) => row);
  }

  for (const table of document.querySelectorAll("table")) {
    const body = table.tBodies[0];
    const original = [...body.rows];
    if (2 > original.length) continue;
    const headings = [...table.tHead.rows[0].cells];
    headings.forEach((heading, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.title = "sort by this column";
      button.append(...heading.childNodes);
      heading.append(button);
      button.addEventListener("click", () => {
        const next = { ascending: "descending", descending: null }[heading.getAttribute("aria-sort")];
        headings.forEach((other) => other.removeAttribute("aria-sort"));
        if (next === null) return body.append(...original);
        heading.setAttribute("aria-sort", next ?? "ascending");
        body.append(...sorted(original, column, next ? -1 : 1));
      });
    });
  }

  // --- drawings

  const tip = document.createElement("div");
  tip.id = "tip";
  tip.hidden = true;
  tip.setAttribute("aria-hidden", "true"); // the text alternative of a drawing is its description
  document.body.append(tip);

  // The browser would show a title of its own, later than this script does.
  for (const drawing of document.querySelectorAll("svg.drawing")) {
    drawing.setAttribute("aria-label", drawing.querySelector("title").textContent);
    drawing.setAttribute("aria-describedby", drawing.querySelector("desc").id);
    drawing.removeAttribute("aria-labelledby");
    drawing.querySelector("title").remove();
  }

  function label(mark) {
    if (!("label" in mark.dataset)) {
      const title = mark.querySelector("title");
      mark.dataset.label = title.textContent;
      title.remove();
    }
    return mark.dataset.label;
  }

  function show(text, event) {
    tip.textContent = text;
    tip.hidden = false;
    const { width, height } = tip.getBoundingClientRect();
    const right = document.documentElement.clientWidth - width - 4;
    const above = event.clientY - height - 12;
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 12, right))}px`;
    tip.style.top = `${above > 4 ? above : event.clientY + 20}px`;
  }

  // The points of a chart of lines that are nearest to the pointer, within 40 pixels: several where lines meet.
  function nearest(drawing, event) {
    const points = [...drawing.querySelectorAll("circle.point")].map((point) => {
      const box = point.getBoundingClientRect();
      const [x, y] = [box.left + box.width / 2, box.top + box.height / 2];
      return { point, x, y, away: Math.hypot(x - event.clientX, y - event.clientY) };
    });
    const best = points.reduce((a, b) => (a.away > b.away ? b : a));
    return best.away > 40 ? [] : points.filter(({ x, y }) => 3 > Math.hypot(x - best.x, y - best.y)).map(({ point }) => point);
  }

  let near = [];

  function hide() {
    near.forEach((point) => point.classList.remove("near"));
    near = [];
    tip.hidden = true;
  }

  function over(event) {
    hide();
    const drawing = event.target.closest?.("svg.drawing");
    if (!drawing) return;
    if (drawing.querySelector("circle.point")) {
      near = nearest(drawing, event);
      near.forEach((point) => point.classList.add("near"));
      if (near.length > 0) show(near.map(label).join("\n"), event);
    } else if (event.target !== drawing) {
      // Neither labels of axes nor grid lines have a title.
      if (!("label" in event.target.dataset || event.target.querySelector("title"))) return;
      show(label(event.target), event);
    }
  }

  document.addEventListener("pointermove", over);
  document.addEventListener("pointerdown", over);
  document.addEventListener("pointerleave", hide);
  document.addEventListener("scroll", hide, true);
})();
