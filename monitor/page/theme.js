// Light or dark: as the system has it, unless chosen here. Not a module: it runs before the first paint, so that a
// chosen theme does not flash. The choice is all that this page ever keeps.
(() => {
  const KEY = "petswarm-theme";
  const LABELS = { system: "Theme: system", light: "Theme: light", dark: "Theme: dark" };
  const NAMES = Object.keys(LABELS);

  function stored() {
    try {
      const name = localStorage.getItem(KEY);
      return NAMES.includes(name) ? name : "system";
    } catch {
      return "system"; // storage is forbidden here
    }
  }

  function apply(name) {
    if (name === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = name;
    const button = document.getElementById("theme");
    if (button) button.textContent = LABELS[name];
    window.dispatchEvent(new Event("themechange"));
  }

  let theme = stored();
  apply(theme);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => apply(theme));
  document.addEventListener("DOMContentLoaded", () => {
    document.getElementById("theme").addEventListener("click", () => {
      theme = NAMES[(NAMES.indexOf(theme) + 1) % NAMES.length];
      try {
        localStorage.setItem(KEY, theme);
      } catch {
        // it holds for this visit
      }
      apply(theme);
    });
    apply(theme);
  });
})();
