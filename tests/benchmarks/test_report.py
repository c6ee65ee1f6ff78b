"""Test reports: files are whole, and say where they come from."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks.harness import report

CPU = torch.device("cpu")


def test_a_file_is_replaced_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "out.json"
    report.write_text(path, "[1]")
    write = Path.write_text

    def interrupted(self, text):
        write(self, text[:2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        report.write_text(path, "[2]")
    assert json.loads(path.read_text()) == [1]


def test_every_addition_is_saved(tmp_path):
    path = tmp_path / "out.json"
    saved = report.Report("name", {}, {}, path)
    for count in (1, 2):
        saved.add([{"a": count}])
        assert len(json.loads(path.read_text())["rows"]) == count


def test_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert report.commit(tmp_path) is None

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
        command = ["git", *identity, *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)

    git("init")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "a")
    git("tag", "-a", "v1", "-m", "a")
    head = git("rev-parse", "HEAD").stdout[:12]
    assert report.commit(tmp_path) == head
    (tmp_path / "a").write_text("2")
    assert report.commit(tmp_path) == f"{head}+changes"
    monkeypatch.setenv("PATH", "")
    assert report.commit(tmp_path) is None


def test_caption_leaves_out_what_is_not_there():
    line = report.caption("name", {**report.environment(CPU), "commit": None})
    assert "cudnn" not in line
    assert "None" not in line
    assert "commit unknown" in line
