"""Every code has a file that triggers it, a near miss that does not, and a page that shows both.

A case is ``cases/CODE/triggers.yaml`` and ``cases/CODE/near-miss.yaml``. The pages under docs/analysis are made of the
codes' texts and of these files: run this file with UPDATE_GOLDEN=1 after a change, and read what it wrote.
"""

from __future__ import annotations

import ast
import json
import os
from contextlib import chdir
from difflib import unified_diff
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from meshbridge.analysis.analyze import analyze
from meshbridge.analysis.codes import CODES, Code
from meshbridge.cli.analyze import command
from meshbridge.cli.files import read_manifest

REPO = Path(__file__).parent.parent.parent.parent
CASES = Path(__file__).parent / "cases"
PAGES = REPO / "docs/analysis"


def findings(path: Path) -> list[dict[str, Any]]:
    with chdir(path.parent):
        done = CliRunner().invoke(command, ["-f", path.name, "-o", "json"])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    found = json.loads(done.stdout)
    assert isinstance(found, list)
    return found


@pytest.mark.parametrize("code", CODES)
def test_it_is_found_in_the_file_that_triggers_it(code: str) -> None:
    assert code in {found["code"] for found in findings(CASES / code / "triggers.yaml")}


@pytest.mark.parametrize("code", CODES)
def test_it_is_not_found_in_the_near_miss(code: str) -> None:
    assert code not in {found["code"] for found in findings(CASES / code / "near-miss.yaml")}


@pytest.mark.parametrize("code", CODES.values(), ids=CODES)
def test_its_page_says_what_the_code_says_and_shows_both_files(code: Code) -> None:
    golden(PAGES / f"{code.code}.md", page(code))


def test_the_index_lists_every_code() -> None:
    golden(PAGES / "README.md", index())


def test_there_is_no_case_and_no_page_without_a_code() -> None:
    assert {path.name for path in CASES.iterdir()} == set(CODES)
    assert {path.stem for path in PAGES.glob("MB*.md")} == set(CODES)


def test_every_notice_has_a_code_of_the_table() -> None:
    missing = []
    for path in (REPO / "meshbridge").rglob("*.py"):
        tree = ast.parse(path.read_text())
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        if not any(i.module == "meshbridge.policy.model" and "Notice" in {n.name for n in i.names} for i in imports):
            continue  # others have notices of their own
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Notice":
                given = [k.value for k in node.keywords if k.arg == "code"] + node.args[4:5]
                literals = [value.value for value in given if isinstance(value, ast.Constant)]
                if not given or any(code not in CODES for code in literals):
                    missing.append(f"{path}:{node.lineno}")
    assert missing == []


@pytest.mark.parametrize("code", sorted(set(CODES) - {"MB0001", "MB0002"}))
def test_the_order_of_objects_does_not_matter(code: str) -> None:
    documents = read_manifest(CASES / code / "triggers.yaml").documents
    assert analyze(documents) == analyze(reversed(documents))


def page(code: Code) -> str:
    shown = [f for f in findings(CASES / code.code / "triggers.yaml") if f["code"] == code.code]
    said = "\n".join(f"{f['level']} [{f['code']}] ({where(f)}) {f['message']}\n    fix: {f['fix']}" for f in shown)
    return f"""# {code.code}: {code.name}

{code.summary}

Severity: {code.severity.value.capitalize()}

## Why it matters

{code.why}

## How to fix it

{code.fix}

## An example

```yaml
{example(code, "triggers")}
```

`meshbridge analyze -f triggers.yaml` says:

```
{said}
```

## A near miss

With this change it is not reported:

```diff
{difference(code)}
```
"""


def difference(code: Code) -> str:
    texts = [example(code, name).splitlines() for name in ("triggers", "near-miss")]
    return "\n".join(list(unified_diff(*texts, n=2, lineterm=""))[2:])


def where(found: dict[str, Any]) -> str:
    return " ".join(filter(None, (found["origin"], found["reference"])))


def example(code: Code, name: str) -> str:
    return (CASES / code.code / f"{name}.yaml").read_text().rstrip("\n")


def index() -> str:
    rows = "\n".join(
        f"| [{code}]({code}.md) | {known.severity.value.capitalize()} | {known.name} | {known.summary} |"
        for code, known in CODES.items()
    )
    return f"""# What `meshbridge analyze` finds

Every kind of finding has a code that never changes its meaning. A finding says which object and line, what is so, and
how to fix it; its page says why that matters and shows a file that has it and one that nearly has.

```
meshbridge analyze -f manifests/                               # files, with nothing running
meshbridge analyze                                             # the cluster
meshbridge analyze -f manifests/ --failure-threshold warning   # exit code 79 from warnings on, else from errors on
meshbridge analyze -f manifests/ -o sarif > findings.sarif     # for a code host's security tab
```

Leave a finding out with `--suppress "MB0401=shop/web"` (or, as `istioctl analyze` has it,
`"MB0401=NetworkPolicy web.shop"`; `*` stands for anything), or with the annotation
`meshbridge.io/analyze-suppress: "MB0401"` on the object.

What a finding claims about verdicts is read from the maps that are compiled for the kernel, for the pods and peers that
the files (or the cluster) hold.

| code | severity | name | what |
|---|---|---|---|
{rows}
"""


def golden(path: Path, text: str) -> None:
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert path.read_text() == text
