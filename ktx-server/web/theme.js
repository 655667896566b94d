// Sets the colours before the page is drawn: a module would come too late.
"use strict";
(() => {
  let theme = null;
  try {
    theme = localStorage.getItem("ktx.theme");
  } catch {
    // A browser that keeps nothing follows the system.
  }
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
})();
