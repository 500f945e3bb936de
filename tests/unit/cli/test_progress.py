"""The line that is drawn while something takes long, and that nothing is drawn elsewhere."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

import ferrum_jax as fj
from ferrum_jax import progress
from support import environment
from support.terminals import in_terminal


class Lines(list):
    """Records what is drawn; None when it is removed."""

    def draw(self, text):
        self.append(text)

    def clear(self):
        self.append(None)


@pytest.fixture
def lines():
    drawn = Lines()
    progress.show(line=drawn)
    yield drawn
    progress.show(False)


def test_what_is_quick_is_not_drawn(lines):
    with progress.task("quick"):
        pass
    time.sleep(0.8)
    assert lines == []


def test_a_long_task_is_drawn_with_how_far_it_is_and_taken_away(lines):
    with progress.task("working", 7) as update, progress.task("inside"):
        update(2)
        time.sleep(1.5)
        update(3, "elsewhere")
        time.sleep(0.5)
    assert lines[0] in ("working 2 of 7, 1 s; inside, 1 s", "working 2 of 7, 0 s; inside, 0 s")
    assert any("elsewhere 3 of 7" in (text or "") for text in lines)
    assert lines[-1] is None and lines.count(None) == 1
    before = len(lines)
    time.sleep(0.5)
    assert len(lines) == before and "ferrum_jax progress" not in [thread.name for thread in threading.enumerate()]


def test_an_error_takes_the_line_away_too(lines):
    with pytest.raises(KeyError), progress.task("working"):
        time.sleep(1.0)
        raise KeyError
    assert lines and lines[-1] is None


def test_a_line_that_cannot_be_drawn_stops_nothing(lines, monkeypatch):
    def fail(*_):
        raise OSError

    monkeypatch.setattr(Lines, "draw", fail)
    monkeypatch.setattr(Lines, "clear", fail)
    with progress.task("working"):
        time.sleep(1.0)


@pytest.mark.slow
def test_the_engine_the_programs_and_many_prompts_say_what_they_do(lines, monkeypatch):
    told = []
    plain = progress._Task.__init__
    monkeypatch.setattr(progress._Task, "__init__", lambda self, *given: told.append(given) or plain(self, *given))
    model = fj.load("tiny", dtype="float32", max_seq_len=64)
    model.generate([[1 + i] for i in range(40)], fj.SamplingParams(max_tokens=2, logprobs=None, n=1, min_tokens=1))
    assert ("generating, prompt", 40) in told
    assert any(text.startswith("compiling ") and text.endswith("(program 1)") for text, total in told)
    engine = fj.Engine(model, fj.EngineConfig(max_seqs=1, num_pages=4, token_budget=16))
    told.clear()
    engine.warm_up()
    assert told[0] == ("warming up, program", 3 + len(engine.buckets()))


SLOW = """
import time
from support import cli_fakes
from ferrum_jax import progress
cli_fakes.install_fake()
plain = cli_fakes.FakeModel.stream
def stream(self, *given):
    with progress.task("compiling start (program 1)"):
        time.sleep(1.2)
    return plain(self, *given)
cli_fakes.FakeModel.stream = stream
"""


@pytest.mark.slow
def test_the_command_line_draws_on_a_terminal_and_leaves_the_answer_whole():
    code, shown = in_terminal(50, "run", "m", "hi", code=SLOW)
    assert code == 0 and "compiling start (program 1), 1 s" in shown
    assert shown.split("\x1b[2K")[-1] == "two words\n"
    code, shown = in_terminal(50, "run", "m", "hi", both=False, code=SLOW)
    assert (code, shown) == (0, "two words\n")


def test_a_script_is_silent_unless_it_asks():
    work = "with progress.task('working'): time.sleep(1.0)"
    for line, expected in (("", False), ("progress.show()", True)):
        code = f"import time\nfrom ferrum_jax import progress\n{line}\n{work}"
        done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
        assert ("working" in done.stderr) is expected and done.stdout == ""


@pytest.mark.slow
def test_a_notebook_draws_under_the_cell(monkeypatch):
    monkeypatch.delenv("FERRUM_JAX_PROGRESS", raising=False)
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    work = "import time\nfrom ferrum_jax import progress\n"
    work += "with progress.task('working', 3) as update:\n    update(1); time.sleep(1.5)"
    cells = [f"{work}\n    shown = progress._drawing._line._handle", "print(type(shown).__name__)", work]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    seen = []
    client = nbclient.NotebookClient(book, timeout=60, kernel_name="python3")
    plain = client.process_message
    client.process_message = lambda message, *given: (
        seen.append(message["content"].get("data", {}).get("text/plain")) or plain(message, *given)
    )
    client.execute()
    assert any("working 1 of 3" in (text or "") for text in seen)
    assert book.cells[1].outputs[0]["text"] == "DisplayHandle\n"
    assert [output["data"]["text/plain"] for output in book.cells[2].outputs] == [""]
