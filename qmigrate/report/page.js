"use strict";
// Where the pointer is on the axis of time, and what the source said last before that.
(() => {
  const course = document.getElementById("course");
  const source = document.getElementById("samples");
  const readout = document.getElementById("readout");
  const marks = course && course.querySelector(".marks");
  if (!source || !marks || !readout) return;
  const samples = JSON.parse(source.textContent);
  const length = Number(course.dataset.length);
  const line = document.createElement("i");
  line.className = "mark pointer";
  line.hidden = true;
  marks.append(line);
  const spell = (us) => {
    if (us < 1e6) return `${(us / 1e3).toFixed(1)} ms`;
    if (us < 6e7) return `${(us / 1e6).toFixed(2)} s`;
    const seconds = Math.round(us / 1e6);
    return `${Math.floor(seconds / 60)} min ${seconds % 60} s`;
  };
  const show = (event) => {
    const box = marks.getBoundingClientRect();
    const share = (event.clientX - box.left) / box.width;
    if (share < 0 || share > 1) return hide();
    let said = "";
    for (const [at, words] of samples) {
      if (at > share * length) break;
      said = words;
    }
    line.hidden = false;
    line.style.left = `${100 * share}%`;
    readout.textContent = spell(share * length) + (said && " · " + said);
  };
  const hide = () => {
    line.hidden = true;
    readout.textContent = "";
  };
  course.addEventListener("pointermove", show);
  course.addEventListener("pointerdown", show);
  course.addEventListener("pointerleave", hide);
})();
