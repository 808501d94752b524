"""The pictures of the documentation that are not tables: the demo page in headless Chromium, and ``result.plot()``.

    OMP_NUM_THREADS=1 python benchmarks/screenshots.py

The page is shown after a solve, in the midst of its replay, and with a robot policy; seconds on it are of this machine,
so run it when that is quiet. Needs Chromium and its driver (Debian: chromium, chromium-driver).
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import torch
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

import parataxis as px
from parataxis import demo
from parataxis.denoisers import mixture
from parataxis.plots import figure_image

DOCS = Path(__file__).parent.parent / "docs"


def main() -> None:
    """Write the pictures."""
    plot()
    page("demo", demo.Settings(), replayed=6)
    page("demo-policy", demo.Settings("policy: button-press-topdown-v3", sampler="ddpm", window=16))


def plot() -> None:
    """Write the figure of the page Start, as its code makes it."""
    network = mixture(dim=64).network(px.vp())
    noise = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    result = px.sample(network, noise, px.samplers.ddim(px.vp(), steps=100), keep_residuals=True)
    figure_image(result.plot()).save(DOCS / "plot.png")


def page(name: str, settings: demo.Settings, replayed: int | None = None) -> None:
    """Serve the page, draw a sample, and write its picture; with ``replayed``, also that of this round."""
    served = demo.launch(port=0, initial=settings, wait=False)
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,1180"):
        options.add_argument(argument)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    wait = WebDriverWait(browser, 600)
    try:
        browser.get(served.local_url)
        wait.until(lambda page: page.find_elements(By.ID, "sample"))[0].click()
        wait.until(lambda page: page.find_elements(By.CSS_SELECTOR, "#figure img"))
        time.sleep(3)  # fades end
        save(browser, f"{name}.png")
        if replayed is not None:
            number = browser.find_element(By.CSS_SELECTOR, "#round input[type=range]")
            browser.execute_script(
                f"arguments[0].value = {replayed}; for (const name of ['input', 'change', 'pointerup'])"
                "arguments[0].dispatchEvent(new Event(name, {bubbles: true}));",
                number,
            )
            time.sleep(5)
            save(browser, f"{name}-replay.png")
    finally:
        browser.quit()
        served.close(verbose=False)


def save(browser: webdriver.Chrome, name: str) -> None:
    """Write a screenshot with few colours, which keeps it small."""
    path = DOCS / name
    browser.save_screenshot(str(path))
    Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)


if __name__ == "__main__":
    main()
