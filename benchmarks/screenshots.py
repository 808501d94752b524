"""The screenshots of the documentation: the demo page in headless Chromium, after a solve and in its replay.

    OMP_NUM_THREADS=1 python benchmarks/screenshots.py

Needs Chromium and its driver (Debian: chromium, chromium-driver).
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By

from parataxis import demo

DOCS = Path(__file__).parent.parent / "docs"


def main() -> None:
    """Serve the page, draw a sample, and write both pictures."""
    page = demo.launch(port=0, wait=False)
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,1240"):
        options.add_argument(argument)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    browser.implicitly_wait(300)
    try:
        browser.get(page.local_url)
        browser.find_element(By.ID, "sample").click()
        browser.find_element(By.CSS_SELECTOR, "#figure img")
        time.sleep(3)  # fades end
        save(browser, "demo.png")
        number = browser.find_element(By.CSS_SELECTOR, "#round input[type=range]")
        browser.execute_script(
            "arguments[0].value = 6; for (const name of ['input', 'change', 'pointerup'])"
            "arguments[0].dispatchEvent(new Event(name, {bubbles: true}));",
            number,
        )
        time.sleep(5)
        save(browser, "demo-replay.png")
    finally:
        browser.quit()
        page.close(verbose=False)


def save(browser: webdriver.Chrome, name: str) -> None:
    """Write a screenshot with few colours, which keeps it small."""
    path = DOCS / name
    browser.save_screenshot(str(path))
    Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)


if __name__ == "__main__":
    main()
