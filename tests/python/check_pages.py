"""Opens pages and drawings in a headless Chromium: check_pages.py CHROMIUM FILE...

Each is loaded at 500 and 1,200 pixels of width, in light and in dark colours, and without scripts. Checked: it is well-formed XML, the
console stays empty, nothing else is requested, nothing is wider than the window, text has contrast, tables sort by click and by key, the
values of drawings show beside the pointer. MOEWARDEN_SCREENSHOTS=FOLDER keeps pictures. Needs nothing but Python.
"""

import base64
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --disable-dev-shm-usage --no-first-run --disable-background-networking
--disable-component-update --disable-sync --disable-extensions --remote-debugging-pipe""".split()

# The smallest contrast of text in WCAG 2.1, level AA.
CONTRAST = 4.5

PROBE = """(() => {
  const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => {
    const [r, g, b] = parts(colour).map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const background = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if ((parts(colour)[3] ?? 1) === 1) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const root = document.documentElement;
  const pale = [];
  for (const element of document.querySelectorAll("h1, h2, p, a, td, th, figcaption, text")) {
    const style = getComputedStyle(element);
    const [text, paper] = [light(element.tagName === "text" ? style.fill : style.color), light(background(element))];
    const contrast = (Math.max(text, paper) + 0.05) / (Math.min(text, paper) + 0.05);
    if (contrast < LEAST) pale.push(`${contrast.toFixed(1)}: ${element.textContent}`);
  }
  return {
    width: root.scrollWidth,
    window: innerWidth,
    paper: light(getComputedStyle(document.body ?? root).backgroundColor),
    pale,
    tables: document.querySelectorAll("table").length,
    buttons: document.querySelectorAll("th button").length,
    drawings: document.querySelectorAll("svg.drawing").length,
    titles: document.querySelectorAll("svg.drawing title").length,
  };
})()""".replace("LEAST", str(CONTRAST))

CELLS = """((n, column) => [...document.querySelectorAll("table")[n].tBodies[0].rows].map((row) => row.cells[column].textContent))"""


class Failed(Exception):
    """What is wrong with a page."""


class Browser:
    """A Chromium of its own, spoken to over pipes by the DevTools protocol: one JSON object and a zero byte a message."""

    def __init__(self, program, profile):
        read, self.write = os.pipe()
        self.read, write = os.pipe()
        start = f'exec "$0" "$@" 3<&{read} 4>&{write}'
        command = ["sh", "-c", start, program, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self.process = subprocess.Popen(command, pass_fds=(read, write), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
        os.close(read)
        os.close(write)
        self.rest, self.number, self.session, self.events = b"", 0, None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ["Page", "Runtime", "Log", "Network"]:
            self.call(f"{domain}.enable")

    def message(self):
        while b"\0" not in self.rest:
            more = os.read(self.read, 1 << 20)
            if not more:
                said = self.process.stderr.read().decode(errors="replace")[-2000:]
                raise SystemExit(f"chromium ended: {said}")
            self.rest += more
        line, self.rest = self.rest.split(b"\0", 1)
        return json.loads(line)

    def call(self, method, **params):
        self.number += 1
        ask = {"id": self.number, "method": method, "params": params}
        if self.session:
            ask["sessionId"] = self.session
        data = json.dumps(ask).encode() + b"\0"
        while data:
            data = data[os.write(self.write, data) :]
        while True:
            answer = self.message()
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise SystemExit(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def evaluate(self, expression):
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise Failed(f"{expression[:80]}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def open(self, url):
        """Loads a page; what the console says and what else is requested is an error."""
        self.events.clear()
        self.call("Page.navigate", url=url)
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.message())

    def complaints(self, url):
        for event in self.events:
            method, params = event.get("method"), event.get("params", {})
            if method == "Network.requestWillBeSent" and params["request"]["url"] != url:
                yield f"it requests {params['request']['url']}"
            elif method == "Runtime.consoleAPICalled":
                yield f"console.{params['type']}: {[arg.get('value') for arg in params['args']]}"
            elif method == "Runtime.exceptionThrown":
                thrown = params["exceptionDetails"].get("exception", {}).get("description", "")
                yield f"exception: {thrown.splitlines()[:1]}"
            elif method == "Log.entryAdded":
                yield f"console: {params['entry']['text']}"

    def mouse(self, kind, x, y, **more):
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def point(self, expression):
        """The middle of an element, after scrolling to it."""
        return self.evaluate(
            f"""(async () => {{
              const element = {expression};
              element.scrollIntoView({{ block: "center", inline: "center", behavior: "instant" }});
              // The event of scrolling comes with the next frame.
              for (let i = 0; i !== 2; i++) await new Promise((done) => requestAnimationFrame(done));
              const box = element.getBoundingClientRect();
              return [box.left + box.width / 2, box.top + box.height / 2];
            }})()"""
        )

    def end(self):
        self.session = None
        self.call("Browser.close")
        self.process.communicate(timeout=60)


def key(cell):
    """By what a cell of numbers is sorted: the last of them, without an interval; None without one."""
    text = re.sub(r"[\[(].*", "", cell.split("→")[-1])
    numbers = re.findall(r"-?\d+(?:\.\d+)?(?:e-?\d+)?", text)
    if re.search(r"[^\d\s.e%-]", text.replace("of", "").replace("min", "").replace(" s", "").replace(" h", "")) or not numbers:
        return None
    if " of " in text:
        return float(numbers[0]) / float(numbers[1]) if float(numbers[1]) else None
    if "%" in text:
        return float(numbers[0]) / 100
    if re.search(r"\d (s|min|h)\b", text):
        return sum(float(n) * {"s": 1, "min": 60, "h": 3600}[unit] for n, unit in re.findall(r"([\d.]+) (s|min|h)\b", text))
    return float(numbers[0])


def sorting(browser, tables):
    """Each column by click: ascending, descending, then as it was; one by key. Returns how many columns were sorted by number."""
    numeric = 0
    for n in range(tables):
        rows, columns = browser.evaluate(f"(() => {{ const t = document.querySelectorAll('table')[{n}]; return [t.tBodies[0].rows.length, t.tHead.rows[0].cells.length]; }})()")
        if rows < 2:
            continue
        for column in range(columns):
            heading = f"document.querySelectorAll('table')[{n}].tHead.rows[0].cells[{column}]"
            original = browser.evaluate(f"{CELLS}({n}, {column})")
            for state in ["ascending", "descending", None]:
                if column == 1 and state == "ascending":  # as people do it
                    x, y = browser.point(f"{heading}.querySelector('button')")
                    for kind in ["mousePressed", "mouseReleased"]:
                        browser.mouse(kind, x, y, button="left", clickCount=1)
                elif column == 1 and state == "descending":
                    browser.evaluate(f"{heading}.querySelector('button').focus()")
                    for kind in ["rawKeyDown", "char", "keyUp"]:
                        browser.call("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", text="\r", windowsVirtualKeyCode=13)
                else:
                    browser.evaluate(f"{heading}.querySelector('button').click()")
                if browser.evaluate(f"{heading}.getAttribute('aria-sort')") != state:
                    raise Failed(f"table {n}, column {column}: aria-sort is not {state}")
                found = browser.evaluate(f"{CELLS}({n}, {column})")
                if sorted(found) != sorted(original) or (state is None and found != original):
                    raise Failed(f"table {n}, column {column}: {state}: {found}, once {original}")
                keys = [key(cell) for cell in found]
                values = [cell for cell in found if cell not in ["", "-"]]
                if column == 0 or state is None or 2 * sum(k is not None for k in keys) < len(values) or not values:
                    continue
                known = [k for k in keys if k is not None]
                if known != sorted(known, reverse=state == "descending") or None in keys[: len(known)]:
                    raise Failed(f"table {n}, column {column}: not {state}: {found}")
                numeric += len(set(known)) > 1
    return numeric


def hovering(browser, drawings):
    """The first and the last mark of each drawing says what it is, within the window."""
    for n in range(drawings):
        marks = f"[...document.querySelectorAll('svg.drawing')[{n}].querySelectorAll('title')].map((title) => title.parentElement)"
        for end in ["[0]", ".at(-1)"]:
            # A mark that was shown has no title any more.
            browser.evaluate(f"globalThis.mark = ({marks}){end} ?? globalThis.mark")
            wanted = browser.evaluate("mark.querySelector('title')?.textContent ?? mark.dataset.label")
            x, y = browser.point("mark")
            browser.mouse("mouseMoved", x, y)
            tip = browser.evaluate("(() => { const t = document.getElementById('tip'), b = t.getBoundingClientRect(); return [!t.hidden, t.textContent, b.left >= 0 && b.top >= 0 && b.right <= innerWidth && b.bottom <= innerHeight]; })()")
            if not (tip[0] and wanted in tip[1].split("\n") and tip[2]):
                raise Failed(f"drawing {n}: the pointer is on {wanted!r}; shown, text, within the window: {tip}")
            browser.mouse("mouseMoved", 1, 1)
            if not browser.evaluate("document.getElementById('tip').hidden"):
                raise Failed(f"drawing {n}: {wanted!r} stays")


def look(browser, file, width, scheme):
    url = file.as_uri()
    browser.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False)
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    browser.open(url)
    found = browser.evaluate(PROBE)
    if file.suffix == ".html" and found["width"] > width:
        raise Failed(f"it is {found['width']} pixels wide")
    if (found["paper"] < 0.5) != (scheme == "dark"):
        raise Failed(f"the paper has the luminance {found['paper']}")
    if found["pale"]:
        raise Failed(f"contrast of text below {CONTRAST}: {found['pale'][:5]}")
    if folder := os.environ.get("MOEWARDEN_SCREENSHOTS"):
        picture = browser.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"{file.stem}-{width}-{scheme}.png").write_bytes(base64.b64decode(picture))
    if file.suffix == ".html" and scheme == "light":
        hovering(browser, found["drawings"])
    if file.suffix == ".html" and (width, scheme) == (1200, "light"):
        print(f"{file.name}: {found['tables']} tables, {sorting(browser, found['tables'])} sorts by number, {found['drawings']} drawings")
    for complaint in browser.complaints(url):
        raise Failed(complaint)
    return found


def without_scripts(browser, file, with_scripts):
    """Everything is there, and nothing that would do nothing."""
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    browser.open(file.as_uri())
    found = browser.evaluate(PROBE)
    browser.call("Emulation.setScriptExecutionDisabled", value=False)
    same = all(found[part] == with_scripts[part] for part in ["tables", "drawings"])
    if not same or found["buttons"] or found["titles"] <= found["drawings"] > 0:
        raise Failed(f"without scripts: {found}")


def main(program, *files):
    failures = []
    with tempfile.TemporaryDirectory() as profile:
        browser = Browser(program, profile)
        for file in map(Path, files):
            file = file.resolve()
            what = "well-formed XML"
            try:
                ElementTree.parse(file)
                for width in [500, 1200]:
                    for scheme in ["dark", "light"]:
                        what = f"{width} pixels, {scheme}"
                        found = look(browser, file, width, scheme)
                what = "without scripts"
                if file.suffix == ".html":
                    without_scripts(browser, file, found)
            except (Failed, ElementTree.ParseError, OSError) as error:
                failures.append(f"{file.name}: {what}: {error}")
        browser.end()
    sys.exit("\n".join(failures) or 0)


main(*sys.argv[1:])
