"""What the README and the pages under docs/ show, runs."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "tiny/README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(path: Path, *languages: str) -> list[str]:
    """The code blocks of a page in these languages."""
    return re.findall(rf"^```(?:{'|'.join(languages)})\n(.*?)^```$", path.read_text(encoding="utf-8"), re.M | re.S)


def commands(path: Path) -> list[list[str]]:
    """The words of each `python SCRIPT ...` that a page shows in a shell block or in a table."""
    text = "\n".join(blocks(path, "sh", "bash")) + "\n" + "\n".join(re.findall(r"`(python [^`]+)`", path.read_text()))
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if re.match(r"python \S+\.py", line)]


def run(command: list[str], folder: Path = ROOT) -> str:
    """Runs a command of the docs and returns what it prints."""
    words = [sys.executable, str(ROOT / command[1]), *command[2:]]
    done = subprocess.run(words, capture_output=True, text=True, cwd=folder, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def options(script: str) -> set[str]:
    """The options that a script defines (those of llava.py and some of train.py are in extras/)."""
    sources = {"llava.py": ["extras/chat.py"], "train.py": ["train.py", "extras/lora_training.py"]}
    text = "".join((ROOT / source).read_text(encoding="utf-8") for source in sources.get(script, [script]))
    return {"--help", *re.findall(r"\"(--[a-z-]+)\"", text)}


def test_python_blocks_of_the_readme_run_one_after_the_other(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    found = blocks(ROOT / "README.md", "python")
    assert found
    exec("\n".join(found), {})
    assert "ASSISTANT" in capsys.readouterr().out


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_name_scripts_that_exist_and_options_that_these_have(path):
    for command in commands(path):
        assert (ROOT / command[1]).is_file(), f"{path.name} runs {command[1]}"
        assert {word for word in command[2:] if word.startswith("--")} <= options(command[1]), f"{path.name}: {command}"


def test_the_training_example_runs_as_it_stands_but_for_its_epochs(tmp_path):
    example = [command for command in commands(ROOT / "docs/training.md") if any("toy" in word for word in command)]
    assert [command[1] for command in example] == [
        "tests/toy_data.py",
        "train.py",
        "train.py",
        "evaluate.py",
        "llava.py",
    ]
    for command in example:
        if "--epochs" in command:
            command[command.index("--epochs") + 1] = "1"
        printed = run(command, tmp_path)
    assert printed.strip()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        file, _, heading = target.partition("#")
        if not target.startswith(("http://", "https://")):
            other = path.parent / file if file else path
            assert other.exists(), f"{path.name} links to {target}"
            headings = re.findall(r"^#+ (.*)$", other.read_text(encoding="utf-8"), re.M) if heading else []
            slugs = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings]
            assert not heading or heading in slugs, f"{path.name} links to {target}"
