"""The command line as a person meets it: outputs, exit codes, one clear message for each wrong request."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import retinanet
from retinanet.checkpoint import save_model
from retinanet.cli import main
from retinanet.data import open_dataset
from retinanet.data.shapes import ShapesSpec, generate_shapes
from test_detector import make_model


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate_shapes(
        tmp_path_factory.mktemp("data") / "shapes", train=4, val=5, spec=ShapesSpec(image_size=96)
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), make_model())


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


def test_evaluate_writes_figures_and_results_that_judge_the_same(
    capsys: pytest.CaptureFixture[str], data: Path, model: Path, tmp_path: Path
) -> None:
    code, out, _ = run(
        capsys, "evaluate", model, data, "--output", tmp_path / "a", "--json", "--device", "cpu"
    )
    assert code == 0
    metrics = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert json.loads(out) == metrics
    assert metrics["images"] == 5
    assert set(metrics["per_class"]) == {"disk", "square", "triangle"}
    code, out, _ = run(
        capsys,
        "evaluate",
        "--detections",
        tmp_path / "a" / "detections.json",
        data,
        "--output",
        tmp_path / "b",
    )
    assert code == 0
    assert "AP50" in out
    again = json.loads((tmp_path / "b" / "metrics.json").read_text())
    assert again["ap"] == pytest.approx(metrics["ap"], abs=1e-3)  # boxes are written with few decimals


def test_evaluate_says_where_the_cap_was_hit(
    capsys: pytest.CaptureFixture[str], data: Path, model: Path, tmp_path: Path
) -> None:
    code, _, err = run(
        capsys, "evaluate", model, data, "--output", tmp_path / "a", "--max-detections", 3, "--device", "cpu"
    )
    assert code == 0
    assert "reached the cap of 3 detections; --max-detections N raises it" in err
    metrics = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert metrics["max_detections"] == 3
    assert metrics["at_100"]["ar100"] is not None


def test_predict_writes_a_line_and_a_picture_an_image(
    capsys: pytest.CaptureFixture[str], data: Path, model: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"nothing")
    folder = data / "images" / "val"
    code, _, err = run(
        capsys, "predict", model, folder, broken, "--output", tmp_path / "p", "--draw", "--threshold", "0.1",
        "--device", "cpu",
    )  # fmt: skip
    assert code == 1  # done in part: one input failed, and is named on stderr and in the output
    assert str(broken) in err
    lines = [json.loads(line) for line in (tmp_path / "p" / "detections.jsonl").read_text().splitlines()]
    assert len(lines) == 6
    assert set(lines[-1]) == {"file", "error"}
    detector = retinanet.load(model, device="cpu")
    for line in lines[:-1]:
        assert {"file", "width", "height", "detections"} == set(line)
        found = detector.predict(line["file"], threshold=0.1)[0]
        assert [one["label"] for one in line["detections"]] == found.names
        boxes = np.array([one["box"] for one in line["detections"]]).reshape(-1, 4)
        assert np.abs(boxes - found.boxes).max(initial=0) < 0.01
        assert (tmp_path / "p" / "images" / f"{Path(line['file']).stem}.jpg").is_file()


def test_predict_keeps_pictures_of_equal_names_apart(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (50, 50)).save(tmp_path / name / "same.png")
    folders = tmp_path / "a", tmp_path / "b"
    code, *_ = run(
        capsys, "predict", model, *folders, "--output", tmp_path / "p", "--draw", "--device", "cpu"
    )
    assert code == 0
    assert len(list((tmp_path / "p" / "images").iterdir())) == 2


def test_data_shapes_makes_a_data_set(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = run(
        capsys, "data", "shapes", "--output", tmp_path / "s", "--train", 3, "--val", 2, "--image-size", 96
    )
    assert code == 0
    assert "5 images" in err
    assert len(open_dataset(tmp_path / "s", "train")) == 3


def test_the_demo_does_not_take_images_of_another_version(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    stale = generate_shapes(tmp_path / "demo-shapes-4-0", train=5, val=1, spec=ShapesSpec(image_size=96))
    code, _, err = run(capsys, "demo", "--output", tmp_path / "demo", "--images", 4)
    assert code == 2
    assert f"{stale} holds others" in err
    assert "Remove that folder, or choose another place with --output" in err
    assert not (tmp_path / "demo").exists()


def test_the_demo_uses_its_images_again(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from retinanet.cli.data import Shapes
    from retinanet.errors import TrainingError

    def stop(*_: object) -> None:
        raise TrainingError("far enough")

    monkeypatch.setattr("retinanet.training.run.run_training", stop)
    Shapes(output=str(tmp_path / "demo-shapes-4-0"), train=4).run()
    capsys.readouterr()
    _, _, err = run(capsys, "demo", "--output", tmp_path / "demo", "--images", 4)
    assert "Drawing" not in err
    assert "validating on 300 unseen images" in err
    assert "far enough" in err


@pytest.mark.parametrize(
    ("called", "again"),
    [
        ("env/bin/retinanet", "env/bin/retinanet"),
        ("src/retinanet/__main__.py", f"{sys.executable} -m retinanet"),
    ],
)
def test_the_demo_ends_with_a_command_to_go_on_with(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    called: str,
    again: str,
) -> None:
    from retinanet.cli.data import Shapes

    ended = SimpleNamespace(validation=SimpleNamespace(ap=0.5))
    monkeypatch.setattr("retinanet.training.run.run_training", lambda *_: ended)
    monkeypatch.setattr(sys, "argv", [called])
    images = tmp_path / "demo-shapes-4-0"
    Shapes(output=str(images), train=4).run()
    code, _, err = run(capsys, "demo", "--output", tmp_path / "demo", "--images", 4)
    assert code == 0
    assert err.endswith(f"Now try: {again} predict {tmp_path / 'demo'} {images / 'images' / 'val'} --draw\n")


def test_doctor_names_versions(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    assert "torch" in out
    assert "no problems found" in out
    _, out, _ = run(capsys, "doctor", "--json")
    assert json.loads(out)["versions"]["retinanet"] == retinanet.__version__


def test_doctor_names_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib.metadata import PackageNotFoundError, version

    def without_timm(package: str) -> str:
        if package == "timm":
            raise PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr("retinanet.cli.doctor.version", without_timm)
    code, out, _ = run(capsys, "doctor")
    assert code == 1
    assert "problem: timm is missing; run: pip install -U retinanet" in out


def wrong(data: Path, model: Path, tmp: Path) -> list[tuple[list[object], str]]:
    (tmp / "empty").mkdir(exist_ok=True)
    (tmp / "full").mkdir(exist_ok=True)
    (tmp / "full" / "x").write_text("")
    (tmp / "bad.yaml").write_text("batchsize: 3")
    (tmp / "bad.pth").write_bytes(b"junk")
    (tmp / "results.json").write_text('[{"image_id": 1}]')
    train = ["train", data, "--device", "cpu", "--pretrained", "none", "--output", tmp / "never"]
    return [
        (["train", tmp / "nowhere"], "nowhere"),
        (["train", tmp / "empty"], "empty"),
        ([*train, "--lr", "-1"], "--lr needs a number above 0; got -1.0"),
        ([*train, "--batch-size", "0"], "--batch-size needs 1 or more; got 0"),
        ([*train, "--backbone", "resnet19"], "got 'resnet19'. Did you mean 'resnet18'?"),
        ([*train, "--backbone", "vit_tiny_patch16_224"], "feature maps at strides 8, 16 and 32"),
        ([*train, "--freeze", "stem"], "--freeze stem keeps a stage as loaded"),
        ([*train, "--batch-sise", "4"], "train has no option --batch-sise. Did you mean '--batch-size'?"),
        ([*train, "--xyzzy"], "train has no option --xyzzy. See `retinanet train --help`"),
        ([*train, "--lr", "fast"], "--lr needs a number; got 'fast'"),
        ([*train, "--steps=1.5"], "--steps needs a whole number; got '1.5'"),
        ([*train, "--optimizer", "sgdd"], "one of sgd, adamw, muon; got 'sgdd'. Did you mean 'sgd'?"),
        ([*train, "--lr"], "--lr needs a number; nothing was given"),
        ([*train, "--lr", "--seed", "3"], "--lr needs a number; nothing was given"),
        ([*train, "--dry-run=yes"], "--dry-run takes no value; got 'yes'"),
        ([*train, tmp / "more"], f"train takes no more than DATA; got '{tmp / 'more'}' as well"),
        (["train", "--lr", "1"], "train needs DATA; none was given. See `retinanet train --help`"),
        ([*train, "--device", "toaster"], "--device needs auto, cpu, cuda"),
        ([*train, "--config", tmp / "bad.yaml"], "Did you mean 'batch_size'?"),
        ([*train, "--config"], "--config needs a file"),
        (
            [*train, "--config", tmp / "no.yaml"],
            f"--config needs a YAML file; {tmp / 'no.yaml'} does not exist",
        ),
        ([*train, "--config", tmp / "full"], f"--config {tmp / 'full'} cannot be read: Is a directory"),
        (
            ["train", data, "--pretrained", "none", "--backbone", "resnet18", "--output", tmp / "full"],
            "is not empty",
        ),
        (
            [*train, "--output", data / "runs"],
            f"--output needs a place outside the data folder {data}; got {data / 'runs'}. Choose another",
        ),
        (["evaluate", tmp / "bad.pth", data], "cannot be read as one"),
        (["evaluate", tmp / "empty", data], "has none of them"),
        (["evaluate"], "evaluate MODEL DATA is required; MODEL and DATA are missing"),
        (["evaluate", model], f"evaluate MODEL DATA is required; DATA is missing, {model} is the MODEL"),
        (["evaluate", data], f"evaluate MODEL DATA is required; MODEL is missing, {data} is the DATA"),
        (["evaluate", model, data, "more"], f"is required; got 3 paths: {model}, {data}, more"),
        (
            ["evaluate", "--detections", tmp / "results.json"],
            "--detections FILE DATA is required; DATA is missing",
        ),
        (["evaluate", model, data, "--split", "vla"], "vla"),
        (["evaluate", model, data, "--max-detections", "0"], "--max-detections needs 1 or more"),
        (["evaluate", model, data, "--output", tmp / "full"], "is not empty"),
        (["evaluate", model, data, "--output", data / "new"], "needs a place outside the data folder"),
        (["evaluate", "--detections", tmp / "results.json", data], "results.json"),
        (["evaluate", "--detections", tmp / "none.json", data], "none.json"),
        (
            ["evaluate", "--detections", tmp / "none.json", data, "--batch-size", "2"],
            "--detections runs none",
        ),
        (["predict"], "predict needs MODEL; none was given. See `retinanet predict --help`"),
        (["predict", model, tmp / "nowhere.jpg"], "nowhere.jpg does not exist"),
        (["predict", model, tmp / "empty"], "holds none"),
        (["predict", model, tmp, "--threshold", "2"], "--threshold needs a number in [0, 1]; got 2.0"),
        (["predict", tmp / "nomodel", data / "images" / "val"], "does not exist"),
        (
            ["data"],
            "a command is required: check, view, anchors, convert, shapes; none was given. See `retinanet data --help`",
        ),
        (["data", "circles"], "a command is required: check, view, anchors, convert, shapes; got 'circles'"),
        (
            ["data", "shapes"],
            "data shapes needs --output; none was given. See `retinanet data shapes --help`",
        ),
        (["data", "shapes", "--output", tmp / "full"], "--output needs a new folder"),
        (
            ["data", "shapes", "--output", tmp / "s", "--train", "-1"],
            "--train needs 0 or more images; got -1",
        ),
        (["demo", "--output", tmp / "full"], "--output needs a new folder"),
        (["doctor", "me"], "doctor takes options only; got 'me' as well"),
        (
            ["tran", data],
            "demo, train, evaluate, predict, data, paper, bench, doctor; got 'tran'. Did you mean 'train'?",
        ),
        (
            ["--foo"],
            "a command is required: demo, train, evaluate, predict, data, paper, bench, doctor; got '--foo'",
        ),
    ]


WRONG = 52


@pytest.mark.parametrize("number", range(WRONG))
def test_a_wrong_request_gets_one_message_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    cases = wrong(data, model, tmp_path)
    assert len(cases) == WRONG
    arguments, message = cases[number]
    code, out, err = run(capsys, *arguments)
    said = " ".join((out + err).split())
    assert code == 2, said
    assert message in said
    # Before it there may be a summary of the data; after it there is nothing.
    assert [line.startswith("retinanet: ") for line in err.splitlines()].index(True) == len(
        err.splitlines()
    ) - 1
    assert out == ""
    assert "Errno" not in said
    assert not (tmp_path / "never").exists()
    assert not (tmp_path / "runs").exists()


def test_a_full_disk_gets_one_message(
    capsys: pytest.CaptureFixture[str],
    data: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "detections.json"))

    monkeypatch.setattr("retinanet.evaluation.write_results", full)
    code, _, err = run(capsys, "evaluate", model, data, "--output", tmp_path / "full", "--device", "cpu")
    assert code == 2
    assert "No space left on device" in err
    assert "detections.json" in err


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    from retinanet.errors import CheckpointError

    with pytest.raises(CheckpointError):
        main(["evaluate", str(tmp_path / "no"), str(tmp_path), "--debug"])


def test_options_of_a_config_file_are_defaults_that_the_command_line_wins_over(tmp_path: Path) -> None:
    from retinanet.cli.main import parse
    from retinanet.cli.train import Train

    (tmp_path / "c.yaml").write_text("data: somewhere\nbatch_size: 3\nlr: 0.5\n")
    command = parse(["train", "--config", str(tmp_path / "c.yaml"), "--lr", "0.25"])
    assert isinstance(command, Train)
    assert (command.data, command.batch_size, command.lr) == ("somewhere", 3, 0.25)


@pytest.mark.parametrize("length", [["--epochs", "2"], ["--time=5m"], ["--steps", "7"]])
def test_a_length_on_the_command_line_replaces_the_files(tmp_path: Path, length: list[str]) -> None:
    from retinanet.cli.main import parse

    (tmp_path / "c.yaml").write_text("data: somewhere\nsteps: 300\n")
    command = parse(["train", "--config", str(tmp_path / "c.yaml"), *length])
    given = {name: getattr(command, name) for name in ("epochs", "steps", "time")}
    assert sum(value is not None for value in given.values()) == 1
    assert given["steps"] in (None, 7)


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version") == (0, f"retinanet {retinanet.__version__}\n", "")


def test_options_may_stand_anywhere(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from retinanet.cli.evaluate import Evaluate
    from retinanet.cli.main import parse
    from retinanet.cli.predict import Predict

    judged = parse(["evaluate", "m", "--split=test", "d", "--json"])
    assert isinstance(judged, Evaluate)
    assert (judged.inputs, judged.split, judged.json) == (("m", "d"), "test", True)
    found = parse(["predict", "--draw", "m", "a.jpg", "--batch_size", "2", "b.jpg", "--", "--draw"])
    assert isinstance(found, Predict)
    assert (found.model, found.paths, found.batch_size) == ("m", ("a.jpg", "b.jpg", "--draw"), 2)


def test_a_value_may_begin_with_a_hyphen() -> None:
    from retinanet.cli.main import parse
    from retinanet.cli.train import Train

    command = parse(["train", "d", "--output", "-x", "--backbone=--y"])
    assert isinstance(command, Train)
    assert (command.output, command.backbone) == ("-x", "--y")


@pytest.mark.parametrize(
    "command", ["train", "evaluate", "predict", "demo", "data check", "data anchors", "data shapes", "doctor"]
)
def test_help_shows_no_default_that_says_nothing(capsys: pytest.CaptureFixture[str], command: str) -> None:
    _, out, _ = run(capsys, *command.split(), "--help")
    said = " ".join(out.replace("│", " ").split())
    for noise in ("None", "(default: )", "(default: False)"):
        assert noise not in said


def test_help_of_train_names_every_option_and_its_default(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    _, out, _ = run(capsys, "train", "--help")
    said = " ".join(out.replace("│", " ").split())
    assert "--config FILE" in said
    assert "--debug" in said
    assert (
        "--lr FLOAT Learning rate for 16 images a step; scaled to the batch size, for AdamW and Muon by its root. "
        "(default: the recipe's)"
    ) in said
    assert "--backbone NAME" in said
    assert "with --weights, the model's. (default: resnet50)" in said
    (tmp_path / "c.yaml").write_text("lr: 0.5\n")
    _, out, _ = run(capsys, "train", "--config", tmp_path / "c.yaml", "--help")
    assert "(default: 0.5)" in " ".join(out.replace("│", " ").split())


@pytest.mark.parametrize(
    "command",
    ["", "train", "evaluate", "predict", "demo", "data check", "data anchors", "data shapes", "doctor"],
)
def test_help_exits_with_0(capsys: pytest.CaptureFixture[str], command: str) -> None:
    code, out, _ = run(capsys, *command.split(), "--help")
    assert code == 0
    assert "usage" in out


def loaded_after(statement: str) -> set[str]:
    script = f"import sys\n{statement}\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=os.environ
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import retinanet",
        "import retinanet.records, retinanet.images, retinanet.drawing, retinanet.errors",
        "import retinanet.data, retinanet.evaluation, retinanet.report.page",
        "from retinanet.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass",
        "from retinanet.cli import main\ntry: main(['train', '--help'])\nexcept SystemExit: pass",
    ],
)
def test_no_torch_is_loaded_before_it_is_needed(statement: str) -> None:
    assert "torch" not in loaded_after(statement)


def test_the_facade_names_what_it_promises() -> None:
    for name in retinanet.__all__:
        assert getattr(retinanet, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = retinanet.nonsense


def test_the_names_that_other_projects_rely_on() -> None:
    from retinanet.boxes import nms
    from retinanet.inference import post_process
    from retinanet.losses import sigmoid_focal_loss
    from retinanet.matching import match_anchors

    assert all(callable(one) for one in (nms, post_process, sigmoid_focal_loss, match_anchors))
