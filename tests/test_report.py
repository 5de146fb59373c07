"""The results page: what is on it, in words and in a real browser."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from advkip import records, report, tables
from advkip.evaluate import Outcome
from tests.sections import of_the_paper

ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def outcome(attack, accuracy):
    robust = np.arange(100) < round(100 * accuracy)
    return Outcome(attack, "linf", 0.1, accuracy, accuracy, robust, robust, np.zeros((0, 8, 8, 1)))


def write(folder, name, *, seed=0, n=500, robust=0.2):
    e = of_the_paper("cifar10", name=name, support__n_support=n, seed=seed)
    recorder = records.Recorder(e, folder / name, "04_shortcomings")
    outcomes = [outcome("clean", 0.45), outcome("pgd6", 0.3), outcome("autoattack", robust)]
    recorder.add(outcomes, model="kernel:fc3", trained_on="adv-kip", training="kernel", seed=seed)
    recorder.add(
        outcomes, model="simple-cnn", trained_on="original", training="adversarial", seed=seed
    )
    recorder.write()
    (folder / name / "04_shortcomings.ipynb").write_text("{}")


@pytest.fixture
def folder(tmp_path):
    for seed, robust in ((0, 0.2), (1, 0.3)):
        write(tmp_path, f"small-{seed}", seed=seed, robust=robust)
    write(tmp_path, "large", n=2000, robust=0.35)
    return tmp_path


def rows(text, table):
    body = text[text.index(f'id="{table}"') :]
    body = body[: body.index("</table>")]
    found = re.findall(r"<tr.*?>(.*?)</tr>", body, re.S)
    return [re.sub(r"<[^>]+>|\s+", " ", row).split() for row in found]


def test_ours_stand_below_the_papers(folder):
    text = report.build(folder, params=ROOT / "params")
    found = [" ".join(row) for row in rows(text, "t2")]
    assert "paper, Table 2 kernel:fc3 adv-kip 40,000 59.95 21.67 21.56" in found
    assert "ours kernel:fc3 adv-kip 500 100 2 45.00 ± 0.00 30.00 ± 0.00 25.00 ± 7.07" in found
    assert "ours kernel:fc3 adv-kip 2,000 100 1 45.00 30.00 35.00" in found
    missing = next(row for row in found if "not run yet" in row)
    assert missing.startswith("ours kernel:fc2 not run yet: python -m advkip.run params/paper/")
    assert [len(rows(text, f"t{number}")) > 1 for number in report.TITLES] == [True] * 10


def test_every_missing_row_names_a_file_that_is_there(folder):
    text = report.build(folder, params=ROOT / "params")
    named = set(re.findall(r"not run yet: <code>python -m advkip.run ([^<]+)</code>", text))
    assert len(named) > 5
    assert all((ROOT / path).exists() for path in named)
    assert "not run yet</td>" not in text
    paper = "params/paper/table"
    for file in (
        "9-cifar10-fc3-1k",
        "9-cifar10-fc3-5k",
        "9-cifar10-fc3-10k",
        "2-4-cifar10-fc2-40k",
    ):
        assert f"{paper}{file}.yaml" in named
    assert f"{paper}8-cifar10-robust-features.yaml" in named  # whose kernels have no row


def test_charts(folder):
    lines = tables.lines([records.read(path) for path in sorted(folder.glob("*/results.json"))])
    chart = report.clean_against_robust(lines, "cifar10")
    found = {(p.kind, p.data, round(p.y)) for p in chart["points"]}
    assert found == {
        ("kernel", "adv-kip", 25), ("kernel", "adv-kip", 35), ("adversarial", "original", 25),
        ("adversarial", "original", 35),
    }  # fmt: skip
    assert chart["yardsticks"] == [
        ("a constant answer", 10.0), ("the paper's adversarially trained simple-cnn", 26.18),
    ]  # fmt: skip
    assert report.clean_against_robust(lines, "mnist") is None
    made = ("relabelled fc1 + attacked", "adv-kip-100 fc3", "noisy", "robust-features fc3")
    others = [lines[0]._replace(trained_on=name) for name in made]
    shapes = [point.data for point in report.clean_against_robust(others, "cifar10")["points"]]
    assert shapes == ["relabelled", "adv-kip", "other", "robust-features"]
    (scaling,) = report.scaling(lines)
    assert [(v["n"], v["mean"], v["low"], v["seeds"]) for v in scaling["values"]] == [
        (500, 25.0, 20.0, 2), (2000, 35.0, 35.0, 1),
    ]  # fmt: skip
    assert scaling["values"][0]["text"] == "25.0 ± 7.1"
    of_another = [line._replace(model="kernel:fc7", images=9) for line in lines]
    (same,) = report.scaling([*lines, *of_another])  # one kernel a chart, that of the most sizes
    assert same == scaling
    assert same["title"].endswith(", fc3")


def test_no_runs(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2
    assert "expected a results.json below" in capsys.readouterr().err
    assert not (tmp_path / "index.html").exists()


def test_a_page_elsewhere_links_to_the_runs(folder, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    page = folder / "large" / "index.html"
    assert report.main([str(folder), "--runs", "large", "--output", str(page)]) == 0
    assert f"the results page: {page}" in capsys.readouterr().out
    assert 'href="../large/results.json"' in page.read_text()
    assert "small-0" not in page.read_text()


def test_evidence_names_what_each_verdict_is_of():
    found = {
        "kept": [1.0], "verdict": "genuine", "model": "kernel:fc3", "trained_on": "adv-kip",
        "training": "kernel", "n_test": 20, "claimed": 0.5, "strong": 0.4,
        "broken": {"square": 0.1},
    }  # fmt: skip
    other = found | {"variant": "hinge outside", "broken": {}}
    made = report.evidence("one", {"diagnoses": [found, other]})
    titles = ["kernel:fc3: adv-kip", "kernel:fc3: adv-kip, hinge outside"]
    assert [row["title"] for row in made["rows"]] == titles
    assert [row["broken"] for row in made["rows"]] == [[0.1], [None]]


def test_variants_of_a_run_are_links_below_its_figure(folder):
    for name in ("large-wide", "large", "largest"):
        if name != "large":
            shutil.copytree(folder / "large", folder / name)
        Image.new("RGB", (8, 8)).save(folder / name / "figure5_images_adv-kip.png")
    text = report.build(folder, params=ROOT / "params")
    body = text[text.index("Figure 5") : text.index("Figure 6")]
    captions = [
        re.sub(r"<[^>]+>", "", one) for one in re.findall(r"<figcaption>(.*?)</figcaption>", body)
    ]
    assert captions == ["large; its variants: large-wide", "largest"]
    assert body.count("data:image/") == 2
    assert 'href="large-wide/figure5_images_adv-kip.png"' in body


def without_images(text):
    return re.sub(r"data:image/(png|webp);base64,[^\"]+", "", text)


def test_the_committed_page_is_of_the_committed_records():
    """But for the bytes of its images, which depend on how they are packed."""
    listed = ["git", "-C", ROOT, "ls-files", "reports/*/results.json"]
    out = subprocess.run(listed, capture_output=True, text=True, check=True).stdout
    names = sorted(Path(path).parent.name for path in out.split())
    page = (ROOT / "reports" / "index.html").read_text()
    built = report.build(ROOT / "reports", names, params=ROOT / "params")
    assert without_images(page) == without_images(built)
    assert page.count("data:image/") == built.count("data:image/") >= 6
    for link in re.findall(r'href="([^"#]+)"', page):
        assert link.startswith("data:") or (ROOT / "reports" / link).exists(), link
    assert not re.search(r"https?://(?!www\.w3\.org)", page)  # nothing is fetched


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
def test_in_a_browser(folder):
    """No errors; tables sort and filter, also by keyboard; nothing is wider than a phone."""
    from playwright.sync_api import sync_playwright

    (folder / "index.html").write_text(report.build(folder, params=ROOT / "params"))
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for width, scheme in ((1280, "light"), (390, "dark")):
            page = browser.new_page(
                viewport={"width": width, "height": 800}, color_scheme=scheme
            )  # fmt: skip
            errors, fetched = [], []
            page.on("console", lambda m, e=errors: e.append(m.text) if m.type == "error" else None)
            page.on("pageerror", lambda error, e=errors: e.append(str(error)))
            page.on("request", lambda request, f=fetched: f.append(request.url))
            page.goto((folder / "index.html").as_uri())
            assert errors == []
            assert [url for url in fetched if not url.startswith(("file:", "data:"))] == []
            assert page.evaluate("document.documentElement.scrollWidth") <= width

            def column(number, page=page):
                cells = page.locator(f"#t2 tbody tr:visible td:nth-child({number})")
                return [text.strip() for text in cells.all_inner_texts()]

            head = page.locator("#t2 thead th").nth(3)  # images
            head.locator("button").focus()
            page.keyboard.press("Enter")
            assert head.get_attribute("aria-sort") == "ascending"
            sizes = [int(text.replace(",", "")) for text in column(4) if text and text[0].isdigit()]
            assert sizes == sorted(sizes)
            page.keyboard.press("Enter")
            assert head.get_attribute("aria-sort") == "descending"
            sizes = [int(text.replace(",", "")) for text in column(4) if text and text[0].isdigit()]
            assert sizes == sorted(sizes, reverse=True)
            assert sizes[0] > sizes[-1]
            page.get_by_label("Filter table 2").fill("ours kernel:fc3")
            assert set(column(1)) == {"ours"}
            assert len(column(1)) == 2
        browser.close()
