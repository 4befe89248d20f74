// What a reader can do with a page: sort, filter and unfold the leaderboard, enlarge pictures, show blurred ones.
// The page is complete without it. Text of the page is only moved and compared, never made into markup.
(() => {
  "use strict";

  const all = (selector, inside = document) => [...inside.querySelectorAll(selector)];
  const words = new Intl.Collator("en", { numeric: true });

  const make = (tag, className, ...content) => {
    const made = document.createElement(tag);
    made.className = className;
    made.append(...content);
    if (tag === "button") made.type = "button";
    return made;
  };

  // ---- tables of class `sortable`: th[data-sort] is number, rank or text; td[data-value] what a cell counts as, none: N/A

  const value = (row, at, kind) => {
    const found = row.cells[at].dataset.value;
    return found === undefined ? null : kind === "text" ? found : Number(found);
  };

  const sort = (table, at, ascending) => {
    const heads = [...table.tHead.rows[0].cells];
    const kind = heads[at].dataset.sort;
    const keyed = [...table.tBodies[0].rows].map((row) => [value(row, at, kind), row]);
    // the sort is stable, so equal values keep the order that the table had; what is missing is last either way
    keyed.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null);
      const order = kind === "text" ? words.compare(a, b) : a - b;
      return ascending ? order : -order;
    });
    table.tBodies[0].append(...keyed.map(([, row]) => row));
    heads.forEach((head, i) => {
      if (i === at) head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      else head.removeAttribute("aria-sort");
    });
  };

  for (const table of all("table.sortable")) {
    [...table.tHead.rows[0].cells].forEach((head, at) => {
      const button = make("button", "sort", ...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const now = head.getAttribute("aria-sort");
        sort(table, at, now ? now === "descending" : head.dataset.sort !== "number"); // of numbers the largest first
      });
    });
  }

  // ---- .controls[data-table]: a text and a standing that rows must have, and buttons that unfold groups of columns

  for (const controls of all(".controls[data-table]")) {
    const table = document.getElementById(controls.dataset.table);
    const [text, standing, shown] = ["input", "select", "output"].map((tag) => controls.querySelector(tag));
    const filter = () => {
      const wanted = text.value.toLowerCase().split(/\s+/).filter(Boolean);
      const rows = [...table.tBodies[0].rows];
      for (const row of rows) {
        const own = row.dataset.text.toLowerCase();
        const stands = !standing.value || row.dataset.standing === standing.value;
        row.hidden = !(stands && wanted.every((word) => own.includes(word)));
      }
      const left = rows.filter((row) => !row.hidden).length;
      shown.textContent = left === rows.length ? "" : `${left} of ${rows.length} strategies`;
    };
    text.addEventListener("input", filter);
    standing.addEventListener("change", filter);
    filter(); // a browser may have kept what was typed before
    for (const button of all("button[data-fold]", controls)) {
      button.addEventListener("click", () => {
        const unfold = button.getAttribute("aria-expanded") === "false";
        button.setAttribute("aria-expanded", String(unfold));
        for (const cell of all(`[data-fold="${Number(button.dataset.fold)}"]`, table)) cell.hidden = !unfold;
      });
    }
  }

  // ---- pictures in .samples: a click shows a blurred one, and enlarges any other; arrows go to its neighbours

  const picture = make("img", "");
  picture.alt = "";
  const about = make("p", "");
  const frame = make("button", "frame", picture);
  const close = make("button", "close", "Close");
  const dialog = make("dialog", "enlarged", frame, about, close);
  let figure = null;

  const label = (button) => {
    const blurred = button.querySelector("img").matches(".blurred");
    const otherwise = button === frame ? "Close" : "Enlarge this picture";
    button.setAttribute("aria-label", blurred ? "Show this blurred picture" : otherwise);
  };

  const show = (next) => {
    figure = next;
    const own = figure.querySelector("img");
    picture.src = own.src;
    picture.className = own.className;
    // a caption that is cut has the whole text in its title
    const lines = [...figure.querySelector("figcaption").children].map((line) => line.title || line.textContent);
    about.textContent = [...lines, figure.title].filter(Boolean).join("\n");
    label(frame);
    if (!dialog.open) dialog.showModal();
  };

  const unblur = (button) => {
    button.querySelector("img").classList.remove("blurred");
    label(button);
  };

  for (const own of all(".samples figure img")) {
    const button = make("button", "picture");
    own.replaceWith(button);
    button.append(own);
    label(button);
  }

  document.addEventListener("click", (event) => {
    const button = event.target.closest(".samples button.picture");
    if (!button) return;
    if (button.querySelector("img").matches(".blurred")) unblur(button);
    else show(button.closest("figure"));
  });

  frame.addEventListener("click", () => {
    if (!picture.matches(".blurred")) return dialog.close();
    unblur(figure.querySelector("button.picture"));
    show(figure);
  });
  close.addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close(); // beside the picture
  });
  dialog.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    const figures = all("figure", figure.closest(".samples")).filter((one) => one.querySelector("img"));
    show(figures[(figures.indexOf(figure) + step + figures.length) % figures.length]);
  });
  document.body.append(dialog);

  for (const control of all("[data-script]")) control.hidden = false;
})();
