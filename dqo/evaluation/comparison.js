// Search and order of the examples. Without this script all of them are shown, in the order of disagreement.
(() => {
  const list = document.getElementById("list");
  const search = document.getElementById("search");
  const sort = document.getElementById("sort");
  const matches = document.getElementById("matches");
  const examples = [...list.children];
  const texts = new Map(examples.map((one) => [one, one.textContent.toLowerCase()]));

  function filter() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let found = 0;
    for (const one of examples) {
      one.hidden = !words.every((word) => texts.get(one).includes(word));
      found += !one.hidden;
    }
    matches.textContent = words.length ? `${found} of ${examples.length}` : "";
  }

  function order() {
    const key = sort.value;
    list.append(...[...examples].sort((a, b) => a.dataset[key] - b.dataset[key] || a.dataset.rank - b.dataset.rank));
  }

  search.addEventListener("input", filter);
  sort.addEventListener("change", order);
  search.form.addEventListener("submit", (event) => event.preventDefault());
  search.form.hidden = false;
  // A browser that goes back fills the fields again.
  filter();
  order();
})();
