"""Pictures of the console for docs/: a daemon on loopback with mail in several states, looked at by Chromium.

    python3 bench/screenshots.py [FOLDER]

Needs selenium, chromium and chromedriver. Writes console-light.png, console-dark.png and console-phone.png.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from selenium import webdriver

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

import mailproxy  # noqa: E402

PICTURES = {"light": (860, 720, "light"), "dark": (760, 470, "dark"), "phone": (375, 760, "light")}


def driver() -> Any:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for word in ("headless=new", "no-sandbox", "disable-gpu", "hide-scrollbars", "disable-lcd-text"):
        options.add_argument(f"--{word}")
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))


def take(url: str, folder: Path) -> None:
    browser = driver()
    try:
        for name, (width, height, scheme) in PICTURES.items():
            screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
            features = [{"name": "prefers-color-scheme", "value": scheme}]
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
            browser.get("about:blank")
            browser.get(url + ("#refused" if name == "dark" else ""))
            time.sleep(3)
            if name == "dark":
                browser.execute_script("document.querySelector('#detail').scrollIntoView()")
            browser.save_screenshot(str(folder / f"console-{name}.png"))
            print(folder / f"console-{name}.png")
    finally:
        browser.quit()


async def main(folder: Path) -> None:
    os.environ["no_proxy"] = "*"
    with tempfile.TemporaryDirectory() as queue:
        demo = mailproxy.Demo(queue, keep=True)
        running = asyncio.create_task(demo.run())
        await asyncio.sleep(6)  # then it is through
        client = demo._client
        bills = [
            {"id": f"bill-{i}", "from": "shop@example.com", "to": f"customer{i}@example.net", "subject": f"Invoice {i}",
             "body": "Thank you!\n", **({"deferred_ts": int(time.time()) + 3600} if i % 3 == 0 else {})}
            for i in range(2001, 2020)
        ]  # fmt: skip
        account = {"id": "news", "host": "127.0.0.1", "port": 9}
        letter = {"id": "news-7", "account_id": "news", "from": "news@example.com", "to": "ann@example.net"}
        for path, fields in (
            ("/account", account),
            ("/commands/add-messages", {"messages": [*bills, {**letter, "subject": "News", "body": "."}]}),
        ):
            await asyncio.to_thread(client.ask, "POST", path, fields)
        await asyncio.sleep(3)
        await asyncio.to_thread(take, f"{client.url}/", folder)
        running.cancel()
        await asyncio.wait([running])


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]) if sys.argv[1:] else PROJECT / "docs"))
