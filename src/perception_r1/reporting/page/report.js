async function copy(button) {
  const source = find(button.dataset.copies), label = button.textContent;
  try {
    await navigator.clipboard.writeText(source.textContent);
  } catch { // a browser that lets no page of a file at the clipboard: the text is at least chosen
    getSelection().selectAllChildren(source);
    if (!document.execCommand("copy")) return;
  }
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = label; }, 1500);
}

const data = JSON.parse(find("data").textContent);
if (find("charts")) showCurves(data.curves, data.runs, data.names);
if (find("cards")) {
  const near = new IntersectionObserver((entries) => { // pictures wait until somebody comes near
    if (!entries.some((entry) => entry.isIntersecting)) return;
    near.disconnect();
    new Cards(find("cards"), data);
  }, { rootMargin: "800px" });
  near.observe(find("cards"));
}
for (const button of document.querySelectorAll("[data-copies]")) button.addEventListener("click", () => copy(button));
