"""Pages that the tool writes, in a headless Chromium: errors, requests, width, and pictures of them.

Each page is opened at 400 and 1400 pixels, light and dark. It passes where its console shows no error, nothing but the
page itself is asked for, and nothing is wider than the window. Look at the pictures: whether a page can be read no
figure says. On Debian `apt-get install chromium` brings one; another is given by --chromium.

A folder is a site: it is served on this machine, each of its pages is opened, and they may ask for what it holds.

    tools/measure pages runs/my-model/report.html --work /tmp/pages
    mkdocs build --strict -d /tmp/site && tools/measure pages /tmp/site --work /tmp/pages
"""

from __future__ import annotations

import base64
import contextlib
import functools
import http.server
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WIDTHS, SCHEMES = (400, 1400), ("light", "dark")
SECONDS = 60.0  # for an answer
SETTLED = 0.5  # seconds that a page has to draw itself
TALLEST = 16_000  # pixels of a picture; more does Chromium not draw


def add_options(parser) -> None:
    parser.add_argument("pages", nargs="+", type=Path, metavar="PAGE",
                        help="an HTML file, such as a run's report.html, or the folder of a site")  # fmt: skip
    parser.add_argument("--chromium", default=None, help="the program; by default the one that is installed")
    parser.add_argument("--work", type=Path, default=None, help="where pictures and PDFs go; by default nowhere")
    parser.add_argument("--json", type=Path, default=None, help="where to write the results")


def run(options) -> dict[str, Any]:
    names = ("chromium", "chromium-browser", "google-chrome")
    program = options.chromium or next(filter(None, map(shutil.which, names)), None)
    if program is None:
        raise SystemExit("error: no Chromium is installed; install one, or name it with --chromium")
    if options.work is not None:
        options.work.mkdir(parents=True, exist_ok=True)
    seen = []
    with browser(program) as pipe, contextlib.ExitStack() as servers:
        for named in options.pages:
            own = servers.enter_context(served(named)) if named.is_dir() else None
            for page in sorted(named.rglob("*.html")) if own else [named]:
                url = own + page.relative_to(named).as_posix() if own else page.resolve().as_uri()
                for width, scheme in itertools.product(WIDTHS, SCHEMES):
                    seen.append(look(pipe, page.resolve(), url, own or url, width, scheme, options.work))
    return {"seen": seen, "passed": all(not (one["errors"] or one["requests"] or one["overflow"]) for one in seen)}


def show(results) -> None:
    for one in results["seen"]:
        faults = [*one["errors"], *(f"asked for {url}" for url in one["requests"]),
                  *([f"{one['overflow']} pixels wider than the window"] if one["overflow"] else [])]  # fmt: skip
        window = f"{one['width']} px, {one['scheme']}, {one['height']} px high"
        print(f"{one['page']}, {window}: {'; '.join(faults) or 'ok'}")


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Files of a folder, without a line for each."""

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a folder on this machine, as long as the context lasts."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


class Pipe:
    """Chromium's own protocol over two pipes: JSON, each message ended by a zero."""

    def __init__(self, to: int, back: int):
        self._to, self._back, self._rest, self._number = to, back, b"", 0
        self.events: list[dict[str, Any]] = []

    def ask(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Send a command and wait for its answer; events that come meanwhile are kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            answer = self._next()
            if answer.get("id") != self._number:
                self.events.append(answer)
            elif "error" in answer:
                raise RuntimeError(f"{method}: {answer['error']}")
            else:
                return answer["result"]
        raise TimeoutError(method)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            block = os.read(self._back, 1 << 16)
            if not block:
                raise EOFError("Chromium ended")
            self._rest += block
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)


@contextlib.contextmanager
def browser(program: str) -> Iterator[Pipe]:
    """A Chromium with a profile of its own, which is gone afterwards."""
    (read_commands, to), (back, write_answers) = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # Chromium reads commands from 3 and answers into 4.
        shell = f'exec 3<&{read_commands} 4>&{write_answers}; exec "$@"'
        process = subprocess.Popen(
            ["bash", "-c", shell, "bash", program, "--headless=new", "--remote-debugging-pipe", "--no-sandbox",
             "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"],
            pass_fds=(read_commands, write_answers), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(read_commands)
        os.close(write_answers)
        try:
            yield Pipe(to, back)
        finally:
            process.terminate()
            process.wait(timeout=20)
            os.close(to)
            os.close(back)


def look(
    pipe: Pipe, page: Path, url: str, own: str, width: int, scheme: str, work: Path | None
) -> dict[str, Any]:
    """Open a page in a window so wide, and say what was wrong with it; it may ask for what begins with `own`."""
    context = pipe.ask("Target.createBrowserContext")["browserContextId"]  # nothing stays of what a page before chose
    target = pipe.ask("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
    session = pipe.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    for domain in ("Page", "Runtime", "Log", "Network"):
        pipe.ask(f"{domain}.enable", session)
    pipe.ask("Emulation.setDeviceMetricsOverride", session, width=width, height=900, deviceScaleFactor=1,
             mobile=width < 600)  # fmt: skip
    pipe.ask("Emulation.setEmulatedMedia", session, features=[{"name": "prefers-color-scheme", "value": scheme}])
    pipe.events.clear()
    pipe.ask("Page.navigate", session, url=url)
    _wait_until_loaded(pipe, session)
    size = "[document.documentElement.scrollWidth, window.innerWidth, document.documentElement.scrollHeight]"
    wide, window, height = pipe.ask("Runtime.evaluate", session, expression=size, returnByValue=True)["result"]["value"]
    if work is not None:
        name = f"{page.parent.name}-{page.stem}-{width}-{scheme}"
        clip = {"x": 0, "y": 0, "width": width, "height": min(height, TALLEST), "scale": 1}
        shot = pipe.ask("Page.captureScreenshot", session, format="png", captureBeyondViewport=True, clip=clip)
        (work / f"{name}.png").write_bytes(base64.b64decode(shot["data"]))
        if (width, scheme) == (WIDTHS[-1], "light"):
            printed = pipe.ask("Page.printToPDF", session, printBackground=True, preferCSSPageSize=True)
            (work / f"{name}.pdf").write_bytes(base64.b64decode(printed["data"]))
    events = [event for event in pipe.events if event.get("sessionId") == session]
    pipe.ask("Target.disposeBrowserContext", browserContextId=context)
    return {"page": str(page), "width": width, "scheme": scheme, "height": height, "overflow": max(0, wide - window),
            "errors": list(_errors(events)), "requests": list(_requests(events, own))}  # fmt: skip


def _wait_until_loaded(pipe: Pipe, session: str) -> None:
    """Return once all that a page asks for on loading is there, and it had time to draw itself.

    Raises:
        TimeoutError: it is not there after `SECONDS`.
    """
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        state = pipe.ask("Runtime.evaluate", session, expression="document.readyState", returnByValue=True)["result"]
        time.sleep(SETTLED)
        if state.get("value") == "complete":
            return
    raise TimeoutError("a page did not load")


def _errors(events: list[dict[str, Any]]) -> Iterator[str]:
    for event in events:
        method, what = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            details = what["exceptionDetails"]
            yield str(details.get("exception", {}).get("description", details["text"]))
        elif method == "Log.entryAdded" and what["entry"]["level"] in ("error", "warning"):
            yield f"{what['entry']['level']}: {what['entry']['text']}"
        elif method == "Runtime.consoleAPICalled" and what["type"] in ("error", "warning", "assert"):
            yield f"console: {[argument.get('value') for argument in what['args']]}"


def _requests(events: list[dict[str, Any]], own: str) -> Iterator[str]:
    for event in events:
        if event.get("method") == "Network.requestWillBeSent":
            url = event["params"]["request"]["url"]
            if not url.startswith((own, "data:", "blob:")):
                yield url
