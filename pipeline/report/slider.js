// The sliders of `details.score`: moving one moves its tenths between kept and dropped, and says what is kept. Every
// number is looked up in the table below it.
(() => {
  "use strict";

  for (const score of document.querySelectorAll("details.score")) {
    const slider = score.querySelector(".slider input");
    const output = score.querySelector(".slider output");
    const lines = [...score.querySelectorAll(".cuts tbody tr")].map((row) => row.dataset.text);
    const tenths = [...score.querySelectorAll(".tenth")];
    const [kept, dropped] = ["kept", "dropped"].map((side) => {
      const part = document.createElement("div");
      const title = document.createElement("h3");
      part.className = side;
      title.textContent = side;
      part.append(title);
      return part;
    });
    score.querySelector(".tenths").append(kept, dropped);
    const move = () => {
      const num = Number(slider.value);
      tenths.forEach((tenth, i) => (i < num ? kept : dropped).append(tenth));
      output.textContent = lines[num];
      slider.setAttribute("aria-valuetext", lines[num]);
    };
    slider.addEventListener("input", move);
    move(); // a browser may have kept where it stood
  }
})();
