"""What the commands that take a config make of their flags."""

import sys

import jax
import pytest
from absl import flags
from ml_collections import config_flags

from nuner_jax import command
from nuner_jax.errors import NunerError


@pytest.fixture
def given(monkeypatch, root):
    """Gives a command line to the functions under test, from the repository's root; returns what absl leaves of it."""

    def parse(*arguments):
        monkeypatch.setattr(sys, "argv", ["program", *arguments])  # which config_flags looks for overrides in
        values = flags.FlagValues()
        config_flags.DEFINE_config_file("config", flag_values=values)
        flags.DEFINE_string("workdir", None, "", flag_values=values)
        monkeypatch.setattr(command.flags, "FLAGS", values)
        monkeypatch.chdir(root)
        return values(sys.argv)

    return parse


def read(argv, *tasks):
    return command.read_config(argv, tasks=tasks, example="configs/some.py")


def test_the_config_is_read_with_its_overrides(given):
    config = read(given("--config=configs/quickstart.py", "--config.lr=0.25"), "pretrain")
    assert (config.task, config.lr) == ("pretrain", 0.25)


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["quickstart"], "unexpected argument 'quickstart': every option begins with --"),
        ([], "--config=FILE is needed, for example --config=configs/some.py"),
        (["--config=configs/quickstart.py"], "config.task = 'pretrain': this command takes a config of fewshot"),
    ],
)
def test_what_no_command_can_use_is_refused(given, arguments, hint):
    with pytest.raises(NunerError) as error:
        read(given(*arguments), "fewshot")
    assert hint in str(error.value)


def test_a_value_that_no_run_could_use_is_refused(given):
    with pytest.raises(NunerError, match="config.data.rows = 0: at least 1"):
        read(given("--config=configs/quickstart.py", "--config.data.rows=0"), "pretrain")


def test_the_run_is_named_after_its_config_where_no_folder_is_given(given, root, tmp_path):
    given("--config=configs/nuner_multilingual.py:bert-base-multilingual-cased")
    assert command.workdir() == root / "runs" / "nuner_multilingual"
    given("--config=configs/quickstart.py", f"--workdir={tmp_path}")
    assert command.workdir() == tmp_path
    given("--config=configs/quickstart.py", "--workdir=gs://bucket/run")
    with pytest.raises(NunerError, match="only folders of a file system"):
        command.workdir()


def test_programs_are_kept_where_the_user_has_said_or_else_in_the_cache(tmp_path):
    said = jax.config.jax_compilation_cache_dir
    assert said, "the tests say where"
    try:
        command.keep_compiled(str(tmp_path))
        assert jax.config.jax_compilation_cache_dir == said
        jax.config.update("jax_compilation_cache_dir", None)
        command.keep_compiled(str(tmp_path))
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "compiled")
    finally:
        jax.config.update("jax_compilation_cache_dir", said)
