"""Headless Chromium, driven by chromedriver over plain HTTP, and what a page shows in it. Holds no test."""

from __future__ import annotations

import base64
import io
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from ranks import free_port

CHROMIUM = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
DRIVER = shutil.which("chromedriver")
QUIET = (
    "--headless --no-sandbox --disable-gpu --hide-scrollbars --disable-background-networking --disable-component-update "
    "--disable-sync --no-first-run"
)
NODES = """
const all = []; const walk = n => { all.push(n); if (n.shadowRoot) walk(n.shadowRoot); for (const c of n.childNodes) walk(c); };
walk(document.body);
"""
"""Every node of the page, those inside web components too."""

needed = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no headless Chromium with chromedriver here")


class Browser:
    """One window."""

    def __init__(self, url: str, profile: Path) -> None:
        options = {"binary": CHROMIUM, "args": [*QUIET.split(), f"--user-data-dir={profile}"]}
        self._url = f"{url}/session"
        wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
        self._url += f"/{self._ask('POST', '', wanted)['sessionId']}"

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"{self._url}{path}", data, {"Content-Type": "application/json"}, method=method
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["value"]

    def open(self, url: str, width: int, height: int) -> None:
        """Show a page in a window of this size, which may be narrower than a desktop's windows get."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._ask("POST", "/goog/cdp/execute", {"cmd": "Emulation.setDeviceMetricsOverride", "params": metrics})
        self._ask("POST", "/url", {"url": "about:blank"})  # else another #fragment is no other page
        self._ask("POST", "/url", {"url": url})

    def run(self, script: str) -> Any:
        """What a script of the page returns."""
        return self._ask("POST", "/execute/sync", {"script": script, "args": []})

    def until(self, condition: str, seconds: float = 60.0) -> None:
        """Wait until a script returns what is true."""
        end = time.monotonic() + seconds
        while not self.run(condition):
            assert time.monotonic() < end, f"the page never came to {condition}"
            time.sleep(0.2)

    def text(self) -> str:
        """All that stands on the page."""
        return str(
            self.run(NODES + "return all.filter(n => n.nodeType == 3).map(n => n.textContent.trim()).join(' ');")
        )

    def strangers(self) -> list[str]:
        """What the page asked any other host for."""
        asked = "return performance.getEntriesByType('resource').map(e => e.name);"
        return [name for name in self.run(asked) if not name.startswith(("data:", "blob:", "http://127.0.0.1"))]

    def picture(self, whole: bool = False) -> np.ndarray:
        """uint8 [H, W, 3]: what is seen, or the ``whole`` page."""
        shown = {"cmd": "Page.captureScreenshot", "params": {"captureBeyondViewport": whole}}
        if whole:
            size = self.run("const e = document.documentElement; return [e.scrollWidth, e.scrollHeight];")
            shown["params"] |= {"clip": {"x": 0, "y": 0, "width": size[0], "height": size[1], "scale": 1}}  # type: ignore[index]
        png = base64.b64decode(self._ask("POST", "/goog/cdp/execute", shown)["data"])
        with Image.open(io.BytesIO(png)) as image:
            return np.asarray(image.convert("RGB"))

    def close(self) -> None:
        """End it."""
        self._ask("DELETE", "")


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A browser with a fresh profile."""
    port = free_port()
    driver = subprocess.Popen([str(DRIVER), f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        answers(f"{url}/status")
        window = Browser(url, profile)
        try:
            yield window
        finally:
            window.close()
    finally:
        driver.terminate()
        driver.wait()


def answers(url: str, seconds: float = 60.0) -> None:
    """Wait until a server on this host answers."""
    end = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(url, timeout=60):
                return
        except OSError:
            assert time.monotonic() < end, f"{url} does not answer"
            time.sleep(0.1)
