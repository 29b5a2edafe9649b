import base64
import copy
import io
import json
import math
import re
import shutil
import time
from html.parser import HTMLParser
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from launch.page import metric_name, script_json, write_page

NASTY = "a & b <i>\"x\"</i> 'y' </script><script>window.hacked = 1</script> {{js}}"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
RED, BLUE = (200, 30, 30), (30, 30, 200)
SIZE = 32


def _save(folder, path, pixels):
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).save(folder / path)
    return path


def _solid(colour, size=SIZE):
    return np.broadcast_to(np.array(colour, np.uint8), (size, size, 3))


def _checks(size=SIZE):
    board = np.indices((size, size)).sum(0) % 2 * 255
    return np.repeat(board[..., None], 3, 2)


def _part(mean, low=None, high=None, n=3, **more):
    return {"mean": mean, "low": low, "high": high, "n": n, **more}


def _example(folder):
    """Two data sets, four methods; `broken` failed on the second photo, `late` has no PSNR."""
    names = ["one", "two #1 100%?", NASTY]
    colours = {"bicubic": RED, "net": BLUE, NASTY: (30, 200, 30), "broken": (90, 90, 90)}
    images = {}
    for i, name in enumerate(names):
        shown = {}
        for j, (method, colour) in enumerate(colours.items()):
            if (method, i) != ("broken", 1):
                shown[method] = _save(folder, f"images/{i} #{j} 100%?.png", _solid(colour))
        lq = _save(folder, f"images/{i}-lq.png", _solid((9, 9, 9), SIZE // 4))
        hq = _save(folder, f"images/{i}-hq.png", _checks())
        images[name] = {"lq": lq, "hq": hq, "methods": shown, "crops": [{"x": 20, "y": 4, "size": 8}]}
    psnr = {"bicubic": [20.0, 22.0, 24.0], "net": [21.0, 23.0, 25.0], NASTY: [30.0, 19.0, 20.0]}
    values = {method: {"psnr": dict(zip(names, numbers, strict=True))} for method, numbers in psnr.items()}
    for k, method in enumerate([*psnr, "broken"]):
        scored = [name for i, name in enumerate(names) if (method, i) != ("broken", 1)]
        values.setdefault(method, {})["lpips"] = {name: round(0.1 * k + 0.01 * i, 2) for i, name in enumerate(scored)}
    means = {
        method: {m: _part(float(np.mean(list(v.values()))), n=len(v)) for m, v in of.items()}
        for method, of in values.items()
    }
    means["net"]["psnr"] = _part(23.0, 21.5, 24.5)
    gains = {
        "net": {"psnr": _part(1.0, 0.5, 1.5, wins=1.0), "lpips": _part(0.1, 0.05, 0.15, wins=0.0)},
        NASTY: {"psnr": _part(1.0, -3.0, 5.0, wins=0.25), "lpips": _part(-0.2, -0.3, -0.1, wins=1.0)},
        "broken": {"lpips": _part(-0.3, wins=1.0, n=2)},
    }
    return {
        "title": NASTY,
        "notes": ["toy numbers", NASTY],
        "sources": ["net: from a run", NASTY],
        "reference": "bicubic",
        "metrics": [
            {"id": "psnr", "protocol": "psnr | Y", "lower_better": False, "digits": 2},
            {"id": "lpips", "protocol": NASTY, "lower_better": True, "digits": 4},
        ],
        "datasets": [
            {"name": "photos", "paired": True, "images": names},
            {"name": "wild", "paired": False, "images": ["w"]},
        ],
        "methods": [
            {"name": "bicubic", "kind": "baseline", "failures": []},
            {"name": "net", "kind": "run", "failures": []},
            {"name": NASTY, "kind": "results", "failures": []},
            {
                "name": "broken",
                "kind": "weights",
                "failures": [{"dataset": "photos", "image": names[1], "reason": "out of <memory>"}],
            },
        ],
        "values": {"photos": values, "wild": {"net": {"lpips": {"w": 0.5}}}},
        "means": {"photos": means, "wild": {"net": {"lpips": _part(0.5, n=1)}}},
        "gains": {"photos": gains, "wild": {}},
        "pairs": {"photos": {f"net over {NASTY}": {"lpips": _part(-0.25, -0.5, -0.05, wins=1.0)}}, "wild": {}},
        "ranks": {"photos": {"bicubic": {"psnr": 2.5}, "net": {"psnr": 1.5}, NASTY: {"psnr": 2.0}}, "wild": {}},
        "missing": {"niqe": "no weights"},
        "efficiency": [
            {
                "method": "net",
                "trainable": 1_234_567,
                "total": 2_000_000_000,
                "macs": None,
                "seconds": 0.25,
                "spread": 0.01,
                "memory_mb": 812.4,
                "denoiser_calls": 1,
            }
        ],
        "published": [
            {
                "paper": "A paper",
                "table": "Tab. 2",
                "protocol": "RGB",
                "columns": ["PSNR", "LPIPS"],
                "rows": {"DRealSR": {"theirs": [28.31, None]}},
            }
        ],
        "images": {"photos": images, "wild": {"w": {**images["one"], "hq": None, "crops": []}}},
        "figures": [{"label": "net", "caption": "a <plot>", "path": _save(folder, "figures/a b.png", _checks())}],
    }


class _Tags(HTMLParser):
    """All tags with their attributes, and the text inside each element that has an id."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self._inside = [], {}, None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = dict(attrs).get("id", tag)

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        if self._inside is not None:
            self.texts[self._inside] = self.texts.get(self._inside, "") + data


def _read(page):
    tags = _Tags(page.read_text())
    return tags, json.loads(tags.texts["data"])


# -------------------------------------------------------------------------------------------------- without a browser


def test_names_with_markup_stay_text(tmp_path):
    data = _example(tmp_path)
    page = write_page(tmp_path, data)
    tags, shown = _read(page)
    assert tags.texts["title"] == tags.texts["h1"] == NASTY
    assert [attrs.get("type") for tag, attrs in tags.tags if tag == "script"] == ["application/json", None]
    assert not [tag for tag, _ in tags.tags if tag == "i"]
    for part in ("notes", "methods", "values", "means", "gains", "published", "missing", "efficiency"):
        assert shown[part] == json.loads(json.dumps(data[part]))
    assert page.read_text().count("window.hacked") > 0
    assert "<script>window.hacked" not in page.read_text()
    assert page.read_bytes().isascii()


def test_json_survives_a_script_element_and_any_number():
    text = script_json({"</script>": "<!--&\u2028'\"", "numbers": [math.nan, math.inf, -math.inf, 0.1 + 0.2, 7, None]})
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {
        "</script>": "<!--&\u2028'\"",
        "numbers": [None, "Infinity", "-Infinity", 0.3, 7, None],
    }


@pytest.mark.parametrize("embed", [False, True])
def test_the_page_names_nothing_outside_its_folder(tmp_path, embed):
    data = _example(tmp_path)
    page = write_page(tmp_path, data, embed)
    tags, shown = _read(page)
    for tag, attrs in tags.tags:
        assert "src" not in attrs, tag
        assert attrs.get("href", "#")[0] == "#" or attrs["href"] == "data:,"
    code = page.read_text().replace(tags.texts["data"], "")
    assert not re.search(r"https?:|@import|url\(|fetch\(|XMLHttp|import\(|innerHTML|eval\(", code)
    assert "default-src 'none'" in code
    assert len(list(tmp_path.glob("*.html"))) == 1
    for image in shown["images"]["photos"].values():
        assert all(re.match(r"#picture-\d+$" if embed else r"images/", path) for path in image["methods"].values())


def test_pictures_lie_beside_the_page_under_addresses_that_lead_to_them(tmp_path):
    data = _example(tmp_path)
    _, shown = _read(write_page(tmp_path, data))
    for name, image in data["images"]["photos"].items():
        for method, path in image["methods"].items():
            address = shown["images"]["photos"][name]["methods"][method]
            assert not set("#? \"'") & set(address)
            assert unquote(address) == path


def test_embedded_pictures_are_the_same_bytes_and_each_comes_once(tmp_path):
    data = _example(tmp_path)
    tags, shown = _read(write_page(tmp_path, data, embed=True))
    paths = {}
    for dataset, images in data["images"].items():
        for name, image in images.items():
            there = shown["images"][dataset][name]
            paths |= {there["methods"][method]: path for method, path in image["methods"].items()}
            paths |= {there[kind]: image[kind] for kind in ("lq", "hq") if image[kind] is not None}
    paths[shown["figures"][0]["path"]] = data["figures"][0]["path"]
    blocks = {name: text for name, text in tags.texts.items() if name.startswith("picture-")}
    assert {f"#{name}" for name in blocks} == paths.keys()
    assert len(set(paths.values())) == len(blocks)
    for name, text in blocks.items():
        head, _, body = text.strip().partition(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(body, validate=True) == (tmp_path / paths[f"#{name}"]).read_bytes()


@pytest.mark.parametrize("embed", [False, True])
def test_equal_data_give_equal_bytes_and_stay_as_they_were(tmp_path, embed):
    data = _example(tmp_path / "a")
    before = copy.deepcopy(data)
    first = write_page(tmp_path / "a", data, embed).read_bytes()
    assert data == before
    assert write_page(tmp_path / "b", _example(tmp_path / "b"), embed).read_bytes() == first
    assert write_page(tmp_path / "a", data, embed).read_bytes() == first


@pytest.mark.parametrize("embed", [False, True])
def test_a_picture_that_is_not_there_is_named(tmp_path, embed):
    data = _example(tmp_path)
    lost = data["images"]["photos"]["one"]["methods"]["net"]
    (tmp_path / lost).unlink()
    data["figures"].append({"label": "x", "caption": "", "path": "figures/none.png"})
    _, shown = _read(write_page(tmp_path, data, embed))
    assert shown["lost"] == [lost, "figures/none.png"]
    assert shown["images"]["photos"]["one"]["methods"]["net"] is None
    assert shown["figures"][1]["path"] is None


def test_the_page_says_what_it_weighs(tmp_path):
    data = _example(tmp_path)
    for i in range(40):
        _save(tmp_path, f"images/noise-{i}.png", np.random.default_rng(i).integers(0, 256, (64, 64, 3)))
        data["figures"].append({"label": "noise", "caption": "", "path": f"images/noise-{i}.png"})
    size = sum(path.stat().st_size for path in tmp_path.rglob("*.png"))
    count = len(list(tmp_path.rglob("*.png")))
    for embed, place in ((False, "beside"), (True, "in")):
        page = write_page(tmp_path, data, embed)
        found = re.search(rf"weighs (.+); (\d+) pictures of (.+) lie {place} it", page.read_text())
        assert int(found[2]) == count
        for text, exact in ((found[1], page.stat().st_size), (found[3], size)):
            number, unit = text.split()
            assert float(number) * {"kB": 1e3, "MB": 1e6}[unit] == pytest.approx(exact, rel=0.05)


# ------------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def chromium():
    if CHROMIUM is None:
        pytest.skip(f"no Chromium found: none of {', '.join(BROWSERS)} is on the PATH")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium, tmp_path):
    """Opens the example (or other data) from disk; at the end nothing was complained about or asked of the network."""
    trouble, contexts = [], []

    def ask(request):
        if not request.url.startswith(("file:", "data:")):
            trouble.append(request.url)

    def start(data=None, embed=False, **options):
        path = write_page(tmp_path, data or _example(tmp_path), embed)
        if embed:
            shutil.rmtree(tmp_path / "images")
        contexts.append(chromium.new_context(viewport={"width": 1200, "height": 900}, **options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: trouble.append(message.text))
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("requestfailed", lambda request: trouble.append(request.url[:100]))
        page.on("request", ask)
        page.goto(path.as_uri())
        return page

    yield start
    for context in contexts:
        context.close()
    assert trouble == []


def _until(true, seconds=5.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def _names(page, table):
    return page.locator(f"#{table} tbody th > span:first-child").all_inner_texts()


def _head(page, table, label):
    return page.locator(f"#{table} thead th").filter(has_text=label)


def _loaded(page):
    """Wait for the viewer's pictures."""
    pictures = "#images .pane img, #images .tile img"
    script = f"[...document.querySelectorAll('{pictures}')].every(i => i.dataset.path === 'null' || i.naturalWidth)"
    _until(lambda: page.evaluate(script))


def _colour(page, x, y=0.8):
    """Colour that the stage shows at a place, in parts of its width and height."""
    with Image.open(io.BytesIO(page.locator("#stage").screenshot())) as image:
        return image.convert("RGB").getpixel((int(x * image.width), int(y * image.height)))


def _views(page):
    """Of each visible picture: which part of it is in the middle of its box, and how large it is in boxes."""
    return np.array(
        page.evaluate(
            """[...document.querySelectorAll("#images .pane img, #images .tile img")].filter(i => !i.hidden).map(i => {
              const box = i.parentElement.getBoundingClientRect(), at = i.getBoundingClientRect();
              return [(box.x + box.width / 2 - at.x) / at.width, (box.y + box.height / 2 - at.y) / at.height,
                      at.width / box.width];
            })"""
        )
    )


def _middle(locator):
    box = locator.bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


@pytest.mark.browser
@pytest.mark.parametrize("embed", [False, True])
def test_the_page_opens_and_names_are_text(opened, embed):
    page = opened(embed=embed)
    _loaded(page)
    assert page.title() == NASTY
    assert page.inner_text("h1") == NASTY
    assert page.locator("#notes p").inner_text() == "toy numbers"
    assert page.locator("#notes details").evaluate("d => d.open") is False
    assert page.locator("#notes li").all_text_contents() == [NASTY]
    assert _names(page, "means-table") == ["bicubic", "net", NASTY, "broken"]
    assert page.evaluate("window.hacked") is None
    assert page.locator("i").count() == 0
    assert page.locator("#figures img").get_attribute("alt") == "net: a <plot>"
    assert page.locator("img:not([alt]), button:empty:not([aria-label])").count() == 0


@pytest.mark.browser
def test_a_click_on_a_heading_sorts_best_first_then_the_other_way_what_is_missing_last(opened):
    page = opened()
    psnr, lpips = (_head(page, "means-table", label) for label in ("PSNR", "LPIPS"))
    psnr.locator("button").click()
    assert _names(page, "means-table") == ["net", NASTY, "bicubic", "broken"]
    assert psnr.get_attribute("aria-sort") == "descending"
    psnr.locator("button").press("Enter")
    assert _names(page, "means-table") == ["bicubic", "net", NASTY, "broken"]
    assert psnr.get_attribute("aria-sort") == "ascending"
    lpips.locator("button").click()
    assert _names(page, "means-table") == ["bicubic", "net", NASTY, "broken"]
    assert lpips.get_attribute("aria-sort") == "ascending"
    assert psnr.get_attribute("aria-sort") is None


@pytest.mark.browser
def test_means_come_with_interval_and_number_of_images(opened):
    page = opened()
    row = page.locator("#means-table tbody tr").filter(has=page.get_by_text("net", exact=True))
    assert row.locator("td").nth(0).inner_text() == "3"
    assert row.locator("td").nth(1).inner_text().split("\n") == ["23.00", "[21.50, 24.50]"]
    broken = page.locator("#means-table tbody tr").nth(3).locator("td")
    assert broken.nth(0).inner_text() == "2 of 3"
    assert broken.nth(1).inner_text() == "\u2013"


@pytest.mark.browser
def test_only_improvements_whose_interval_excludes_zero_are_bold(opened):
    page = opened()
    bold = page.locator("#gains-table tbody strong").all_inner_texts()
    assert bold == ["+1.00", "\u22120.2000"]  # net's PSNR, and the LPIPS that fell; not the one that rose
    assert page.locator("#means strong, #ranks strong").count() == 0
    weights = page.locator("#gains-table tbody td > :first-child").evaluate_all(
        "all => all.map(e => [e.tagName, Number(getComputedStyle(e).fontWeight)])"
    )
    assert all((weight >= 600) == (tag == "STRONG") for tag, weight in weights)
    assert page.locator("#gains-table").get_by_text("wins 25 %").count() == 1


@pytest.mark.browser
def test_differences_to_other_methods_have_a_table_where_there_are_any(opened):
    page = opened()
    row = page.locator("#pairs-table tbody tr")
    assert row.locator("th > span").inner_text() == f"net over {NASTY}"
    lines = ["\u22120.2500", "[\u22120.5000, \u22120.0500]", "wins 100 %"]
    assert row.locator("td").nth(1).inner_text().split("\n") == lines
    assert row.locator("strong").count() == 1
    assert page.locator("#sources-list li").all_inner_texts() == ["net: from a run", NASTY]
    page.get_by_label("wild").check()
    assert page.locator("#pairs").is_hidden()


@pytest.mark.browser
def test_what_failed_or_is_missing_is_counted(opened):
    page = opened()
    text = page.locator("#gaps-list").inner_text()
    assert "broken failed on 1 of 3 images of photos" in text
    assert "niqe was not computed: no weights" in text
    page.locator("#gaps-list summary").filter(has_text="broken failed").press("Enter")
    assert "two #1 100%?: out of <memory>" in page.locator("#gaps-list").inner_text()


@pytest.mark.browser
def test_efficiency_and_published_numbers(opened):
    page = opened()
    cells = page.locator("#efficiency-table tbody td").all_inner_texts()
    assert [cell.split("\n")[0] for cell in cells] == ["1.23 M", "2.00 G", "\u2013", "0.25", "812 MB", "1"]
    assert page.locator("#published h3, #published h4").all_inner_texts() == ["A paper", "Tab. 2"]
    assert page.locator("#published article > p").all_inner_texts() == ["Protocol: RGB"]
    assert page.locator("#published td").all_inner_texts() == ["DRealSR", "28.31", "\u2013"]


@pytest.mark.browser
def test_the_divider_uncovers_left_or_right_by_mouse_and_by_keyboard(opened):
    page = opened()
    page.select_option("#left", label="bicubic")
    page.select_option("#right", label="net")
    _loaded(page)
    assert (_colour(page, 0.25), _colour(page, 0.75)) == (RED, BLUE)
    stage = page.locator("#stage").bounding_box()
    page.locator("#divider").hover()
    page.mouse.down()
    page.mouse.move(stage["x"] + 0.9 * stage["width"], stage["y"] + 9, steps=4)
    page.mouse.up()
    assert _colour(page, 0.75) == RED
    assert page.locator("#divider").get_attribute("aria-valuenow") == "90"
    for _ in range(4):
        page.locator("#divider").press("PageDown")
    assert page.locator("#divider").get_attribute("aria-valuenow") == "50"
    assert _colour(page, 0.75) == BLUE
    np.testing.assert_allclose(_views(page)[:, :2], 0.5, atol=1e-3)  # dragging it moved no picture


@pytest.mark.browser
def test_wheel_and_drag_move_all_pictures_together(opened):
    page = opened()
    _loaded(page)
    fitted = _views(page)
    np.testing.assert_allclose(fitted, np.broadcast_to(fitted[0], fitted.shape), atol=2e-3)
    page.locator("#stage").scroll_into_view_if_needed()
    stage = page.locator("#stage").bounding_box()
    x, y = 0.25, 0.75
    page.mouse.move(stage["x"] + x * stage["width"], stage["y"] + y * stage["height"])
    under = fitted[0, :2] + (np.array([x, y]) - 0.5) / fitted[0, 2]
    for _ in range(4):
        page.mouse.wheel(0, -150)
    _until(lambda: _views(page)[0, 2] > 3)
    zoomed = _views(page)
    assert len(zoomed) == 2 + 6
    np.testing.assert_allclose(zoomed, np.broadcast_to(zoomed[0], zoomed.shape), atol=2e-3)
    np.testing.assert_allclose(zoomed[0, :2] + (np.array([x, y]) - 0.5) / zoomed[0, 2], under, atol=2e-3)
    tile = page.locator(".tile").nth(1)
    tile.scroll_into_view_if_needed()
    box = tile.bounding_box()
    page.mouse.move(*_middle(tile))
    page.mouse.down()
    page.mouse.move(_middle(tile)[0] + 20, _middle(tile)[1] - 10, steps=3)
    page.mouse.up()
    moved = _views(page)
    step = np.array([-20, 10]) / box["width"] / zoomed[0, 2]
    np.testing.assert_allclose(moved[:, :2], np.broadcast_to(zoomed[0, :2] + step, (8, 2)), atol=3e-3)
    page.get_by_role("button", name="Fit").click()
    np.testing.assert_allclose(_views(page), fitted, atol=2e-3)


@pytest.mark.browser
def test_the_stage_is_moved_by_keys(opened):
    page = opened()
    _loaded(page)
    stage = page.locator("#stage")
    before = _views(page)
    stage.press("+")
    stage.press("ArrowRight")
    after = _views(page)
    np.testing.assert_allclose(after[:, 2], 1.5 * before[:, 2], rtol=1e-2)
    np.testing.assert_allclose(after[:, 0], before[:, 0] + 0.1 / after[0, 2], atol=3e-3)
    stage.press("0")
    np.testing.assert_allclose(_views(page), before, atol=2e-3)


@pytest.mark.browser
def test_enlarged_pixels_stay_hard(opened):
    page = opened()
    for side in ("left", "right"):
        page.select_option(f"#{side}", label="HQ")
    _loaded(page)
    page.locator("#divider").press("Home")
    for _ in range(5):
        page.get_by_role("button", name="Zoom in").click()
    with Image.open(io.BytesIO(page.locator("#stage").screenshot())) as image:
        pixels = np.asarray(image.convert("L"))
    inner = pixels[pixels.shape[0] * 3 // 4 : -20, 60:-60]
    assert (np.isin(inner, (0, 255))).mean() > 0.98  # a black and white board: no greys but on its edges


@pytest.mark.browser
def test_a_button_shows_the_place_of_largest_difference(opened):
    page = opened()
    _loaded(page)
    page.get_by_role("button", name="Place 1 of largest difference").click()
    views = _views(page)
    np.testing.assert_allclose(views[:, :2], np.broadcast_to([24 / SIZE, 8 / SIZE], (len(views), 2)), atol=2e-3)
    np.testing.assert_allclose(views[:, 2], SIZE / 8, rtol=1e-2)


@pytest.mark.browser
def test_a_method_that_failed_keeps_its_tile_and_says_so(opened):
    page = opened()
    page.get_by_role("button", name="Next image").click()
    _loaded(page)
    assert page.locator("#image").input_value() == "two #1 100%?"
    empty = page.locator("#tiles figure").filter(has_text="broken")
    assert empty.locator(".tile").get_attribute("data-empty") == "no picture"
    assert empty.locator("button:enabled").count() == 0
    assert page.locator("#left option:disabled").all_inner_texts() == ["broken"]


@pytest.mark.browser
def test_the_data_set_switch_changes_tables_pictures_and_plots(opened):
    page = opened()
    page.locator("#datasets input[value=wild]").check()
    assert _names(page, "means-table") == ["net"]
    assert page.locator("#means-table thead th").count() == 3
    assert not page.locator("#gains").is_visible()
    assert page.locator("#nav").inner_text().count("Gains") == 0
    assert page.locator("#images .dataset").inner_text() == "wild"
    assert page.locator("#left option:disabled").all_inner_texts() == ["HQ"]
    assert page.locator("#strip circle").count() == 1
    page.locator("#datasets input[value=wild]").press("ArrowLeft")
    assert _names(page, "means-table") == ["bicubic", "net", NASTY, "broken"]


@pytest.mark.browser
def test_the_scatter_puts_methods_where_their_means_are(opened, tmp_path):
    data = _example(tmp_path)
    page = opened(data)
    points = page.locator("#scatter .point")
    labels = [label.split(", PSNR")[0] for label in points.evaluate_all("p => p.map(e => e.ariaLabel)")]
    assert labels == ["bicubic", "net", NASTY]  # broken has no PSNR
    assert "1 method without both numbers left out" in page.locator("#scatter-caption").inner_text()
    x, y = np.array(
        points.locator("circle").evaluate_all("c => c.map(e => [+e.getAttribute('cx'), +e.getAttribute('cy')])")
    ).T
    assert x[0] < x[1] == x[2]
    assert y[0] > y[1] > y[2]
    assert points.nth(1).locator("line").count() == 1  # only its PSNR has an interval
    page.select_option("#metric-x", "lpips")
    x = points.locator("circle").evaluate_all("c => c.map(e => +e.getAttribute('cx'))")
    assert len(x) == 4
    means = [data["means"]["photos"][name]["lpips"]["mean"] for name in ("bicubic", "net", NASTY, "broken")]
    np.testing.assert_allclose(np.corrcoef(x, means), 1, rtol=1e-6)


@pytest.mark.browser
def test_a_dot_names_its_image_and_opens_it(opened):
    page = opened()
    dot = page.locator("#strip .dots").nth(1).locator("circle").nth(2)
    dot.hover()
    assert page.locator("#named").inner_text() == f"{NASTY}: 25.00 with net"
    assert page.locator("#strip .hit").count() == 3
    dot.click()
    assert page.locator("#image").input_value() == NASTY
    assert page.locator("#chip-right").inner_text() == "net"


@pytest.mark.browser
def test_dots_are_reached_by_keys(opened):
    page = opened()
    row = page.locator("#strip .dots").nth(2)
    row.focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowRight"):
        row.press(key)
    assert page.locator("#named").inner_text() == f"one: 30.00 with {NASTY}"
    page.get_by_role("button", name="Next image").click()
    row.press("Enter")
    assert page.locator("#image").input_value() == "one"


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_both_schemes(opened, scheme):
    page = opened(color_scheme=scheme)
    shown = page.evaluate(
        """["body", ".lead", "thead button", "tbody th", "td small", ".tag", "#nav a", "select"].map(s => {
          const e = document.querySelector(s);
          let back = e;
          while (getComputedStyle(back).backgroundColor === "rgba(0, 0, 0, 0)") back = back.parentElement;
          return [getComputedStyle(e).color, getComputedStyle(back).backgroundColor];
        })"""
    )
    ratios = [_contrast(*(list(map(int, re.findall(r"\d+", colour)[:3])) for colour in pair)) for pair in shown]
    assert min(ratios) >= 4.5, ratios
    dark = sum(map(int, re.findall(r"\d+", shown[0][1])[:3])) < 384
    assert dark == (scheme == "dark")


@pytest.mark.browser
def test_in_print_tables_are_whole_and_controls_gone(opened):
    page = opened(color_scheme="dark")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.querySelector('.scroll')).maxHeight") == "none"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.locator(".bar").is_visible()
    assert not page.locator("#zoom-in").is_visible()
    assert page.pdf()[:5] == b"%PDF-"


@pytest.mark.browser
def test_a_narrow_window_scrolls_tables_not_the_page(opened):
    page = opened()
    page.set_viewport_size({"width": 360, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") == 360


@pytest.mark.browser
@pytest.mark.slow
def test_five_methods_and_a_hundred_images_open_within_two_seconds(opened, tmp_path):
    data = _example(tmp_path)
    names = [f"image-{i:03d}" for i in range(100)]
    rng = np.random.default_rng(0)
    methods = ["bicubic", *"abcd"]
    data["methods"] = [{"name": name, "kind": "run", "failures": []} for name in methods]
    data["datasets"] = [{"name": "photos", "paired": True, "images": names}]
    values = {m: {"psnr": dict(zip(names, rng.normal(25, 3, 100).tolist(), strict=True))} for m in methods}
    data["values"] = {"photos": values}
    data["means"] = {"photos": {m: {"psnr": _part(25.0, 24.0, 26.0, 100)} for m in methods}}
    noise = [rng.integers(0, 256, (128, 128, 3)) for _ in range(8)]
    data["images"] = {
        "photos": {
            name: {
                "lq": None,
                "hq": None,
                "methods": {
                    m: _save(tmp_path, f"images/{m}-{i}.png", noise[(i + k) % 8]) for k, m in enumerate(methods)
                },
                "crops": [],
            }
            for i, name in enumerate(names)
        }
    }
    seconds = []
    for _ in range(3):
        start = time.monotonic()
        page = opened(data)
        _loaded(page)
        seconds.append(time.monotonic() - start)
        assert page.locator("#strip circle").count() == 500
    assert min(seconds) < 2, seconds


def _contrast(first, second):
    """Contrast ratio of the W3C's guidelines, 1 to 21."""

    def luminance(colour):
        parts = np.array(colour) / 255
        return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]

    high, low = sorted(map(luminance, (first, second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(
    ("metric", "name"),
    [
        ("psnr_y", "PSNR"),
        ("psnr_rgb", "PSNR (RGB)"),
        ("torchmetrics:vif", "VIF"),
        ("torchmetrics:ms_ssim", "MS-SSIM"),
        ("pyiqa:clipiqa+", "CLIP-IQA+"),
        ("pyiqa:maniqa-pipal", "MANIQA-PIPAL"),
        ("sharpness", "sharpness"),
    ],
)
def test_a_metric_has_the_name_that_papers_print(metric, name):
    assert metric_name(metric) == name


@pytest.mark.browser
@pytest.mark.parametrize("embed", [False, True])
def test_the_first_view_shows_a_picture_of_every_method_and_the_table(opened, embed):
    page = opened(embed=embed)
    pictures = page.locator("#glance img")
    _until(lambda: pictures.evaluate_all("all => all.every(i => i.naturalWidth > 0)"))
    titles = page.locator("#glance figcaption").all_inner_texts()
    assert titles[0] == "LQ"
    assert titles[-1] == "HQ"
    assert {"bicubic", "net"} < set(titles)
    bottom = page.locator("#means-table tbody tr").first.bounding_box()
    assert bottom["y"] + bottom["height"] < 900
    page.locator("#glance button").nth(titles.index("net")).click()
    assert page.locator("#right").input_value() == "method net"
    assert page.locator("#stage").bounding_box()["y"] < 900
