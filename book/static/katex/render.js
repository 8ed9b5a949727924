// Sets the formulas of a page. Sphinx loads it only where there are any.
{
  const folder = document.currentScript.src.replace(/[^/]*$/, "");
  const style = document.createElement("link");
  style.rel = "stylesheet";
  style.href = folder + "katex.min.css";
  const script = document.createElement("script");
  script.src = folder + "katex.min.js";
  script.onload = () => {
    for (const formula of document.querySelectorAll(".math")) {
      const text = formula.textContent.trim();
      const options = { displayMode: text.startsWith("\\["), throwOnError: false };
      katex.render(text.slice(2, -2), formula, options);
    }
    document.documentElement.dataset.formulas = "set";
  };
  document.head.append(style, script);
}
