"""Files that were damaged, exchanged or edited: read as what was written, or refused in one sentence.

How to run all of it: see `fuzzing`. PyTorch's own checkpoints are among them where torch is installed.
"""

import shutil
from pathlib import Path

import fuzz_cases
import fuzz_damage
import fuzzing
import pytest
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> dict[str, fuzz_cases.Case]:
    return fuzz_cases.make(tmp_path_factory.mktemp)


# How often one is drawn, of 4: less where it trains.
OFTEN = {"results": 2, "a run that goes on": 1}
JSON = ("TFDS information", "facts of a workdir", "results", "summary", "run.json", "sweep.json")


@st.composite
def accidents(draw, names: list[str]) -> tuple[str, float, dict]:
    name = draw(st.sampled_from([n for n in names for _ in range(OFTEN.get(n, 4))]))
    return name, draw(fuzz_damage.PLACES), draw(fuzz_damage.damages(name in JSON))


@pytest.mark.parametrize("examples", [30, pytest.param(500, marks=pytest.mark.slow)])
def test_damaged_files_are_read_as_written_or_refused(examples, capsys, cases, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    written, numbers = {}, iter(range(10**6))

    def copied(case: fuzz_cases.Case) -> Path:
        home = tmp_path / str(next(numbers))
        shutil.copytree(case.home, home, symlinks=True)
        return home

    def files_read(accident: tuple[str, float, dict]) -> str:
        name, which, damage = accident
        case = cases[name]
        if name not in written:
            written[name] = case.read(copied(case))
        home = copied(case)
        try:
            file = case.damaged[int(which * len(case.damaged))]
            before = (home / file).read_bytes()
            other = (case.other / file).read_bytes() if (case.other / file).exists() else before[::-1]
            after = fuzz_damage.damaged(before, other, damage)
            (home / file).unlink()
            if damage["how"] == "folder":
                (home / file).mkdir()
            elif after is not None:
                (home / file).write_bytes(after)
            found, text = fuzzing.refused(lambda: case.read(home))
            if text:
                assert after != before, f"refused as it was written: {text}"
                assert not case.named or Path(file).name in text or str(home) in text, f"does not name {file}: {text}"
                return "refused"
            whole_other = case.alone and after == other
            assert found == written[name] or whole_other or not case.sure, f"{file} is read as another thing"
            return "read" if found == written[name] else "read as another, which it may be"
        finally:
            shutil.rmtree(home)

    tally = fuzzing.run(files_read, accidents(sorted(cases)), examples, capsys, 120)
    assert tally["refused"] > examples / 4

