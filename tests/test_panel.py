"""Panels: what they compute, how they redraw, and that they work in a real JupyterLab."""

import base64
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import numpy as np
import pytest

from advkip import attacks, data, distill, kernels, krr, nets, panel
from tests.sections import experiment

ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def case():
    e = experiment(
        support__n_support=30, support__n_target=40, dataset__n_validation=40,
        threat__epsilon=0.15, threat__step_size=0.04, adv_kip__pgd_steps=3,
        adv_kip__eval_pgd_steps=3,
    )  # fmt: skip
    splits = data.split(data.load("digits"), e)
    support = distill.initial_support(e, splits)
    return e, splits, krr.fit(kernels.of(e.kernel), *support).machine


def test_an_attack_on_one_image_is_that_of_the_tables(case):
    _, splits, machine = case
    x, y = splits.x_test[3], int(splits.y_test[3])
    found = panel.attack(machine, x, y, threat=attacks.Threat("linf", 0.1), name="pgd10")
    expected = attacks.pgd(
        machine, x[None], np.eye(10, dtype="float32")[[y]], threat=attacks.Threat("linf", 0.1),
        n_steps=10, step_size=0.025,
    )  # fmt: skip
    np.testing.assert_allclose(found.x_attacked, expected[0], atol=1e-5)
    np.testing.assert_allclose(found.after, machine(expected)[0], atol=1e-3)
    np.testing.assert_allclose(found.before, machine(x[None])[0], atol=1e-3)
    assert len(found.losses) == 11
    assert found.losses[-1] > found.losses[0]
    terms = np.asarray(machine.kernel.value(expected, machine.x_support)[0] * machine.alpha.T)
    terms = terms[found.after.argmax()]
    assert found.after.max() == pytest.approx(terms.sum(), abs=1e-3)
    np.testing.assert_allclose([t for _, t in found.neighbours], np.sort(terms)[:-5:-1], atol=1e-3)


def test_networks_fgsm_and_no_attack(case):
    _, splits, _ = case
    net = nets.build("fc1-16", shape=(8, 8, 1), n_classes=10, seed=0).eval()
    x, y = splits.x_test[0], int(splits.y_test[0])
    found = panel.attack(net, x, y, threat=attacks.Threat("linf", 0.1), name="fgsm")
    assert np.abs(found.x_attacked - x).max() == pytest.approx(0.1, abs=1e-6)
    assert found.neighbours == []
    still = panel.attack(net, x, y, threat=attacks.Threat("linf", 0.0))
    np.testing.assert_array_equal(still.x_attacked, x)
    with pytest.raises(ValueError, match="expected 'fgsm' or 'pgd10', got 'autoattack'"):
        panel.attack(net, x, y, threat=attacks.Threat("linf", 0.1), name="autoattack")


def test_a_moved_slider_redraws(case):
    _, splits, machine = case
    few = splits.y_test[:5]  # without the last class
    assert few.max() < splits.n_classes - 1
    shown = panel.AttackPanel({"a": machine}, splits.x_test[:5], few, radius=0.1)
    first = shown.picture.value
    shown.radius.value = 0.3
    second = shown.picture.value
    shown.index.value = 2
    assert len({first, second, shown.picture.value}) == 3
    bundle = shown._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert base64.b64decode(bundle["image/png"]) == shown.picture.value


def test_a_live_distillation_goes_on_with_another_radius(case):
    e, splits, _ = case
    live = panel.LivePanel(e, splits, first=2, every=1)
    expected = distill.distill(
        e.replace(adv_kip={"n_steps": 2, "eval_every": 1}), splits, progress=False
    )
    assert [line["pgd"] for line in live.state.history] == [
        line["pgd"] for line in expected.history[:2]
    ]
    before = np.asarray(live.state.support[0])
    live.radius.value = 0.3
    assert live.run.objective.threat.epsilon == 0.3
    live.advance(1)
    assert live.state.step == 3
    assert np.abs(np.asarray(live.state.support[0]) - before).max() > 0
    live.button.value = True
    for _ in range(1200):  # a thread of its own compiles anew
        time.sleep(0.1)
        if live.state.step > 3:
            break
    live.button.value = False
    live.going.clear()
    assert live.state.step > 3
    assert "step" in live.text.value


CELLS = [
    """from advkip import data, distill, kernels, krr, panel
from advkip.config import Experiment
e = Experiment()
splits = data.split(data.load("digits"), e)
machine = krr.fit(kernels.of(e.kernel), *distill.initial_support(e, splits)).machine
panel.AttackPanel({"original": machine}, splits.x_test[:20], splits.y_test, radius=0.1)""",
]


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
def test_in_jupyterlab(tmp_path):
    """Open, run all, move the slider, see the picture change."""
    from playwright.sync_api import sync_playwright

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in CELLS])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(notebook, tmp_path / "panel.ipynb")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "JUPYTER_PLATFORM_DIRS": "1",
    }  # fmt: skip
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", "--no-browser", f"--port={port}", "--allow-root",
         "--IdentityProvider.token=", "--ServerApp.password=", "--ServerApp.open_browser=False",
         f"--ServerApp.root_dir={tmp_path}"],
        env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        address = f"http://localhost:{port}"
        for _ in range(120):
            try:
                urllib.request.urlopen(f"{address}/api", timeout=1)
                break
            except OSError:
                time.sleep(0.5)
        with sync_playwright() as play:
            browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1300, "height": 1000})
            page.set_default_timeout(90_000)
            page.goto(f"{address}/lab/tree/panel.ipynb?reset")
            page.locator(".jp-CodeCell").first.wait_for()
            page.locator(".jp-CodeCell .cm-content").first.click()
            page.keyboard.press("Shift+Enter")
            picture = page.locator(".widget-image, img.widget-image").first
            picture.wait_for()
            before = picture.get_attribute("src")
            slider = page.locator(".widget-slider .noUi-handle").nth(1)  # the radius
            slider.focus()
            for _ in range(20):
                page.keyboard.press("ArrowRight")
            page.wait_for_function(
                "old => document.querySelector('.widget-image').src !== old", arg=before
            )
            assert picture.get_attribute("src") != before
            browser.close()
    finally:
        server.terminate()
        server.wait(timeout=30)
