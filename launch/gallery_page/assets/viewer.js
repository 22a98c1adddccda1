// Sliders and the choice of a class. Without this script all pictures stand below each other.
(() => {
  // Of each track the last item at or before the position, else the first.
  const show = (viewer, position) => {
    for (const track of viewer.querySelectorAll(".track")) {
      const items = [...track.querySelectorAll(":scope > [data-at]")];
      const made = items.filter((item) => Number(item.dataset.at) <= position);
      const shown = made.at(-1) ?? items[0];
      for (const item of items) item.hidden = item !== shown;
    }
  };

  for (const viewer of document.querySelectorAll(".viewer")) {
    const slider = viewer.querySelector("input[type=range]");
    if (slider) {
      const labels = JSON.parse(slider.dataset.labels);
      const move = () => {
        const position = Number(slider.value);
        slider.setAttribute("aria-valuetext", labels[position]);
        viewer.querySelector("output").textContent = labels[position];
        show(viewer, position);
      };
      slider.addEventListener("input", move);
      for (const button of viewer.querySelectorAll("[data-move]")) {
        button.addEventListener("click", () => {
          slider.value = Number(slider.value) + Number(button.dataset.move);
          move();
        });
      }
      viewer.querySelector(".slider").hidden = false;
      move();
    }
    viewer.querySelector(".classes")?.addEventListener("change", (event) => {
      for (const row of viewer.querySelectorAll("[data-class]")) {
        row.hidden = event.target.value !== "" && row.dataset.class !== event.target.value;
      }
    });
  }
})();
