// Dark or light: as the system has it until somebody chooses. It runs before the page is drawn, so that nothing flashes.

(() => {
  const root = document.documentElement;
  const saved = () => {
    try {
      return localStorage.getItem("kvlocal-theme");
    } catch {
      return null;
    }
  };
  const choice = saved();
  if (choice === "dark" || choice === "light") root.dataset.theme = choice;

  addEventListener("DOMContentLoaded", () => {
    document.getElementById("theme").addEventListener("click", () => {
      const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
      root.dataset.theme = dark ? "light" : "dark";
      try {
        localStorage.setItem("kvlocal-theme", root.dataset.theme);
      } catch {
        // it lasts as long as the page then
      }
    });
  });
})();
