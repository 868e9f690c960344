"""Looks at every built page in a headless browser, wide and narrow, light and dark, and tells what a reader would see.

On no page may there be an error in the console, an equation that is not typeset, a picture that is missing, a request
to any other host, or a line that makes the whole page scroll sideways.

    python docs/check_pages.py docs/_build/html [--chromium PATH] [--pictures FOLDER]
"""

import argparse
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDTHS = (1280, 390)
"""A laptop's window and a phone."""
THEMES = ("light", "dark")

WHAT_IS_WRONG = """
async () => {
  if (window.MathJax && MathJax.startup) await MathJax.startup.promise;
  const wrong = [];
  const root = document.documentElement;
  if (root.scrollWidth > window.innerWidth) {
    const wide = [...document.querySelectorAll('main *')].filter(
      e => e.getBoundingClientRect().right > window.innerWidth + 1);
    const first = wide.length ? `, from <${wide[0].tagName.toLowerCase()} class="${wide[0].className}">` : '';
    wrong.push(`scrolls sideways: ${root.scrollWidth} px in ${window.innerWidth}${first}`);
  }
  for (const math of document.querySelectorAll('.math'))
    if (!math.querySelector('mjx-container')) wrong.push(`not typeset: ${math.textContent.slice(0, 60)}`);
  for (const error of document.querySelectorAll('mjx-merror'))
    wrong.push(`no mathematics: ${error.getAttribute('data-mjx-error')}`);
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const text = texts.currentNode;
    const isCode = text.parentElement.closest('pre, code, script, style, mjx-container');
    if (!isCode && /\\$\\$|\\\\\\(|\\\\\\[/.test(text.data))
      wrong.push(`raw mathematics: ${text.data.trim().slice(0, 60)}`);
  }
  for (const image of document.images) {
    image.loading = 'eager';
    await image.decode().catch(() => wrong.push(`picture missing: ${image.src}`));
  }
  return wrong;
}
"""


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing of each request."""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serves a folder on this machine, and yields its address.

    Args:
        folder: What to serve.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


def watch(page: Any, address: str, wrong: list[str]) -> None:
    """Notes errors of the console and of requests, and lets none leave this machine.

    Args:
        page: The browser's page.
        address: Where the site is served.
        wrong: What is found is added here.
    """

    def hold(route: Any) -> None:
        url = route.request.url
        if url.startswith((address, "data:", "blob:")):
            route.continue_()
        else:
            wrong.append(f"asks elsewhere: {url}")
            route.abort()

    page.route("**/*", hold)

    def hear(said: Any) -> None:
        if said.type in ("error", "warning"):
            wrong.append(f"console: {said.text}")

    page.on("console", hear)
    page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    page.on("response", lambda reply: wrong.append(f"{reply.status}: {reply.url}") if reply.status >= 400 else None)


def look(browser: Any, address: str, names: list[str], width: int, theme: str, pictures: Path | None) -> list[str]:
    """Returns what is wrong with the pages in a window of some width.

    Args:
        browser: The browser.
        address: Where the site is served.
        names: The pages, relative to it.
        width: Of the window, in pixels.
        theme: 'light' or 'dark'.
        pictures: Where to leave a picture of every page, if anywhere.
    """
    found = []
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme)
    for name in names:
        wrong: list[str] = []
        page = context.new_page()
        watch(page, address, wrong)
        page.goto(address + name, wait_until="networkidle")
        wrong += page.evaluate(WHAT_IS_WRONG)
        if pictures:
            page.screenshot(path=pictures / f"{name.replace('/', '_')}.{width}.{theme}.png", full_page=True)
        found += [f"{name} ({width} px, {theme}): {one}" for one in dict.fromkeys(wrong)]
        page.close()
    context.close()
    return found


def main() -> int:
    """Returns 1 if something is wrong with a page, after saying what."""
    parser = argparse.ArgumentParser(description="Looks at the built pages in a headless browser.")
    parser.add_argument("folder", type=Path, help="the built site")
    parser.add_argument("--chromium", default=next(filter(None, map(shutil.which, BROWSERS)), None))
    parser.add_argument("--pictures", type=Path, help="a folder for a picture of every page")
    args = parser.parse_args()
    names = sorted(path.relative_to(args.folder).as_posix() for path in args.folder.rglob("*.html"))
    # Sphinx's copies of what it was given are no pages.
    names = [name for name in names if not name.startswith(("_static/", "_downloads/", "_sources/"))]
    if not names:
        print(f"No pages in {args.folder}: run make docs first.")
        return 1
    if args.chromium is None:
        print(f"No Chromium here ({', '.join(BROWSERS)}): the {len(names)} pages were built, and not looked at.")
        return 0
    if args.pictures:
        args.pictures.mkdir(parents=True, exist_ok=True)

    from playwright.sync_api import sync_playwright

    found = []
    with served(args.folder) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=args.chromium, args=["--no-sandbox"])
        for width in WIDTHS:
            for theme in THEMES:
                found += look(browser, address, names, width, theme, args.pictures)
        browser.close()
    print("\n".join(found))
    print(f"{len(names)} pages, {len(WIDTHS)} widths, {len(THEMES)} themes: {len(found) or 'nothing'} wrong.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
