"""The notebooks run from top to bottom, print what is stored in them, and their exercises tell right from wrong."""

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
NUMBER = re.compile(r"-?\d+\.?\d*(?:e[-+]?\d+)?")

needs_model = pytest.mark.skipif(
    not (ROOT / "tiny/model/config.json").exists(), reason="tiny/model, which the notebooks look into, is not there"
)
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def tags(cell):
    return cell.metadata.get("tags", [])


def tagged(notebook, tag):
    return [cell for cell in notebook.cells if tag in tags(cell)]


def solutions(path):
    """{"exercise 1": code, "exercise 1, wrong": code, ...} of the solutions of a notebook."""
    text = (ROOT / "notebooks/solutions" / f"{path.stem}.py").read_text()
    _, *parts = re.split(r"^# %% *(.*)\n", text, flags=re.MULTILINE)
    names = parts[::2]
    assert len(set(names)) == len(names), f"a name stands twice: {names}"
    return dict(zip(names, parts[1::2], strict=True))


def said(cell):
    """All text that a cell has put out, without the names of figures and addresses in memory."""
    texts = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs]
    return re.sub(r"<Figure.*?>|0x[0-9a-f]+", "", "".join(texts)).strip()


def error(cell):
    """Name and sentence of the exception that a cell has ended with, if it has."""
    return next((f"{o.ename}: {o.evalue}" for o in cell.outputs if o.output_type == "error"), None)


def same(stored, now):
    """Whether texts are equal, their numbers up to rounding: another machine adds up in another order."""
    if NUMBER.sub("#", stored) != NUMBER.sub("#", now):
        return False
    pairs = zip(map(float, NUMBER.findall(stored)), map(float, NUMBER.findall(now)), strict=True)
    return all(max(abs(a), abs(b)) < 1e-4 or abs(a - b) <= 0.02 + 0.02 * abs(a) for a, b in pairs)


def run(path):
    """Executes a notebook and, behind each exercise, its wrong answers and its solution with their checks.

    Returns [(the stored cell, the executed one)], and {name of a solution or "placeholder 1": the executed check}.
    """
    stored, notebook = (nbformat.read(path, as_version=4) for _ in range(2))
    answers, cells, checks = solutions(path), [], {}
    for cell in notebook.cells:
        cells.append(cell)
        if "check" in tags(cell):
            number = sum("check" in tags(cell) for cell in cells)
            checks[f"placeholder {number}"] = cell
            names = sorted((n for n in answers if n.split(",")[0] == f"exercise {number}"), reverse=True)
            for name in names:  # the wrong ones first: what follows has the right one to go on with
                trial = nbformat.v4.new_code_cell(answers[name])
                check = nbformat.v4.new_code_cell(cell.source, metadata={"tags": ["raises-exception"]})
                checks[name] = check
                cells += [trial, check]
    original = [cell for cell in cells if cell.id in {cell.id for cell in stored.cells}]
    notebook.cells = cells
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}})
    client.execute()
    return list(zip(stored.cells, original, strict=True)), checks


@needs_model
@each_notebook
def test_runs_and_says_what_is_stored_and_its_exercises_tell_right_from_wrong(path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # nobody needs a download
    cells, checks = run(path)

    for stored, now in cells:
        if stored.cell_type != "code" or "varies" in tags(stored):
            continue
        assert same(said(stored), said(now)), (
            f"in the cell\n{stored.source}\n\n{said(stored)}\n\nhas become\n\n{said(now)}"
        )
        pictures = [sum("image/png" in o.get("data", {}) for o in cell.outputs) for cell in (stored, now)]
        assert pictures[0] == pictures[1], f"stored and new figures of\n{stored.source}"

    for name, check in checks.items():
        if "wrong" in name:
            assert (error(check) or "").startswith("AssertionError: "), f"{name}: {error(check)} {said(check)}"
        elif name.startswith("placeholder"):
            assert "Right" not in said(check), f"{name} is taken for an answer"
        else:
            assert error(check) is None and "Right" in said(check), f"{name}: {error(check)}"


@each_notebook
def test_is_stored_with_all_its_outputs_from_one_run_and_small(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [error(cell) for cell in code if error(cell)]
    assert path.stat().st_size < 700_000


@each_notebook
def test_has_three_exercises_with_checks_solutions_and_wrong_answers(path):
    notebook = nbformat.read(path, as_version=4)
    exercises, checks = tagged(notebook, "exercise"), tagged(notebook, "check")
    assert len(exercises) == len(checks) == 3
    assert all("..." in cell.source for cell in exercises)
    right, wrong = ({f"exercise {i}{kind}" for i in (1, 2, 3)} for kind in ("", ", wrong"))
    assert right | wrong <= {re.sub("wrong.*", "wrong", name) for name in solutions(path)}


@pytest.mark.parametrize("path", [*NOTEBOOKS, *(ROOT / "notebooks").glob("*.md")], ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    if path.suffix == ".md":
        text = path.read_text()
    else:
        cells = nbformat.read(path, as_version=4).cells
        text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    targets = re.findall(r"\]\(([^)\s]+)\)|<img[^>]*src=\"([^\"]+)\"", text)
    for target in filter(None, sum(targets, ())):
        if not target.startswith(("http://", "https://", "#")):
            assert (path.parent / target.split("#")[0]).exists(), f"{path.name} has a link to {target}"


def test_figures_of_the_readme_are_those_that_the_notebooks_store():
    from execute import readme_figures  # needs nbclient

    figures = {}
    for path in NOTEBOOKS:
        figures |= readme_figures(nbformat.read(path, as_version=4))
    assert figures == {file.name: file.read_bytes() for file in (ROOT / "notebooks/images").iterdir()}
    assert all(f"notebooks/images/{name}" in (ROOT / "README.md").read_text() for name in figures)
