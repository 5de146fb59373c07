"""The documentation as a static site, build/site: `python -m advkip.docs`.

README, glossary, results, the executed notebooks and an API reference of every module. Building
needs no network (mkdocs, mkdocstrings; extra [docs]).
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from advkip import files, report

PAGES = {
    "index.md": "README.md", "glossary.md": "notebooks/glossary.md",
    "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md",
    "reports/README.md": "reports/README.md",
}  # fmt: skip
"""Pages of the site, and the project's files that they are made from."""

LAYERS = {
    "ground": "attack_names checked settings method_settings config grid files store progress "
    "inputs devices",
    "engine": "kernel tiled stencil convolutional pieces kernels gram krylov solver residuals krr "
    "losses threat ascent attacks worst_case compat",
    "PyTorch": "torch_attacks probes hard_label bridge lazy architectures nets recipe training "
    "search",
    "sets": "data optimizers objective growth algorithm unrolled trajectories distill features "
    "relabel aggregate sets",
    "judgement": "models answers evaluate published verdict questions diagnose",
    "paper": "figures pictures preflight records tables ablation texts report panel signals "
    "execute sweep run docs",
}
"""Modules of the package, in the order of what they build on."""


def assemble(root: Path, build: Path) -> Path:
    """Writes the sources of the site below `build`, and returns the path of its mkdocs.yml."""
    source = build / "docs"
    shutil.rmtree(source, ignore_errors=True)
    for page, file in PAGES.items():
        (source / page).parent.mkdir(parents=True, exist_ok=True)
        (source / page).write_text((root / file).read_text())
    executed = {}
    for path in sorted(root.glob("reports/*/*.ipynb")):
        if re.fullmatch(r"\d\d_\w+", path.stem):
            executed.setdefault(path.parent.name, []).append(path)
    tracked = ("*.png", "results.json", "index.html")
    for folder in [root / "reports", *(root / "reports" / name for name in executed)]:
        for pattern in tracked:
            for path in folder.glob(pattern):
                copy = source / path.relative_to(root)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, copy)
    lines = ["# Executed notebooks", ""]
    for name, notebooks in executed.items():
        lines += [f"## {name}", ""]
        for path in notebooks:
            page = source / path.relative_to(root).with_suffix(".html")
            page.write_text(report.as_html(path))
            shutil.copy(path, page.with_suffix(".ipynb"))
            lines.append(f"- [{path.stem}]({page.relative_to(source).as_posix()})")
        lines.append("")
    (source / "notebooks.md").write_text("\n".join(lines))
    api = []
    for layer, names in LAYERS.items():
        page = f"api/{layer.lower()}.md"
        (source / page).parent.mkdir(exist_ok=True)
        parts = [f"# {layer}", *(f"## {name}\n\n::: advkip.{name}" for name in names.split())]
        (source / page).write_text("\n\n".join(parts) + "\n")
        api.append({layer: page})
    config = build / "mkdocs.yml"
    config.write_text(yaml.safe_dump(_config(api), sort_keys=False))
    return config


def _config(api):
    options = {"show_root_heading": False, "show_source": False, "heading_level": 3,
               "docstring_style": "google", "members_order": "source"}  # fmt: skip
    return {
        "site_name": "adv-KIP", "docs_dir": "docs", "site_dir": "site",
        "theme": {"name": "readthedocs", "highlightjs": False},
        "use_directory_urls": False,
        "plugins": [
            "search",
            {"mkdocstrings": {"handlers": {"python": {"paths": [".."], "options": options}}}},
        ],
        # Texts of the project link to its files, of which the site has some.
        "validation": {"links": {"not_found": "ignore", "unrecognized_links": "ignore"}},
        "nav": [
            {"Start": "index.md"}, {"Glossary": "glossary.md"}, {"Results": "reports/README.md"},
            {"Executed notebooks": "notebooks.md"}, {"API": api},
            {"Contributing": "contributing.md"}, {"Changes": "changelog.md"},
        ],
    }  # fmt: skip


def main() -> int:
    """Builds the site; returns the exit code."""
    build = files.ROOT / "build"
    config = assemble(files.ROOT, build)
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "-f", str(config)]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    found = subprocess.run(command, env=quiet)
    if not found.returncode:
        print(f"documentation: {(build / 'site' / 'index.html').relative_to(Path.cwd())}")
    return found.returncode


if __name__ == "__main__":
    sys.exit(main())
