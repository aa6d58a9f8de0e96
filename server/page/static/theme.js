// Runs before the first paint, so that a chosen theme does not flash: the radio buttons are not there yet.
const chosen = localStorage.getItem("fedbasin-theme") ?? "auto";
document.documentElement.dataset.theme = chosen;

document.addEventListener("DOMContentLoaded", () => {
  document.getElementById(`theme-${chosen}`)?.click();
  delete document.documentElement.dataset.theme; // from here on the style sheet reads the radio buttons
  document.querySelector(".theme").addEventListener("change", ({ target }) => {
    localStorage.setItem("fedbasin-theme", target.id.replace("theme-", ""));
  });
});
