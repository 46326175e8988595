"""A workdir of another version: taken over where that is sound, otherwise refused by name before anything is touched."""

import json

import pytest

from pwkd_jax import config, evaluate
from pwkd_jax.errors import UserError
from pwkd_jax.experiment import shared_teachers
from pwkd_jax.experiment.workdir import claim

FACTS = {"name": "digits", "train_images": 96, "digests": {"train": "1"}}


@pytest.fixture
def claimed(tmp_path):
    claim(tmp_path, config.default(), FACTS)
    return tmp_path


def change(path, **values):
    """Set dotted keys of a JSON file, or take away those that are None."""
    found = json.loads(path.read_text())
    for key, value in values.items():
        *parents, last = key.split(".")
        inner = found
        for parent in parents:
            inner = inner[parent]
        inner.pop(last)
        if value is not None:
            inner[last] = value
    path.write_text(json.dumps(found))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_began_it_is_written_once(claimed):
    made = json.loads((claimed / "made_with.json").read_text())
    assert (made["format"], made["version"]) == ("pwkd_jax.workdir", 1)
    assert {"pwkd_jax", "jax", "flax", "optax", "orbax-checkpoint", "device", "git_commit"} <= made.keys()
    change(claimed / "made_with.json", flax="0.0.1")
    claim(claimed, config.default(), FACTS)
    assert json.loads((claimed / "made_with.json").read_text())["flax"] == "0.0.1"


def test_a_workdir_of_before_a_key_goes_on_with_what_it_did(claimed):
    """A key that is newer has the default, and that is what runs without it did."""
    change(claimed / "config.json", **{"non_finite": None, "data.pixel_range": None})
    (claimed / "made_with.json").unlink()
    claim(claimed, config.default(), FACTS)
    assert json.loads((claimed / "config.json").read_text())["non_finite"] == "stop"
    assert not (claimed / "made_with.json").exists()  # nobody knows any more


def test_it_does_not_go_on_with_anything_else_there(claimed):
    change(claimed / "config.json", non_finite=None)
    before, other = contents(claimed), config.default().unlock()
    other.non_finite = "skip"
    with pytest.raises(UserError, match="holds runs with non_finite = 'stop', not 'skip'; give another workdir"):
        claim(claimed, other, FACTS)
    assert contents(claimed) == before


@pytest.mark.parametrize(
    ("file", "values", "said"),
    [
        ("config.json", {"seed": None, "teacher.widths": 3}, r"config.json: teacher.widths takes a list"),
        ("made_with.json", {"version": 2, "pwkd_jax": "9.1"}, r"laid out by pwkd_jax 9\.1, as version 2, and this one knows"),
        ("made_with.json", {"version": None}, r"made_with.json' is not whole"),
    ],
)
def test_what_it_cannot_know_is_refused_before_anything_is_touched(claimed, file, values, said):
    change(claimed / file, **values)
    before = contents(claimed)
    with pytest.raises(UserError, match=said):
        claim(claimed, config.default(), FACTS)
    assert contents(claimed) == before
    lent = config.default().unlock()
    lent.teacher.run = str(claimed)
    with pytest.raises(UserError, match=said):
        shared_teachers.check(lent, FACTS, ["slimmable"])


def test_a_key_that_is_no_more_is_named(claimed):
    path = claimed / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"old_key": 1}))
    with pytest.raises(UserError, match=r"config.json: 'old_key'|old_key"):
        claim(claimed, config.default(), FACTS)


def test_other_versions_are_warned_of(claimed, capsys):
    change(claimed / "made_with.json", jax="0.1.2", device="abacus", cpu_threads=999)
    claim(claimed, config.default(), FACTS)
    error = capsys.readouterr().err
    assert "was begun with jax 0.1.2 (now " in error and "device abacus (now cpu), cpu_threads 999 (now " in error
    assert error.count("\n") == 1


def test_a_later_workdir_is_refused_to_evaluation_too(claimed, capsys):
    (claimed / "students/pwkd/seed0/checkpoints/1").mkdir(parents=True)
    change(claimed / "made_with.json", version=7)
    assert evaluate.main([str(claimed / "students/pwkd/seed0")]) == 2
    error = capsys.readouterr().err
    assert "as version 7, and this one knows versions up to 1" in error and error.count("\n") == 1
