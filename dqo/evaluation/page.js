"use strict";
// Values under the pointer. The page is complete without this script; it only adds a tip.
(() => {
  const tip = document.getElementById("tip");

  function show(x, y, lines) {
    tip.replaceChildren(...lines.map((line) => {
      const row = document.createElement("div");
      row.textContent = line;
      return row;
    }));
    tip.hidden = false;
    const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
    tip.style.left = `${Math.max(8, Math.min(x + 14, room))}px`;
    tip.style.top = `${Math.max(8, y - tip.offsetHeight - 12)}px`;
  }

  for (const chart of document.querySelectorAll("[data-curves]")) {
    const { x: [low, high, start, end], series } = JSON.parse(chart.dataset.curves);
    const cursor = chart.querySelector(".cursor");
    const steps = [...new Set(series.flatMap((one) => one.steps))].sort((a, b) => a - b);
    chart.addEventListener("pointermove", (event) => {
      const box = chart.getBoundingClientRect();
      const at = ((event.clientX - box.left) / box.width) * chart.viewBox.baseVal.width;
      const wanted = low + ((at - start) / (end - start)) * (high - low);
      const step = steps.reduce((a, b) => (Math.abs(b - wanted) < Math.abs(a - wanted) ? b : a));
      const place = start + ((step - low) / (high - low)) * (end - start);
      cursor.setAttribute("x1", place);
      cursor.setAttribute("x2", place);
      cursor.classList.add("on");
      const values = series.filter((one) => one.steps.includes(step));
      show(event.clientX, event.clientY, [
        `step ${step}`,
        ...values.map((one) => `${one.label}: ${one.values[one.steps.indexOf(step)]}`),
      ]);
    });
    chart.addEventListener("pointerleave", () => {
      cursor.classList.remove("on");
      tip.hidden = true;
    });
  }

  for (const point of document.querySelectorAll("[data-tip]")) {
    const title = point.querySelector("title");
    if (title) title.remove(); // else the browser's own, slower tip appears on top
    const open = () => {
      const box = point.getBoundingClientRect();
      show(box.right, box.top, point.dataset.tip.split(/: (.*)/).slice(0, 2).flatMap((part) => part.split("], ").map(
        (line, i, all) => (i < all.length - 1 ? `${line}]` : line))));
    };
    for (const name of ["pointerenter", "focus"]) point.addEventListener(name, open);
    for (const name of ["pointerleave", "blur"]) point.addEventListener(name, () => { tip.hidden = true; });
  }

  // Paper cannot be clicked: print what is folded.
  let folded = [];
  addEventListener("beforeprint", () => {
    folded = [...document.querySelectorAll("details:not([open])")];
    for (const one of folded) one.open = true;
  });
  addEventListener("afterprint", () => { for (const one of folded) one.open = false; });
})();
