"""The tables of guarded lines are sound: each line is there once, each test exists, and none is left out."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
from guards.copies import Found, outcomes
from guards.judging import judge, see_pass, unseen
from guards.tables import FOLDER, ROOT, Guard, Table, faults, tables


@pytest.mark.parametrize("path", tables(), ids=lambda path: path.stem)
def test_every_guard_is_sound_and_every_test_has_one(path):
    assert faults(Table.read(path)) == []


GUARDED = (
    "test_best_epochs", "test_callback*", "test_checkpoint*", "test_ddp", "test_guards", "test_optimizers",
    "test_ranks", "test_refusals", "test_weights_only",
)  # fmt: skip


@pytest.mark.parametrize("glob", GUARDED)
def test_what_a_run_must_survive_has_a_table_for_every_file(glob):
    """Else the test above is content with a table that is gone, or that was never written."""
    files = {path.stem for path in (ROOT / "tests").glob(f"{glob}.py")}
    assert files
    assert files <= {path.stem for path in tables()}


CODE = """
def f(x):
    check(x)
    return -x if x < 0 else x
"""
TESTS = """
import pytest

def helper(): ...

@pytest.mark.parametrize("x", [1])
def test_f(x): ...

class TestG:
    def test_g(self): ...
"""
FAULTS = {
    "sound": ("    check(x)", "    pass", "test_f TestG::test_g", None),
    "no such line": ("verify(x)", "", "test_f TestG::test_g", "f.py holds it 0 times, not once: 'verify(x)'"),
    "several such lines": ("x", "y", "test_f TestG::test_g", "f.py holds it 5 times, not once: 'x'"),
    "no change": ("check(x)", "check(x)", "test_f TestG::test_g", "f.py does not change: 'check(x)'"),
    "no Python": ("f(x):", "f(x)", "test_f TestG::test_g", "f.py is no Python with 'f(x)'"),
    "no such test": ("check(x)", "pass", "test_f TestG::test_g helper", "test_f has no test helper"),
    "no test": ("check(x)", "pass", "", "no test is named for 'check(x)'"),
    "not all tests": ("check(x)", "pass", "test_f", "TestG::test_g is in no guard"),
}


@pytest.mark.parametrize(("line", "instead", "fails", "fault"), FAULTS.values(), ids=FAULTS)
def test_what_is_wrong_with_a_table_is_named(line, instead, fails, fault, tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "f.py").write_text(CODE)
    (tmp_path / "tests" / "test_f.py").write_text(TESTS)
    found = faults(Table("test_f", (Guard("f.py", line, instead, tuple(fails.split())),)), tmp_path)
    assert (found == []) if fault is None else found[0].startswith(fault)


REPORT = """<testsuites><testsuite>
<testcase classname="tests.test_f" name="test_f[1]"><failure message="assert 1 == 2"/></testcase>
<testcase classname="tests.test_f" name="test_f[2]"/>
<testcase classname="tests.test_f.TestG" name="test_g"/>
<testcase classname="tests.test_f" name="test_h"><failure message="NameError: name 'y'"/></testcase>
<testcase classname="tests.test_f" name="test_s"><skipped message="no GPU"/></testcase>
<testcase classname="" name="tests.test_e"><error message="collection failure">ImportError</error></testcase>
</testsuite></testsuites>"""


def test_only_an_assertion_or_an_error_in_the_test_counts_as_its_failure(tmp_path):
    (tmp_path / "report.xml").write_text(REPORT)
    found = outcomes(tmp_path / "report.xml")
    assert found["test_f"] == Found(("test_f[2]",), (("test_f[1]", "assert 1 == 2"),))
    assert found["test_s"] == Found()  # neither passes nor fails
    assert {name: each.seen for name, each in found.items() if each.seen} == {"test_f": {"test_f[1]"}}
    assert found.keys() == {"test_f", "TestG::test_g", "test_h", "test_s"}


PASSES, FAILS = Found(("t[1]", "t[2]")), Found(("t[2]",), (("t[1]", "assert 1 == 2"),))
BREAKS = Found((), (("t[1]", "ImportError: no f"), ("t[2]", "in a worker: NameError: name 'y'")))


class Copied:
    """Gives the outcomes that it was given."""

    gpu = False

    def __init__(self, found):
        self.found = found

    def changed(self, guard):
        return nullcontext(guard.changed(ROOT / FOLDER))

    def run(self, file, names):
        return self.found


@pytest.mark.parametrize(
    ("found", "line", "status"),
    [
        ({"t": FAILS, "u": FAILS}, "import", "killed"),
        ({"t": FAILS, "u": PASSES}, "import", "SURVIVED"),
        ({"t": FAILS, "u": BREAKS}, "import", "SURVIVED"),
        ({"t": FAILS}, "import", "SURVIVED"),
        ({"t": FAILS, "u": FAILS}, "no such line", "STALE"),
    ],
)
def test_a_guard_is_killed_when_every_test_fails(found, line, status):
    guard = Guard("run.py", f"{line} argparse", "", ("t", "u"))
    assert judge(Table("test_guards", (guard,)), guard, Copied(found)).status == status


def test_cases_that_no_guard_makes_fail_are_named():
    guard = Guard("run.py", "import argparse", "", ("t",))
    table = Table("test_guards", (guard,))
    before, after = see_pass(table, Copied({"t": PASSES})), judge(table, guard, Copied({"t": FAILS}))
    assert (before.status, see_pass(table, Copied({"t": FAILS})).status) == ("passed", "FAILED")
    assert see_pass(table, Copied({})).status == "FAILED"
    assert unseen([before, after]) == ["test_guards  t: 1 of 2 cases: [2]"]
