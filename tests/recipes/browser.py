"""A headless Chromium, driven by the DevTools protocol over two pipes."""

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
KEYS = {"ArrowDown": 40, "ArrowUp": 38, "ArrowLeft": 37, "ArrowRight": 39, "Tab": 9, "Enter": 13, "End": 35}


def find_browser():
    """The path of a Chromium, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page of a browser; `folder` holds its profile."""

    def __init__(self, folder: Path):
        here_in, there_out = os.pipe()
        there_in, here_out = os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,800", "--remote-debugging-pipe"]
        # The protocol wants commands on descriptor 3 and answers on 4.
        script = f'exec 3<&{there_in} 4>&{there_out}; exec "$@"'
        command = ["bash", "-c", script, "bash", find_browser(), *flags, f"--user-data-dir={folder}", "about:blank"]
        self._process = subprocess.Popen(command, pass_fds=(there_in, there_out), stderr=subprocess.DEVNULL)
        os.close(there_in)
        os.close(there_out)
        self._in, self._out = os.fdopen(here_in, "rb"), os.fdopen(here_out, "wb")
        self._number, self._session, self._unread = 0, None, b""
        self.messages = []  # what the page wrote to its console, errors included
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network"):
            self.call(f"{domain}.enable")
        self.requests = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._session = None
        self.call("Browser.close")
        self._in.close()
        self._out.close()
        self._process.wait(timeout=30)

    def call(self, method, **params):
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._out.write(json.dumps(message).encode() + b"\0")
        self._out.flush()
        while (answer := self._read()).get("id") != self._number:
            self._event(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, path: Path):
        self.call("Page.navigate", url=path.as_uri())
        while (event := self._read()).get("method") != "Page.loadEventFired":
            self._event(event)

    def run(self, script, *, wait=False):
        """The value of a JavaScript expression; with `wait`, of the promise that it makes."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=wait)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def press(self, *keys):
        """Press keys by name, or type single characters."""
        for key in keys:
            event = {"key": key, "windowsVirtualKeyCode": KEYS.get(key) or ord(key.upper())}
            if len(key) == 1:
                event["text"] = key
            self.call("Input.dispatchKeyEvent", type="keyDown", **event)
            self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def point(self, x, y):
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def screenshot(self) -> bytes:
        return base64.b64decode(self.call("Page.captureScreenshot")["data"])

    def _read(self):
        while b"\0" not in self._unread:
            more = os.read(self._in.fileno(), 2**16)
            assert more, "the browser has closed"
            self._unread += more
        message, _, self._unread = self._unread.partition(b"\0")
        return json.loads(message)

    def _event(self, event):
        if event.get("method") == "Network.requestWillBeSent":
            self.requests.append(event["params"]["request"]["url"])
        elif event.get("method") in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
            self.messages.append(event["params"])
