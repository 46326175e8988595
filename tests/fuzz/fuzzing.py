"""What the fuzz tests share: how many examples, the same ones each time, none of which may hang, and what a refusal is.

    python -m pytest tests/fuzz -m "not slow"      the few of every day
    python -m pytest tests/fuzz -m ""              the full counts too; launch/test.sh --all tests/fuzz does the same

Each test prints its totals. A hang is an alarm that raises in Python code, and where that is stuck in a library's, the end of
the process with its stack.
"""

import contextlib
import faulthandler
import io
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, settings

from pwkd_jax.errors import UserError

# Other examples than those that everyone runs: FUZZ_SEED=7.
SEED = os.environ.get("FUZZ_SEED")


class Hang(BaseException):
    """Not an Exception, so that no code under test takes it for a mistake of its own."""


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise Hang where the block takes longer."""

    def late(*_):
        raise Hang(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(4 * seconds, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(check: Callable[[Any], str], strategy, examples: int, capsys, seconds: float) -> Counter:
    """check(value) for so many values of a strategy, each within `seconds`; how often it returned what is printed."""
    tally: Counter[str] = Counter()

    @settings(
        max_examples=examples, deadline=None, derandomize=SEED is None, database=None, print_blob=False,
        suppress_health_check=list(HealthCheck), phases=(Phase.generate, Phase.shrink) if SEED is None else (Phase.generate,),
    )  # fmt: skip
    @hypothesis.given(strategy)
    def every(value):
        with within(seconds):
            tally[check(value)] += 1

    (hypothesis.seed(int(SEED))(every) if SEED else every)()
    with capsys.disabled():
        each = ", ".join(f"{count} {what}" for what, count in tally.most_common())
        print(f"\n{check.__name__}: {sum(tally.values())} examples: {each}")
    return tally


class Text(io.StringIO):
    """In place of standard error, also for what asks for its file."""

    def fileno(self) -> int:
        return sys.__stderr__.fileno()


def sentence(text: str) -> str:
    """The text of a refusal, which has to be one line for people."""
    assert text.strip() and "\n" not in text.strip(), f"not one line: {text!r}"
    assert len(text) < 1500, f"too long: {text!r}"
    assert not re.search(r"Traceback|<[\w.]+ object at 0x|<class '|<function ", text), f"not for people: {text!r}"
    return text.strip()


def refused(call: Callable[[], Any]) -> tuple[Any, str]:
    """(what a call returns, "") or (None, the sentence of its UserError)."""
    try:
        return call(), ""
    except UserError as e:
        return None, sentence(str(e))
