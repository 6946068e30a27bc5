"""Settings from the command line and from TOML: one dataclass, one set of names."""

from pathlib import Path

import pytest

from training.run.config import PRESETS, parse

pytestmark = pytest.mark.train


def test_a_file_gives_settings_and_the_command_line_has_the_last_word(tmp_path):
    file = tmp_path / "run.toml"
    settings = 'teacher = "embedded"; skip = 100; solver-skip = 20; lora = true; learning_rate = 1; resolution = 64'
    file.write_text(settings.replace("; ", "\n"))
    config = parse(["--config", str(file), "--skip", "40"])
    assert (config.teacher, config.skip, config.solver_skip, config.lora) == ("embedded", 40, 20, True)
    assert config.learning_rate == 1.0 and config.data_options.resolution == 64


@pytest.mark.parametrize(
    "text, said",
    [
        ("skips = 3", "skips is no setting"),
        ('skip = "3"', "skip: expected int, found '3'"),
        ("lora = 1", "lora: expected bool, found 1"),
        ('method = "slam"', "expected one of splam, lcm, dl, found 'slam'"),
        ("skip = ", "cannot be read as TOML"),
    ],
)
def test_a_file_that_is_wrong_is_named_with_what_is_wrong(text, said, tmp_path, capsys):
    file = tmp_path / "run.toml"
    file.write_text(text)
    with pytest.raises(SystemExit):
        parse(["--teacher", "embedded", "--config", str(file)])
    told = capsys.readouterr().err
    assert said in told and "run.toml" in told


def test_a_missing_file_and_a_missing_teacher_are_said(capsys):
    for arguments, said in ((["--config", "no.toml"], "no.toml is not there"), ([], "--teacher says whose")):
        with pytest.raises(SystemExit):
            parse(arguments)
        assert said in capsys.readouterr().err


def test_paths_that_begin_with_a_tilde_are_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert parse(["--teacher", "embedded", "--output-dir=~/run"]).output_dir == tmp_path / "run"
    (tmp_path / "run.toml").write_text('data = "~/photos"\nresume-from-checkpoint = "~/run/checkpoint-1"\n')
    found = parse(["--teacher", "embedded", "--config", str(tmp_path / "run.toml")])
    found = [Path(one) for one in (found.data, found.resume_from_checkpoint)]
    assert found == [tmp_path / "photos", tmp_path / "run" / "checkpoint-1"]


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_are_whole(name):
    assert parse(["--config", name]).teacher


def test_gradients_are_not_clipped_to_nothing(capsys):
    """In other trainers 0 is no clipping."""
    with pytest.raises(SystemExit):
        parse(["--teacher", "embedded", "--max-grad-norm", "0"])
    assert "--max-grad-norm must be above 0, got 0" in capsys.readouterr().err
    assert parse(["--teacher", "embedded", "--max-grad-norm", "inf"]).max_grad_norm == float("inf")
