"""The page in a real browser: plan, drag, draw, read what is wrong.   pytest -m browser -s

Needs gradio and gradio_image_annotation (docs/toy.md has the line), playwright, and a Chromium:
Debian's `chromium` package, or the path of another one in CHROMIUM. Draws with the newest toy run
in out/ (`torchrun train_grpo.py`)."""

import contextlib
import io
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from demo import __main__ as demo
from gotr1 import decode_images, load_policy, rollout
from render_boxes import Box, iou, parse_chain
from toy import world as toy

pytestmark = pytest.mark.browser
RUN = demo.newest_toy_run(Path("out"))
ROOT = Path(__file__).parent.parent
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
PORT = 7961
PROMPT = "a red ball left of a blue cube"


# -------------------------------------------------------------------------------------------------
# How well a moved box is followed, without the page


def trained_studio() -> demo.Studio:
    if RUN is None:
        pytest.skip("no toy run in out/: torchrun train_grpo.py makes one")
    policies = {"before": load_policy("toy"), "after": load_policy(str(RUN))}
    return demo.Studio(policies, toy.ToyJudge())


def is_found(picture, box: Box) -> bool:
    """Whether the judge finds that object with at least half an IoU in that box."""
    found = toy.ToyJudge().ground([picture], [box.name])[0]
    return any(iou(box, other) >= 0.5 for other in found)


def free_places(cells: list[tuple[int, int, int]], j: int) -> list[tuple[int, int]]:
    """Where object j fits, two cells away from its old place and apart from the others."""
    old_x, old_y, size = cells[j]
    places = []
    for x in range(toy.GRID - size + 1):
        for y in range(toy.GRID - size + 1):
            free = max(abs(x - old_x), abs(y - old_y)) >= 2
            for other_x, other_y, other in cells[:j] + cells[j + 1 :]:
                beside = x > other_x + other or other_x > x + size
                free &= beside or y > other_y + other or other_y > y + size
            if free:
                places.append((x, y))
    return places


def edit(rng, chain: str) -> tuple[str, Box] | None:
    """A random object of the plan in a random free place: the new chain and its box there."""
    boxes = parse_chain(chain)
    cells = []
    for box in boxes:
        size = max(1, round((box.x2 - box.x1) / demo.CELL))
        cells.append((round(box.x1 / demo.CELL), round(box.y1 / demo.CELL), size))
    j = int(rng.integers(len(boxes)))
    places = free_places(cells, j)
    if not places:
        return None
    x, y = places[int(rng.integers(len(places)))]
    size = cells[j][2]
    edges = [edge * demo.CELL for edge in (x, y, x + size, y + size)]
    boxes[j] = demo.snapped(Box(boxes[j].name, *edges))
    return demo.with_boxes(chain, boxes), boxes[j]


@pytest.mark.parametrize("name, lowest", [("before", 0.0), ("after", 0.5)])
def test_share_of_50_edits_that_are_drawn_in_their_new_place(name, lowest):
    """Each edit moves an object of a plan of the model's own; all are drawn as one batch."""
    model, tokenizer = trained_studio().policies[name]
    rng = np.random.default_rng(0)
    prompts = toy.toy_prompts(60, seed=11)
    edits = []  # (prompt, edited chain, box in its new place)
    planned = rollout(model, tokenizer, prompts, max_chain=96, draw=False).chains
    for prompt, chain in zip(prompts, planned, strict=True):
        edited = edit(rng, chain) if parse_chain(chain) else None
        if edited and len(edits) < 50:
            edits.append((prompt, *edited))
    assert len(edits) == 50
    asked, chains, boxes = zip(*edits, strict=True)
    drawn = rollout(model, tokenizer, asked, group=4, chains=chains)
    pictures = decode_images(model, drawn.image_tokens)

    shares = {}  # number of objects -> per edit, the share of its 4 pictures
    for k, box in enumerate(boxes):
        hits = [is_found(picture, box) for picture in pictures[4 * k : 4 * k + 4]]
        shares.setdefault(len(parse_chain(chains[k])), []).append(np.mean(hits))
    every = np.concatenate(list(shares.values()))
    print(f"\n{name}: found in the new place in {every.mean():.2f} of the pictures;", end=" ")
    print(f"in 3 of 4 pictures after {np.mean(every >= 0.75):.2f} of the edits")
    for objects, values in sorted(shares.items()):
        print(f"  {objects} objects: {np.mean(values):.2f} ({len(values)} edits)")
    assert every.mean() >= lowest


# -------------------------------------------------------------------------------------------------
# The page


@pytest.fixture(scope="module")
def address():
    """Of a page that runs as a visitor's would."""
    pytest.importorskip("gradio_image_annotation")
    url = f"http://127.0.0.1:{PORT}"
    page = subprocess.Popen([sys.executable, "-m", "demo", "--port", str(PORT)], cwd=ROOT)
    for _ in range(120):
        time.sleep(1)
        with contextlib.suppress(OSError):
            urllib.request.urlopen(url).close()
            break
    yield url
    page.terminate()
    page.wait()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM:
        pytest.skip("no chromium: apt-get install chromium, or CHROMIUM=/path/to/it")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Visitor:
    """Somebody at the page, with a session of their own."""

    def __init__(self, browser, address: str):
        context = browser.new_context(viewport={"width": 1100, "height": 1400})
        self.page = context.new_page()
        self.dialogs = []
        self.page.on("dialog", lambda dialog: (self.dialogs.append(dialog), dialog.dismiss()))
        self.page.goto(address)
        self.page.wait_for_selector("#plan")
        time.sleep(1)  # until the page listens to what is typed

    def chain(self) -> str:
        return self.page.input_value("#chain textarea")

    def wait(self, what, seconds: float = 60):
        """The first true value of what()."""
        end = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < end, "nothing happened"
            time.sleep(0.05)
        return what()

    def plan(self, prompt: str) -> float:
        """Seconds until the plan stands in its text."""
        before = self.chain()
        self.page.fill("#prompt textarea", prompt)
        start = time.monotonic()
        self.page.click("#plan")
        self.wait(lambda: self.chain() not in ("", before))
        return time.monotonic() - start

    def write(self, chain: str) -> None:
        self.page.fill("#chain textarea", chain)
        self.page.press("#chain textarea", "Tab")

    def message(self) -> str:
        self.page.wait_for_selector("#message textarea")
        return self.page.input_value("#message textarea")

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """With the mouse, from and to places of the 0..1000 grid."""
        canvas = self.page.locator("#canvas canvas")
        canvas.scroll_into_view_if_needed()
        area = canvas.bounding_box()
        side = min(area["width"], area["height"])  # the picture is square, in the middle
        left = area["x"] + (area["width"] - side) / 2
        places = []
        for x, y in (start, ((start[0] + end[0]) / 2, start[1]), end):
            places.append((left + x * side / 1000, area["y"] + y * side / 1000))
        self.page.mouse.move(*places[0])
        time.sleep(0.3)
        self.page.mouse.down()
        self.page.mouse.move(*places[1], steps=5)
        self.page.mouse.move(*places[2], steps=5)
        time.sleep(0.3)
        self.page.mouse.up()

    def draw(self) -> float:
        """Seconds until the pictures are there."""
        start = time.monotonic()
        self.page.click("#draw")
        self.page.wait_for_selector("#pictures img", timeout=120_000)
        return time.monotonic() - start

    def pictures(self, count: int) -> list[Image.Image]:
        """The first `count` pictures that were drawn."""
        shown = self.page.locator("#pictures img")
        pictures = []
        for k in range(count):
            with urllib.request.urlopen(shown.nth(k).evaluate("image => image.src")) as file:
                pictures.append(Image.open(io.BytesIO(file.read())))
        return pictures


def centre(box: Box) -> tuple[float, float]:
    return (box.x1 + box.x2) / 2, (box.y1 + box.y2) / 2


def test_a_dragged_box_changes_the_text_and_the_pictures(browser, address):
    """Also makes out/demo.png, the picture of the README."""
    visitor = Visitor(browser, address)
    planned_in = visitor.plan(PROMPT)
    old = visitor.chain()
    ball, cube = parse_chain(old)
    # four cells down or up, in the picture in any case
    step = 4 * demo.CELL if ball.y2 <= 500 else -4 * demo.CELL
    wanted = demo.snapped(ball._replace(y1=ball.y1 + step, y2=ball.y2 + step))
    x, y = centre(ball)
    visitor.drag((x, y), (x, y + step))
    visitor.wait(lambda: visitor.chain() != old)
    assert parse_chain(visitor.chain()) == [wanted, cube]

    drawn_in = visitor.draw()
    print(f"\nclick to plans {planned_in:.1f} s, click to 4 pictures {drawn_in:.1f} s")
    pictures = visitor.pictures(4)
    hits = [is_found(picture, wanted) for picture in pictures]
    print(f"found in its new place: {sum(hits)} of 4")
    assert RUN is None or sum(hits) >= 3
    time.sleep(1)
    (ROOT / "out").mkdir(exist_ok=True)
    visitor.page.mouse.move(0, 0)
    visitor.page.screenshot(path=ROOT / "out" / "demo.png", full_page=True)


def test_the_canvas_follows_the_text_and_boxes_come_and_go(browser, address):
    visitor = Visitor(browser, address)
    visitor.plan(PROMPT)
    ball = Box("red ball", 125, 125, 375, 375)
    cube = Box("blue cube", 625, 625, 875, 875)
    visitor.write(demo.format_chain(["A", ball, "left of a", cube]))
    time.sleep(2)
    visitor.drag(centre(cube), (centre(cube)[0], 350))  # the canvas has it where the text put it
    visitor.wait(lambda: parse_chain(visitor.chain())[1].y1 == 250)
    visitor.page.click("[aria-label='Create box']")
    visitor.drag((130, 620), (370, 880))
    visitor.page.get_by_text("OK", exact=True).click()  # with the first name of the list
    visitor.wait(lambda: len(parse_chain(visitor.chain())) == 3)
    assert parse_chain(visitor.chain())[2] == Box("red ball", 125, 625, 375, 875)
    time.sleep(1)
    visitor.page.click("[aria-label='Drag boxes']")
    visitor.drag(centre(ball), centre(ball))
    visitor.page.click("[aria-label='Remove box']")
    visitor.wait(lambda: len(parse_chain(visitor.chain())) == 2)
    assert [box.name for box in parse_chain(visitor.chain())] == ["blue cube", "red ball"]


def test_bad_input_is_shown_as_text(browser, address):
    visitor = Visitor(browser, address)
    visitor.page.fill("#prompt textarea", "<script>alert(1)</script><img src=x onerror=alert(2)>")
    visitor.page.click("#plan")
    assert "does not know <script>alert(1)</script><img" in visitor.message()
    visitor.plan(PROMPT)
    visitor.write(visitor.chain().replace("),(", "),(1", 1))
    visitor.wait(lambda: "leaves the picture" in visitor.message())
    visitor.page.click("#draw")
    time.sleep(2)
    assert visitor.page.locator("#pictures img").count() == 0 and not visitor.dialogs


def test_two_visitors_do_not_mix(browser, address):
    visitors = [Visitor(browser, address), Visitor(browser, address)]
    prompts = [PROMPT, "a green cone above a purple ball"]
    for visitor, prompt in zip(visitors, prompts, strict=True):
        visitor.page.fill("#prompt textarea", prompt)
    for visitor in visitors:
        visitor.page.click("#plan")
    names = []
    for visitor in visitors:
        visitor.wait(visitor.chain)
        names.append({box.name for box in parse_chain(visitor.chain())})
    assert names == [{"red ball", "blue cube"}, {"green cone", "purple ball"}]


@pytest.mark.parametrize("path", ["/etc/passwd", str(ROOT / "README.md"), "README.md"])
def test_no_file_can_be_read_and_none_uploaded(address, path):
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{address}/gradio_api/file={path}")
    assert refused.value.code == 403
    form = "--x\r\nContent-Disposition: form-data; name=files; filename=a\r\n\r\nhello\r\n--x--\r\n"
    header = {"Content-Type": "multipart/form-data; boundary=x"}
    request = urllib.request.Request(f"{address}/gradio_api/upload", form.encode(), header)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    assert refused.value.code == 413
