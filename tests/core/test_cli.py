"""How a command ends, seen from outside: a real process, its exit code and its stderr."""

import os
import shlex
import subprocess
import sys

import pytest

from hybrid_jax.core.cli import ArgumentParser
from hybrid_jax.core.errors import UserError

HEAD = "from hybrid_jax.core.cli import *\nfrom hybrid_jax.core.registry import UserError\n"


def run(body: str, *arguments: str) -> subprocess.CompletedProcess:
    script = HEAD + "def main(arguments):\n    " + body + "\nrun_command(main)"
    return subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)


def test_a_users_mistake_is_one_line_on_stderr_and_exit_code_2():
    done = run("raise UserError('depth must be positive,\\n  got -1')")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: depth must be positive, got -1\n"


def test_a_machine_without_memory_left_is_one_line_too():
    done = run("raise MemoryError('Unable to allocate 15 GiB')")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: the machine is out of memory: Unable to allocate 15 GiB\n"


def test_a_path_that_the_system_refuses_is_one_line_too(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("")
    for path, problem in {
        "a" * 300: "File name too long",
        str(tmp_path / "file" / "in"): "Not a directory",
        str(tmp_path / "loop"): "Too many levels of symbolic links",
    }.items():
        done = run("open(arguments[0])", path)
        assert (done.returncode, done.stderr) == (2, f"error: {path!r} cannot be used: {problem}\n")
    done = run("open('of_ours.html')")
    assert (done.returncode, "Traceback" in done.stderr) == (1, True)


def test_what_was_given_is_shown_in_part_where_it_is_a_megabyte_long():
    done = run("""raise UserError("unknown setting " + "k" * 1_000_000 + "; did you mean 'length'?")""")
    assert done.stderr.startswith("error: unknown setting kkk")
    assert done.stderr.endswith("k; did you mean 'length'?\n")
    assert len(done.stderr) < 600


def test_bad_usage_is_one_line_too():
    done = run("ArgumentParser(prog='report').parse_args(arguments)", "--rum", "x")
    assert done.returncode == 2
    assert done.stderr == "error: unrecognized arguments: --rum x; see report --help\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "a", "--run", "b"], "argument --run: given twice, takes one value"),
        (["--run", ""], "argument --run: needs a path, got an empty text"),
    ],
)
def test_an_option_is_given_once_and_a_path_is_not_empty(arguments, message):
    parser = ArgumentParser(prog="x")
    parser.add_argument("--run", metavar="DIR")
    parser.add_argument("overrides", nargs="*")
    with pytest.raises(UserError, match=f"^{message}; see x --help$"):
        parser.parse_intermixed_args(arguments)
    assert parser.parse_intermixed_args(["a=1", "b=2"]).overrides == ["a=1", "b=2"]


@pytest.mark.parametrize(
    ("body", "code"), [("pass", 0), ("raise KeyboardInterrupt", 130), ("raise Ended(143)", 143)]
)
def test_the_exit_code_is_zero_or_that_of_the_signal(body, code):
    done = run(body)
    assert (done.returncode, done.stderr) == (code, "")


@pytest.mark.parametrize("code", ["0", "None", "'bye'", "3"])
def test_a_component_that_leaves_is_no_success(code):
    done = run(f"sys.exit({code})")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: a component ended the program by sys.exit({code})\n"


def test_help_is_a_success():
    done = run("ArgumentParser(prog='report').parse_args(arguments)", "--help")
    assert (done.returncode, done.stderr, done.stdout[:13]) == (0, "", "usage: report")


def test_a_defect_keeps_its_traceback():
    done = run("1 / 0")
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


def test_a_reader_that_leaves_is_met_quietly():
    script = HEAD + "run_command(lambda arguments: print('line\\n' * 100_000))"
    writer = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    assert writer.stderr is not None
    writer.stdout.readline()
    writer.stdout.close()
    assert writer.stderr.read() == ""
    writer.stderr.close()
    assert writer.wait() == 141


def test_what_steers_a_terminal_is_not_printed():
    assert run("raise UserError('a \\x1b[31m red')").stderr == "error: a \N{REPLACEMENT CHARACTER}[31m red\n"


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "2>/dev/full"])
def test_a_closed_or_full_stream_is_no_failure(closed):
    script = HEAD + "def main(arguments):\n    print('done')\nrun_command(main)"
    line = f"{shlex.quote(sys.executable)} -c {shlex.quote(script)} {closed}"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_output_on_a_full_disk_is_one_line():
    script = HEAD + "def main(arguments):\n    print('done')\nrun_command(main)"
    line = f"{shlex.quote(sys.executable)} -c {shlex.quote(script)} > /dev/full"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        2,
        "error: the output cannot be written: No space left on device\n",
    )


def test_a_terminal_without_a_letter_shows_its_code():
    script = HEAD + "def main(arguments):\n    print('\\u00fc')\nrun_command(main)"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\\xfc\n", "")
