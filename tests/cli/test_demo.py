"""Test `python -m sdgp_fx demo`: a short run, what it refuses, and Ctrl-C."""

import io
import math
import re
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from rich.console import Console

from sdgp_fx.cli import demo, demo_data, demo_results, doctor
from sdgp_fx.cli.main import main

SHORT = ["demo", "--model", "test_resnet", "--size", "16", "--inner", "aot_eager"]
SHORT += ["--device", "cpu"]
PRUNED = 14  # of the 15 convolutions of test_resnet at 2:4; the first has no input gradient.


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch):
    """Set a wide terminal and one thread: images this small gain nothing from more."""
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def drawn(monkeypatch):
    """Return the results that get drawn."""
    results = []
    draw = demo.draw

    def record(measured, title, path):
        results.extend(measured)
        draw(measured, title, path)

    monkeypatch.setattr(demo, "draw", record)
    return results


def row(text, first):
    """Return the cells of the table row that starts with first."""
    line = next(line for line in text.splitlines() if line.startswith(f"│ {first} "))
    return [cell.strip() for cell in line.strip("│").split("│")]


def refused(arguments, capsys):
    """Return the line on stderr when the command line refuses arguments."""
    with pytest.raises(SystemExit) as exit_:
        main([*SHORT, *arguments])
    out, err = capsys.readouterr()
    assert exit_.value.code == 2
    assert out == ""
    assert err.count("\n") == 1
    return err


def test_a_short_run_learns_and_shows_what_it_measured(tmp_path, capsys, drawn, monkeypatch):
    # What auto chooses depends on the machine.
    monkeypatch.setenv("SDGP_PRODUCT", "sparse")
    picture = tmp_path / "curves.png"
    assert main([*SHORT, "--steps", "50", "--out", str(picture)]) == 0

    dense, sdgp = (result.losses for result in drawn)
    assert sdgp[0] == pytest.approx(dense[0], rel=1e-5)
    assert not math.isclose(sdgp[-1], dense[-1], rel_tol=1e-3)

    out = capsys.readouterr().out
    for result, name in zip(drawn, ("dense", "SDGP"), strict=True):
        assert result.name == name
        assert len(result.losses) == 50
        assert result.accuracy > 0.5
        last = sum(result.losses[-20:]) / 20
        assert len(result.seconds) == 50
        assert 0 < result.step_ms < min(result.seconds[0] * 1e3, sum(result.seconds) * 1e3 / 25)
        cells = [name, "50 of 50", f"{result.accuracy:.1%}", f"{last:.4f}", f"{result.step_ms:.1f}"]
        assert row(out, name) == cells
    assert row(out, "pruned") == ["pruned", str(PRUNED)]
    assert row(out, "of these, zeros are skipped in")[1] == str(PRUNED)
    assert row(out, "dense: no") == ["dense: no input gradient", "1"]
    assert str(picture) in out
    pixels = imread(picture)
    assert min(pixels.shape[:2]) > 500
    for color in demo_results.COLORS.values():
        rgb = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert (np.abs(pixels[..., :3] - rgb).max(-1) < 0.01).sum() > 500


def test_both_see_the_same_batches_and_dropout(tmp_path, monkeypatch, drawn):
    """With neither of them compiled, only the batches or dropout could make the two differ."""
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    monkeypatch.setattr(demo, "explain", lambda *_, **__: [])
    build = demo.build_model
    dropout = torch.nn.Dropout(0.5)
    monkeypatch.setattr(
        demo, "build_model", lambda *args: torch.nn.Sequential(build(*args), dropout)
    )
    out = str(tmp_path / "p.png")
    assert main([*SHORT, "--steps", "4", "--out", out]) == 0
    dense, sdgp = (result.losses for result in drawn)
    assert sdgp == dense
    assert len(set(dense)) == 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--n", "5", "--m", "4"], "sdgp.n: expected 1 <= n <= sdgp.m = 4, got 5"),
        (["--prune", "smallest"], "sdgp.prune"),
        (["--model", "resnt10t"], "resnet10t"),
        (["--model", "test_vit", "--size", "8"], "--size 160"),
        (["--data", "cifar10"], "--root"),
        (["--batch-size", "1438"], "1437"),
        (["--batch-size", "1"], "expected 2"),
        (["--epochs", "0"], "--epochs"),
        (["--lr", "nan"], "--lr"),
        (["--device", "meta"], "--device"),
        (["--out", "."], "--out"),
        (["--out", "no/such/folder/p.png"], "--out"),
    ],
)
def test_what_cant_be_run_is_refused_in_one_line(arguments, said, capsys):
    assert said in refused(arguments, capsys)


@pytest.mark.parametrize("name", ["", "cifar-10-batches-py"])
def test_a_folder_without_cifar10_is_refused(name, tmp_path, capsys):
    (tmp_path / name).mkdir(exist_ok=True)
    said = refused(["--data", "cifar10", "--root", str(tmp_path)], capsys)
    assert str(tmp_path / "cifar-10-batches-py") in said
    assert f"torchvision.datasets.CIFAR10({str(tmp_path)!r}, download=True)" in said


def test_a_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "sdgp_fx.cli.demo")
    monkeypatch.setitem(sys.modules, "timm", None)
    said = refused([], capsys)
    assert "timm is not installed" in said
    assert 'pip install "sdgp_fx[demo]"' in said


def test_a_bad_setting_is_refused_before_anything_is_imported():
    code = "import sys; from sdgp_fx.cli.main import main\ntry: main(['demo', '--n', '5'])\n"
    code += "except SystemExit: sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr.count("\n") == 1


def interrupt(arguments, line):
    """Send SIGINT once the command has printed line; return exit code, stdout and stderr."""
    command = [sys.executable, "-m", "sdgp_fx", *SHORT, *arguments]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell may have started these tests with SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        watchdog = threading.Timer(60, process.kill)
        watchdog.start()
        for printed in process.stdout:
            if printed.startswith(line):
                process.send_signal(signal.SIGINT)
                break
        out, err = process.communicate()
        watchdog.cancel()
    return process.returncode, out, err


def test_an_interrupt_while_compiling_ends_the_run(tmp_path, monkeypatch, capsys):
    def step(*_):
        raise KeyboardInterrupt

    picture = tmp_path / "p.png"
    monkeypatch.setattr(demo, "make_step", lambda *_: step)
    monkeypatch.setattr(demo, "explain", lambda *_, **__: [])
    assert main([*SHORT, "--out", str(picture)]) == 130
    out, err = capsys.readouterr()
    assert err.endswith("interrupted\n")
    assert "│" not in out
    assert not picture.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_an_interrupt_in_training_leaves_what_was_measured(tmp_path):
    picture = tmp_path / "p.png"
    code, out, err = interrupt(["--steps", "100000", "--out", str(picture)], "training")
    assert code == 130
    assert "Traceback" not in err
    for name in ("dense", "SDGP"):
        _, steps, accuracy, loss, milliseconds = row(out, name)
        assert re.fullmatch(r"[1-9]\d* of 100000", steps)
        assert re.fullmatch(r"\d+\.\d%", accuracy)
        assert float(loss) > 0
        if not steps.startswith("1 of"):
            assert float(milliseconds) > 0
    assert row(out, "pruned") == ["pruned", str(PRUNED)]
    assert imread(picture).size


def test_an_interrupt_while_testing_leaves_what_was_measured(tmp_path, monkeypatch, capsys):
    accuracies = iter([0.125])

    def accuracy(*_):
        for value in accuracies:
            return value
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "accuracy", accuracy)
    monkeypatch.setattr(demo, "make_step", lambda *_: lambda *_: 1.0)
    monkeypatch.setattr(demo, "explain", lambda *_, **__: [])
    assert main([*SHORT, "--steps", "1", "--out", str(tmp_path / "p.png")]) == 130
    out = capsys.readouterr().out
    assert row(out, "dense")[2] == "12.5%"
    assert row(out, "SDGP")[2] == "not measured"
    assert (tmp_path / "p.png").exists()


@pytest.mark.parametrize("missing", ["C++ compiler", "Python's headers", ""])
def test_aot_eager_stands_in_where_inductor_cant_compile(missing, tmp_path, monkeypatch):
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def find_compiler():
        if missing == "C++ compiler":
            raise InvalidCxxCompiler

    if missing != "Python's headers":
        (tmp_path / "Python.h").touch()
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", find_compiler)
    monkeypatch.setattr(doctor.sysconfig, "get_path", lambda _: str(tmp_path))
    console = Console(file=io.StringIO())
    assert demo.find_inner(console) == ("aot_eager" if missing else "inductor")
    assert missing in console.file.getvalue()


def test_cifar10_is_trained_on(cifar10, tmp_path, monkeypatch, capsys, drawn):
    root, images = cifar10
    batches = []

    def step(*batch):
        batches.append([part.shape for part in batch])
        return 1.0

    monkeypatch.setattr(demo, "make_step", lambda *_: step)
    monkeypatch.setattr(demo, "explain", lambda *_, **__: [])
    arguments = ["--data", "cifar10", "--root", str(root), "--batch-size", "8", "--steps", "2"]
    assert main([*SHORT, *arguments, "--out", str(tmp_path / "p.png")]) == 0
    assert "CIFAR-10" in capsys.readouterr().out
    assert [len(result.losses) for result in drawn] == [2, 2]
    assert batches == [[(8, 3, 16, 16), (8,)]] * 4
    loaded = demo_data.load_cifar10(root).images
    assert torch.equal(loaded, torch.from_numpy(images).view(40, 3, 32, 32))


def test_augmented_images_are_shifted_and_mirrored():
    images = torch.arange(1, 1 + 60 * 2 * 5 * 6).view(60, 2, 5, 6)
    augmented = demo_data.augment(images, torch.Generator().manual_seed(0), margin=1)
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1))
    seen = set()
    for image, source in zip(augmented, padded, strict=True):
        windows = {
            (top, left, mirrored): source[:, top : top + 5, left : left + 6].flip(
                [2] if mirrored else []
            )
            for top in range(3)
            for left in range(3)
            for mirrored in (False, True)
        }
        seen.update(where for where, window in windows.items() if torch.equal(image, window))
        assert any(torch.equal(image, window) for window in windows.values())
    assert len(seen) > 12


def test_every_epoch_has_each_image_once_in_a_new_order():
    data = demo_data.digits()
    batches = demo_data.training_batches(data, 100, seed=0)
    epochs = [torch.cat([next(batches)[0] for _ in range(14)]) for _ in range(2)]
    for images in epochs:
        assert images.shape == (1400, 1, 8, 8)
        assert len(images.unique(dim=0)) > 1390
    assert not torch.equal(*epochs)
    again = demo_data.training_batches(data, 100, seed=0)
    assert torch.equal(next(again)[0], epochs[0][:100])


def test_images_are_normalised_and_resized():
    data = demo_data.digits()
    images = demo_data.prepare(data.images, data, 8)
    assert images.mean().item() == pytest.approx(0, abs=1e-5)
    assert images.std().item() == pytest.approx(1, abs=1e-5)
    assert demo_data.prepare(data.images[:2], data, 32).shape == (2, 1, 32, 32)


def shown(steps, terminal):
    """Return the display of a training of this many steps."""
    losses = {"dense": [], "SDGP": []}
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    with demo.display(console, steps) as show:
        for step in range(steps):
            for values in losses.values():
                show("training", losses)
                values.append(1 / (step + 1))
        show("trained", losses)
    return console.file.getvalue()


def test_a_terminal_gets_a_bar():
    text = shown(4, terminal=True)
    assert "dense 0.250  SDGP 0.250" in text
    assert "trained  4/4" not in text
    assert text.endswith("\x1b[?25h")  # The cursor is back.


def test_a_file_gets_a_few_lines():
    lines = shown(400, terminal=False).splitlines()
    assert lines[-1] == "trained  400/400  dense 0.003  SDGP 0.003"
    assert 10 < len(lines) < 30
    assert all(re.fullmatch(r"train(ing|ed)  \d+/400.*", line) for line in lines)
