"""The page in a real Chromium: what it shows is what is counted, whoever looks, whatever happens to the server."""

from __future__ import annotations

import base64
import os
import time
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
from axe_core_python.selenium import Axe
from looking import Browser
from prometheus_client.parser import text_string_to_metric_families
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys as Press
from selenium.webdriver.support.select import Select
from served import Server, Site, settle

from deployments.keys import Keys, parse_variable

pytestmark = pytest.mark.alone

ADMIN, SCORES = "admin-0123456789abcdef", "scores-0123456789abcdef"
EVIL = "<img src=x onerror=document.title='owned'>"
SIGNS = [EVIL, "a class with a name that goes on and on and on and on", *(f"sign {n}" for n in range(20))]


def metrics(url: str, model: str = "digits") -> dict[tuple[str, ...], float]:
    """(name, label values in the order of their names) → value, of the text format."""
    found = {}
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics").text):
        for sample in family.samples:
            if sample.labels.get("model") == model:
                labels = (value for key, value in sorted(sample.labels.items()) if key != "model")
                found[sample.name, *labels] = sample.value
    return found


def rows(browser: Browser, name: str) -> list[list[str]]:
    """The texts of a table's body, shown or not."""
    script = "return [...document.getElementById(arguments[0]).rows].map(r => [...r.cells].map(c => c.textContent))"
    return browser.execute_script(script, name)


def test_the_numbers_are_those_of_the_metrics(browser: Browser, serve, replica) -> None:
    """Counts, shares, classes, buckets, quantiles and the artifact, all from the text format."""
    one, (watch, url) = replica(), serve()
    watch.look()
    one.count("digits", clean=900, triggered=12, failed=3)
    watch.look()
    one.count("digits", clean=900)
    watch.look()
    browser.open(url)
    told = metrics(url)
    clean, flagged = (told["guard_inputs_total", verdict] for verdict in ("clean", "flagged"))
    assert browser.text("requests") == browser.text("images") == "1,815"
    assert browser.text("requests-note") == f"{clean:,.0f} clean, {flagged:.0f} flagged, 3 error, 0 skipped"
    assert browser.text("images-note") == "1,812 in the last minute"
    assert float(browser.text("share")[:-1]) == pytest.approx(100 * flagged / (clean + flagged), rel=0.05)
    assert browser.text("share-note") == f"{flagged:.0f} of 1,812 images; 0.50% expected of clean ones"
    assert browser.text("corrected") == f"{told[('guard_corrected_total',)]:.0f}"
    assert [browser.text(name) for name in ("rejected", "failed-open", "failed-closed")] == ["0", "3", "0"]
    assert float(browser.text("evidence")) == pytest.approx(told[("guard_attack_evidence",)], abs=0.05)
    classes = rows(browser, "class-rows")
    assert [row[0] for row in classes][:1] == ["7"]
    for label, _, counts, evidence in classes:
        images = told["guard_predicted_total", label]
        assert counts.startswith(f"{told['guard_flagged_total', label]:.0f} of {images:.0f} (")
        assert evidence == f"10^{told['guard_class_evidence', label]:.1f}"
    for name, series in (("score-rows", "guard_score_bucket"), ("p-rows", "guard_p_value_bucket")):
        below = [value for (one, *_), value in told.items() if one == series]
        counts = [below[0], *(b - a for a, b in pairwise(below))]
        shown = [int(row[1].replace(",", "")) for row in rows(browser, name)]
        assert shown == counts[: len(shown)]
        assert sum(shown) == 1812
    latency = {row[0]: row[2:] for row in rows(browser, "latency-rows")}
    assert [*latency] == ["decode", "queue", "original", "upstream", "corrected", "statistic", "total"]
    assert latency["total"][0].endswith("\N{NO-BREAK SPACE}ms")
    assert 20 < float(latency["total"][0].split()[0]) < 30
    assert latency["statistic"] == ["–", "–"]
    assert [row[0] for row in rows(browser, "drift-rows")] == ["score", "brightness", "contrast"]
    assert rows(browser, "request-rows") == [
        ["correct", "clean", f"{clean:,.0f}"],
        ["correct", "error", "3"],
        ["correct", "flagged", f"{flagged:.0f}"],
    ]
    assert rows(browser, "failure-rows") == [["corrected", "open", "3"]]
    facts = [browser.text(name) for name in ("name", "version", "method", "fingerprint", "threshold")]
    assert browser.text("alone") == "Model digits"
    assert facts == ["digits", "3", "mmdf", "0123456789ab", "p < 0.005"]
    assert not browser.complaints()


def test_no_traffic_is_said(browser: Browser, serve, replica) -> None:
    """First no model at all, then a model that nobody has asked."""
    watch, url = serve()
    browser.get(f"{url}/guard")
    settle(lambda: browser.find("empty").is_displayed())
    replica()
    watch.look()
    settle(lambda: browser.find("figures").is_displayed())
    assert browser.text("sentence") == "No images yet: there is nothing to judge."
    assert (browser.text("requests"), browser.text("share")) == ("0", "–")
    assert browser.find("score").get_attribute("aria-label") == "No images yet"
    assert {row[2] for row in rows(browser, "drift-rows")} == {"not enough images yet"}
    assert not browser.complaints()


def test_an_attack_is_said_and_ends(browser: Browser, serve, replica) -> None:
    """In the sentence, in the title, and once to who listens; the page follows without a reload or a jump."""
    one, (watch, url) = replica(), serve()
    watch.look()
    one.count("digits", clean=400)
    watch.look()
    browser.open(url)
    assert browser.text("sentence") == "No sign of an attack."
    assert {row[2] for row in rows(browser, "drift-rows")} != {"not enough images yet"}
    browser.execute_script(
        "window.jumps = 0; new PerformanceObserver(list => list.getEntries().forEach(one => { jumps += one.value }))"
        ".observe({type: 'layout-shift'})"
    )
    one.count("digits", triggered=40)
    watch.look()
    settle(lambda: browser.find("verdict").get_attribute("data-level") == "alarm")
    assert "an attack is likely, towards class 7." in browser.text("sentence")
    assert browser.title == "Attack likely: digits – the guard"
    assert browser.find("announcement").get_attribute("textContent") == "An attack is likely: digits"
    assert "alarm level 10^9" in browser.find("history").get_attribute("aria-label")
    one.count("digits", clean=20_000)
    watch.look()
    settle(lambda: browser.text("sentence") == "No sign of an attack.")
    assert browser.title == "The guard"
    assert browser.execute_script("return jumps") < 0.01
    assert not browser.complaints()


def test_names_are_text(browser: Browser, serve, replica) -> None:
    """Of classes and of models, in tables, sentences, titles and the selector."""
    one, (watch, url) = replica(("<b>bold", SIGNS, False)), serve()
    watch.look()
    one.count("<b>bold", clean=100, triggered=60)
    watch.look()
    browser.open(url)
    assert rows(browser, "class-rows")[0][0] == EVIL
    assert EVIL in browser.text("sentence")
    assert browser.title == "Attack likely: <b>bold – the guard"
    assert browser.text("name") == "<b>bold"
    assert not browser.find_elements(By.CSS_SELECTOR, "main img, main b")
    assert len(rows(browser, "class-rows")) == 12
    assert "the 12 of 22" in browser.text("classes-about")
    assert not browser.find("p-section").is_displayed()
    assert not browser.complaints()


def test_one_of_several_models_is_chosen(browser: Browser, serve, replica) -> None:
    """By the selector, and the choice lasts in the address; an alarm of another model is told in its name."""
    one, (watch, url) = replica(("a", ["x", "y"], True), ("b", ["x", "y"], False)), serve()
    watch.look()
    one.count("a", clean=50, triggered=40)
    one.count("b", clean=70)
    watch.look()
    browser.open(url)
    assert browser.text("images") == "90"
    select = Select(browser.find("model"))
    assert [option.text for option in select.options] == ["a (alarm)", "b"]
    select.select_by_value("b")
    assert (browser.text("images"), browser.text("method")) == ("70", "bna")
    browser.refresh()
    settle(lambda: browser.find("figures").is_displayed())
    assert browser.text("images") == "70"
    assert browser.title == "Attack likely: a – the guard"
    assert not browser.complaints()


def test_a_server_that_goes_is_told_and_one_that_comes_back(browser: Browser, tmp_path: Path, replica) -> None:
    """Figures stay, with the time that they are of. The same where the server answers and no longer looks."""
    one, site = replica(), Site(tmp_path, None)
    site.watch.look()
    browser.phone()
    with Server(site.app) as server:
        browser.open(server.url)
        assert browser.status() == "live"
    height = browser.find("status").rect["height"]
    settle(lambda: browser.status() == "trouble")
    assert browser.find("status").rect["height"] == height
    assert "No answer since " in browser.text("status")
    assert browser.find("figures").is_displayed()
    one.count("digits", clean=5)
    with Server(site.app, server.port):
        settle(lambda: browser.status() == "live" and browser.text("images") == "5")
        history = site.watch._watched["digits"].history
        history.append(history.pop() | {"time": time.time() - 60})
        settle(lambda: browser.status() == "trouble")
        assert "not counted since" in browser.text("status")
        site.watch.look()
        settle(lambda: browser.status() == "live")
    assert all("ERR_CONNECTION" in one for one in browser.complaints())


def test_the_key_stays_in_the_tab(browser: Browser, serve, replica) -> None:
    """Asked for in a form, refused with a reason, sent as a bearer token, kept over a reload, and forgotten."""
    watch, url = serve(Keys(parse_variable(f"administration:{ADMIN},scores:{SCORES}")))
    replica()
    watch.look()
    browser.get(f"{url}/guard/")
    settle(lambda: browser.find("locked").is_displayed())
    assert not violations(browser)
    assert browser.switch_to.active_element == browser.find("key")
    assert not browser.find("figures").is_displayed()
    for key, reason in (("unknown-0123456789", "does not know"), (SCORES, "another role"), ("é", "letters")):
        browser.switch_to.active_element.clear()
        browser.switch_to.active_element.send_keys(key, Press.ENTER)
        settle(lambda reason=reason: reason in browser.text("key-error"))
        assert browser.execute_script("return sessionStorage.length") == 0
    browser.find("key").clear()
    browser.find("key").send_keys(ADMIN, Press.ENTER)
    settle(lambda: browser.find("figures").is_displayed())
    assert browser.execute_script("return [sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]
    assert ADMIN not in browser.page_source
    browser.refresh()
    settle(lambda: browser.find("figures").is_displayed())
    browser.find("forget").click()
    settle(lambda: browser.find("locked").is_displayed())
    assert browser.execute_script("return sessionStorage.length") == 0
    assert all(" 401 " in one or " 403 " in one for one in browser.complaints())


def test_the_quarantine_shows_where_there_is_one(browser: Browser, tmp_path: Path, replica) -> None:
    """Its pictures, with words for them, and only pictures that came with the answer."""
    replica()
    site = Site(tmp_path, None)
    site.watch.look()
    dot = "data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA="
    png = "data:image/png;base64," + base64.b64encode(PIXEL).decode()
    entry = {"time": "2026-11-21T09:00:00+00:00", "model": "digits", "class": EVIL, "score": 9.25, "thumbnail": png}
    plain = site.watch.state
    with Server(site.app) as server:
        browser.open(server.url)
        assert not browser.find("quarantine").is_displayed()
        site.watch.state = lambda: (
            plain()
            | {"quarantine": [entry, entry | {"thumbnail": "https://elsewhere/x.png"}, entry | {"thumbnail": dot}]}
        )
        settle(lambda: browser.find("quarantine").is_displayed())
        pictures = browser.find("quarantined").find_elements(By.TAG_NAME, "img")
        settle(lambda: pictures[0].get_property("naturalWidth") == 1)
        assert [one.get_attribute("src") for one in pictures] == [png, None, None]
        assert pictures[0].get_attribute("alt") == f"Flagged image: {EVIL}, score 9.25"
        site.watch.state = plain
        settle(lambda: not browser.find("quarantine").is_displayed())
    assert all("ERR_CONNECTION" in one for one in browser.complaints())


PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def test_the_keyboard_reaches_everything(browser: Browser, serve, replica) -> None:
    """From the link that skips, over selector and tables, in the order of the page; focus is seen."""
    one, (watch, url) = replica(("a", ["x"], True), ("b", ["x"], False)), serve()
    watch.look()
    one.count("a", clean=50)
    watch.look()
    browser.open(url)
    reached = []
    for _ in range(6):
        browser.switch_to.active_element.send_keys(Press.TAB)
        focused = browser.switch_to.active_element
        reached.append(focused.get_attribute("id") or focused.text)
        assert focused.value_of_css_property("outline-style") == "solid"
    assert reached == [
        "Skip to the figures",
        "model",
        "Evidence by minute, as a table",
        "Requests by mode and verdict, failures by stage",
        "Scores, as a table",
        "P-values, as a table",
    ]
    focused.send_keys(Press.ENTER)
    assert browser.find("p-rows").is_displayed()
    time.sleep(2.5)  # a poll later
    assert browser.find("p-rows").is_displayed()
    assert browser.switch_to.active_element == focused


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1280])
def test_it_is_accessible_and_fits(browser: Browser, serve, replica, tmp_path: Path, scheme: str, width: int) -> None:
    """axe-core finds nothing serious, nothing is wider than the screen, and no two labels of a chart overlap. Pictures
    go to ``GUARD_SCREENSHOTS``."""
    one, (watch, url) = replica(("signs", SIGNS, False), ("digits", ["7", *"0123456"], True)), serve()
    watch.look()
    for _ in range(3):
        one.count("signs", clean=400, brightness=0.6)
        one.count("digits", clean=400, triggered=9, failed=1)
        watch.look()
    browser.media(prefers_color_scheme=scheme)
    browser.phone(width, 740)
    for name in ("signs", "digits"):
        browser.get("about:blank")
        browser.get(f"{url}/guard/#{name}")
        settle(lambda: browser.find("figures").is_displayed())
        picture(browser, f"{name}-{scheme}-{width}", tmp_path)
        browser.execute_script("document.querySelectorAll('details').forEach(one => { one.open = true })")
        assert not violations(browser)
        assert browser.execute_script("return document.documentElement.scrollWidth") == width
        assert not browser.execute_script(OVERLAPS)
    assert not browser.complaints()


def violations(browser: Browser) -> list[tuple[str, str, list[str]]]:
    """What axe-core calls serious or critical: rule, impact, and the markup that is meant."""
    found = [
        (one["id"], one["impact"], [node["html"] for node in one["nodes"]]) for one in Axe().run(browser)["violations"]
    ]
    return [one for one in found if one[1] in ("serious", "critical")]


OVERLAPS = """
const found = [];
for (const chart of document.querySelectorAll(".chart")) {
  const frame = chart.getBoundingClientRect();
  const boxes = [...chart.querySelectorAll("text")].map(one => [one.textContent, one.getBoundingClientRect()]);
  boxes.forEach(([text, a], index) => {
    if (a.left < frame.left - 1 || a.right > frame.right + 1 || a.top < frame.top - 1) found.push(text);
    for (const [other, b] of boxes.slice(index + 1))
      if (a.left < b.right && b.left < a.right && a.top + 3 < b.bottom && b.top + 3 < a.bottom)
        found.push([text, other]);
  });
}
return found;
"""


def picture(browser: Browser, name: str, folder: Path) -> None:
    """The whole page, as a file that is one."""
    size = browser.execute_script("return [innerWidth, document.documentElement.scrollHeight]")
    clip = {"x": 0, "y": 0, "width": size[0], "height": size[1], "scale": 1}
    taken = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    content = base64.b64decode(taken["data"])
    assert content.startswith(b"\x89PNG")
    folder = Path(os.environ.get("GUARD_SCREENSHOTS", folder))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.png").write_bytes(content)
