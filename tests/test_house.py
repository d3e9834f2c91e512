"""The house is as its plan says: sections in their order, rules that are pure, no rooms for odds and ends."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import waitress.channel

ROOT = Path(__file__).parent.parent
BANNER = re.compile(r"^# -{20,} (\w+)$", re.MULTILINE)
GIVEN = {*dir(waitress.channel.HTTPChannel), "do_POST", "do_request"}  # names of what is extended
IMPURE = {
    "os",
    "time",
    "datetime",
    "secrets",
    "threading",
    "select",
    "signal",
    "bottle",
    "waitress",
    "filelock",
    "Path",
}


def planned(program):
    """The sections that the docstring of a program promises, in order."""
    return re.findall(r"^    ([A-Z]\w+)  +\w", ast.get_docstring(ast.parse(program.read_text())), re.MULTILINE)


@pytest.mark.parametrize("name", ["kirosync.py", "agent.py", "client.py"])
def test_sections_stand_in_the_order_that_the_docstring_gives(name):
    program = ROOT / name
    assert BANNER.findall(program.read_text()) == planned(program)
    assert len(planned(program)) >= 4


def section(name):
    text = (ROOT / "kirosync.py").read_text()
    parts = BANNER.split(text)
    return ast.parse(parts[parts.index(name) + 1])


def test_rules_are_pure():
    used = {node.id for node in ast.walk(section("Rules")) if isinstance(node, ast.Name)}
    assert not used & IMPURE
    assert not [node for node in ast.walk(section("Rules")) if isinstance(node, (ast.Import, ast.Global))]


def test_each_section_uses_only_what_stands_above_it():
    order = planned(ROOT / "kirosync.py")
    defined = {
        name: {node.name for node in section(name).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        for name in order
    }
    for place, name in enumerate(order):
        used = {node.id for node in ast.walk(section(name)) if isinstance(node, ast.Name)}
        for below in order[place + 1 :]:
            assert not used & defined[below], f"{name} uses {used & defined[below]} of {below}"


@pytest.mark.parametrize(
    ("owner", "names"), [("Service", {"bottle", "waitress"}), ("Main", {"argparse", "os.environ.get"})]
)
def test_only_one_section_knows_http_and_only_one_the_environment(owner, names):
    for name in planned(ROOT / "kirosync.py"):
        used = set(re.findall(r"[\w.]+", ast.unparse(section(name)))) | {
            node.id for node in ast.walk(section(name)) if isinstance(node, ast.Name)
        }
        assert name in (owner, "Main") or not used & names


def test_nothing_is_called_by_a_name_that_says_nothing():
    for path in [ROOT / "kirosync.py", ROOT / "agent.py", ROOT / "client.py", *(ROOT / "tests").glob("*.py")]:
        defined = (ast.FunctionDef, ast.ClassDef)
        names = [node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, defined)]
        names = {*names} - GIVEN
        assert not [
            name for name in names if re.search(r"util|helper|misc|manager|^handle_|^process_|^do_", name, re.I)
        ]


def test_no_function_is_long():
    for name in ("kirosync.py", "agent.py", "client.py"):
        for node in ast.walk(ast.parse((ROOT / name).read_text())):
            if isinstance(node, ast.FunctionDef):
                docstring = len((ast.get_docstring(node) or "").splitlines())
                assert node.end_lineno - node.lineno + 1 - docstring <= 35, f"{name}: {node.name}"


def test_the_service_runs_from_a_folder_where_it_is_alone(tmp_path):
    (tmp_path / "kirosync.py").write_bytes((ROOT / "kirosync.py").read_bytes())
    ran = subprocess.run(
        [sys.executable, "kirosync.py", "serve", "--help"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert all(option in ran.stdout for option in ("--host", "--port", "--state", "--threads"))


@pytest.mark.parametrize("name", ["kirosync.py", "agent.py", "client.py"])
def test_the_metadata_at_the_top_names_what_requirements_txt_does(name):
    block = re.search(r"^# /// script\n((?:# .*\n)+?)# ///$", (ROOT / name).read_text(), re.MULTILINE)[1]
    metadata = tomllib.loads(re.sub("^# ", "", block, flags=re.MULTILINE))
    listed = {line.split()[0] for line in (ROOT / "requirements.txt").read_text().splitlines() if line[:1].isalpha()}
    assert set(metadata["dependencies"]) <= listed


def test_every_claim_of_the_threat_model_names_a_test_that_exists():
    defined = {
        node.name
        for path in (ROOT / "tests").glob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    named = re.findall(r"`(test_\w+)`", (ROOT / "docs" / "security.md").read_text())
    assert len(named) > 30
    assert not set(named) - defined
