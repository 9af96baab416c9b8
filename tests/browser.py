"""Drive a headless Chromium over its pipe, without a package for it: load a page, ask it questions, take pictures."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

NAMES = ('chromium', 'chromium-browser', 'google-chrome')
FLAGS = (
    '--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update '
    '--disable-sync --hide-scrollbars --remote-debugging-pipe'
).split()
# What is wrong with the layout of a page: text wider than its box or the page, or text on other text in a chart.
FAULTS = """(() => {
  const found = [], root = document.documentElement;
  const name = node => node.nodeName + ' ' + (node.textContent || '').trim().slice(0, 40);
  if (root.scrollWidth > root.clientWidth) found.push(`page: ${root.scrollWidth} > ${root.clientWidth}`);
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const right = root.clientWidth + 0.5;
  while (walk.nextNode()) {
    const text = walk.currentNode, box = text.parentElement;
    if (!text.textContent.trim() || !box.checkVisibility()) continue;
    const isBlock = box instanceof HTMLElement && box.clientWidth;
    if (isBlock && box.scrollWidth > box.clientWidth + 1) found.push('cut: ' + name(box));
    const range = document.createRange();
    range.selectNodeContents(text);
    for (const r of range.getClientRects()) if (r.left < -0.5 || r.right > right) found.push('outside: ' + name(box));
  }
  for (const svg of document.querySelectorAll('svg')) {
    const frame = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll('text')].map(t => [t, t.getBoundingClientRect()]);
    texts.forEach(([one, a], i) => {
      if (a.left < frame.left - 1 || a.right > frame.right + 1 || a.top < frame.top - 1 || a.bottom > frame.bottom + 1)
        found.push('outside its chart: ' + name(one));
      for (const [two, b] of texts.slice(i + 1))
        if (a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 2 && b.top < a.bottom - 2)
          found.push(`on each other: ${name(one)} and ${name(two)}`);
    });
  }
  return JSON.stringify([...new Set(found)]);
})()"""


def browser() -> str | None:
    """Return the path of a Chromium, None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """A page in a browser of its own; a context."""

    def __enter__(self) -> Page:
        self.folder = tempfile.mkdtemp()
        ours, self.write = os.pipe()
        self.read, theirs = os.pipe()
        # The browser reads commands from its descriptor 3 and answers on 4.
        command = f'exec "$@" 3<&{ours} 4>&{theirs}'
        self.process = subprocess.Popen(
            ['bash', '-c', command, 'bash', browser(), *FLAGS, f'--user-data-dir={self.folder}', 'about:blank'],
            pass_fds=(ours, theirs), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(ours)
        os.close(theirs)
        self.number, self.rest, self.session = 0, b'', None
        target = next(t for t in self('Target.getTargets')['targetInfos'] if t['type'] == 'page')
        self.session = self('Target.attachToTarget', targetId=target['targetId'], flatten=True)['sessionId']
        self('Page.enable')
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.write)
        os.close(self.read)
        shutil.rmtree(self.folder, ignore_errors=True)

    def __call__(self, method: str, **params: object) -> dict:
        self.number += 1
        message = {'id': self.number, 'method': method, 'params': params}
        if self.session:
            message['sessionId'] = self.session
        os.write(self.write, json.dumps(message).encode() + b'\0')
        while (answer := self._next()).get('id') != self.number:
            pass
        assert 'error' not in answer, answer
        return answer['result']

    def _next(self) -> dict:
        while b'\0' not in self.rest:
            part = os.read(self.read, 1 << 20)
            assert part, 'the browser has ended'
            self.rest += part
        message, self.rest = self.rest.split(b'\0', 1)
        return json.loads(message)

    def open(self, path: Path, width: int, *, dark: bool = False, paper: bool = False) -> None:
        """Show a file at a width in pixels, light or dark, on the screen or as on paper."""
        self('Emulation.setDeviceMetricsOverride', width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        features = [{'name': 'prefers-color-scheme', 'value': 'dark' if dark else 'light'}]
        self('Emulation.setEmulatedMedia', media='print' if paper else 'screen', features=features)
        self('Page.navigate', url=path.absolute().as_uri())
        while self._next().get('method') != 'Page.loadEventFired':
            pass

    def ask(self, script: str) -> object:
        """Return what an expression is in the page."""
        return self('Runtime.evaluate', expression=script, returnByValue=True)['result'].get('value')

    def faults(self) -> list[str]:
        """Return what is cut, overflows, or lies on something else."""
        return json.loads(self.ask(FAULTS))

    def picture(self, path: Path, height: int) -> None:
        """Write a PNG of the top of the page."""
        width = self.ask('innerWidth')
        clip = {'x': 0, 'y': 0, 'width': width, 'height': height, 'scale': 1}
        data = self('Page.captureScreenshot', clip=clip, captureBeyondViewport=True)['data']
        path.write_bytes(base64.b64decode(data))
