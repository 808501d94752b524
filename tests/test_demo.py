"""The demo page: its limits are checked on the server, and it works in a browser."""

from __future__ import annotations

import gc
import shutil
import time
import urllib.error
import urllib.request
import warnings

import numpy as np
import pytest

from parataxis import demo
from parataxis.cli import main
from parataxis.demo import sources

pytest.importorskip("gradio", reason="the extra demo is not installed")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # gradio's own
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # sockets of its server
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:gradio"),
]

SMALL = demo.Settings(steps=8, window=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "../../etc"}, "model must be one of digits"),
        ({"sampler": "euler_"}, "sampler must be one of ddim"),
        ({"solver": "speculative"}, "solver must be one of sequential"),
        ({"steps": 201}, r"steps must be a whole number in 1..200, got 201"),
        ({"steps": 2.5}, "steps must be a whole number"),
        ({"steps": True}, "steps must be a whole number"),
        ({"window": -1}, "window must be a whole number in 0..200"),
        ({"seed": 2**40}, "seed must be a whole number"),
        ({"tolerance": float("nan")}, "tolerance must lie in 0..1"),
        ({"tolerance": "x" * 10000}, "tolerance must lie in 0..1"),
    ],
)
def test_setting_that_the_page_does_not_offer_is_refused(changes, message):
    values = {**SMALL.__dict__, **changes}
    with pytest.raises(ValueError, match=message) as raised:
        demo.Settings.of(list(values.values()))
    assert len(str(raised.value)) < 300


def test_replay_has_a_picture_for_every_round():
    shown = demo.replay(demo.Settings.of([*SMALL.__dict__.values()]), forecast=True)
    assert len(shown.pictures) == shown.result.rounds + 1
    assert shown.error <= 1e-2
    assert shown.rows[2] == ["rounds", "8", str(shown.result.rounds)]
    assert "plain loop" in shown.forecast
    with pytest.raises(ValueError, match=r"label must lie in 0..9"):
        demo.replay(demo.Settings(label=10))
    with pytest.raises(ValueError, match="which flow_euler is not for"):
        demo.replay(demo.Settings(model="digits"))


def test_later_rounds_are_hidden_in_the_figure_of_a_round():
    """The last round shows all of it; before, columns to the right of the present round are nearly white."""
    shown = demo.replay(SMALL)
    first, last = (np.asarray(shown.figure(number)).astype(int) for number in (1, shown.last))
    changed = np.flatnonzero((first != last).any(2).any(0))
    assert changed.min() > 100  # the first round and the axis are left of that
    assert first[:, changed].mean() > last[:, changed].mean()


def test_policy_is_drawn_by_its_own_scheduler():
    name = "policy: button-press-topdown-v3"
    assert name in sources.names()
    shown = demo.replay(demo.Settings(model=name, sampler="ddpm", steps=10, window=4))
    assert shown.error <= 1e-2
    assert shown.pictures[0].size == shown.sequential.size
    with pytest.raises(ValueError, match="trained for ddpm, which flow_euler is not"):
        demo.replay(demo.Settings(model=name))
    with pytest.raises(ValueError, match="trained with 100 steps, got 101"):
        demo.replay(demo.Settings(model=name, sampler="ddpm", steps=101))


def test_command_refuses_a_port_that_is_none(capsys):
    assert main(["demo", "--port", "70000"]) == 2
    assert "--port must lie in 0..65535, got 70000" in capsys.readouterr().err


@pytest.fixture(scope="module")
def page():
    served = demo.launch(port=0, initial=SMALL, wait=False)
    yield served
    served.close(verbose=False)
    del served
    with warnings.catch_warnings():  # gradio leaves an event loop open: its warning belongs to no test after this
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def test_no_file_outside_its_folder_is_served(page):
    for path in ("/etc/passwd", "pyproject.toml", "../../etc/passwd", __file__):
        with pytest.raises(urllib.error.HTTPError) as raised:
            urllib.request.urlopen(f"{page.local_url}gradio_api/file={path}")
        assert raised.value.code in (403, 404)


def test_page_listens_on_the_loopback_address(page):
    assert page.local_url.startswith("http://127.0.0.1:")
    assert page.share_url is None


@pytest.fixture
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("chromium and its driver are not installed (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.add_argument("--window-size=1280,1150")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driven = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield driven
    driven.quit()


def wait_for(condition, seconds=120):
    """Return what a condition gives, as soon as it gives something."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.2)
    raise AssertionError("the page did not come so far")


def test_page_draws_and_replays_in_a_browser(page, browser):
    from selenium.webdriver.common.by import By

    def picture(name):
        found = browser.find_elements(By.CSS_SELECTOR, f"#{name} img")
        return found[0].get_attribute("src") if found else None

    browser.get(page.local_url)
    wait_for(lambda: browser.find_elements(By.ID, "sample"))[0].click()
    last = wait_for(lambda: picture("parallel") and picture("figure") and picture("sequential") and picture("parallel"))
    counts = wait_for(lambda: browser.find_element(By.ID, "counts").text)
    assert "rounds" in counts
    assert "8 of 8 steps accepted" in browser.find_element(By.ID, "caption").text
    number = browser.find_element(By.CSS_SELECTOR, "#round input[type=range]")
    browser.execute_script(
        "arguments[0].value = 1; for (const name of ['input', 'change', 'pointerup'])"
        "arguments[0].dispatchEvent(new Event(name, {bubbles: true}));",
        number,
    )
    wait_for(lambda: "after round 1" in browser.find_element(By.ID, "caption").text)
    assert wait_for(lambda: picture("parallel")) != last
    browser.find_element(By.CSS_SELECTOR, "#play").click()
    wait_for(lambda: "after round 0" in browser.find_element(By.ID, "caption").text)
    wait_for(lambda: "8 of 8 steps accepted" in browser.find_element(By.ID, "caption").text)
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
