"""Flags, files of flags, and what a run saves of them."""

import argparse
import json
from pathlib import Path

import pytest

from optjax.train import settings


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="it")
    made.add_argument("--lr", type=float, default=1e-3)
    made.add_argument("--steps", type=int, required=True)
    made.add_argument("--out-folder", type=Path)
    made.add_argument("--data", nargs="+")
    made.add_argument("--betas", type=float, nargs=2, default=(0.9, 0.95))
    made.add_argument("--stacked", action=argparse.BooleanOptionalAction, default=False)
    made.add_argument("--offset", type=int, default=0)
    return made


@pytest.fixture(params=["toml", "json"])
def file(request, tmp_path) -> Path:
    values = {"lr": 0.5, "steps": 7, "out_folder": "a b", "data": ["x", "y=2"], "stacked": True, "offset": -3}
    path = tmp_path / f"run.{request.param}"
    lines = (f"{name} = {json.dumps(value)}" for name, value in values.items())
    path.write_text(json.dumps(values) if request.param == "json" else "\n".join(lines))
    return path


def test_a_file_gives_flags_and_the_command_line_beats_it(file):
    args = settings.parse(parser(), ["--settings", str(file)])
    assert (args.lr, args.steps, args.out_folder, args.data) == (0.5, 7, Path("a b"), ["x", "y=2"])
    assert args.stacked is True and args.offset == -3 and args.betas == (0.9, 0.95)
    args = settings.parse(parser(), ["--lr", "2", f"--settings={file}", "--no-stacked", "--data", "z"])
    assert args.lr == 2.0 and args.stacked is False and args.data == ["z"] and args.steps == 7


def test_what_was_resolved_is_taken_again(file, tmp_path):
    first = settings.parse(parser(), ["--settings", str(file), "--betas", "0.8", "0.99"])
    settings.write(settings.resolved(first), tmp_path / "run")
    again = settings.parse(parser(), ["--settings", str(tmp_path / "run")])
    assert settings.resolved(again) == settings.resolved(first)
    assert settings.resolved(again)["betas"] == [0.8, 0.99] and again.stacked is True


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.toml", "stepz = 3", "a.toml: no such setting: stepz"),
        ("a.toml", "step = 3", "no such setting: step"),  # no abbreviation
        ("a.toml", "steps = ", "not TOML"),
        ("a.json", "[1]", "one level"),
        ("a.toml", "[recipe]\nlr = 1", "one level"),
        ("a.toml", "steps = 'many'", "invalid int value: 'many'"),
        ("gone.toml", None, "no settings file"),
        ("a.json", '{"filled": true}', "filled should be a list of settings' names, not True"),
    ],
)
def test_a_wrong_file_is_a_clear_error(tmp_path, capsys, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit) as error:
        settings.parse(parser(), ["--settings", str(tmp_path / name)])
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_help_names_the_option_and_reads_no_file(capsys):
    with pytest.raises(SystemExit):
        settings.parse(parser(), ["--settings", "gone.toml", "--help"])
    assert "--settings FILE" in capsys.readouterr().out
