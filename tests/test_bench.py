"""`retinanet bench`: contestants that agree are timed in turns; rows say what was found."""

import json
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.ops import batched_nms, sigmoid_focal_loss

from retinanet import kernels
from retinanet.anchors import CPU, anchors_of_image
from retinanet.bench import (
    checkpointing,
    convolution,
    data,
    inputs,
    loss,
    matching,
    measuring,
    memory,
    nms,
    postprocess,
    step,
    utilisation,
)
from retinanet.bench.items import Settings, run
from retinanet.bench.measuring import Contest, Row, machine, measure, table
from retinanet.cli import main
from retinanet.cli.bench import ALL
from retinanet.errors import ConfigError
from retinanet.model.convolution import Convolution3x3

TINY = step.StepCase("resnet18", side=64, batch_size=1, boxes=3)


def result_of(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    return end.value.code


@pytest.fixture(autouse=True)
def no_other_peers(monkeypatch):
    """Peers that may be installed here are asked for by the tests that are about them."""
    for name in ("fvcore", "cv2"):
        monkeypatch.setitem(sys.modules, name, None)


SMALL = {
    "loss": lambda device: loss.contests(side=128, classes=5, count=4, compiled=False, device=device),
    "matching": lambda device: matching.contests(side=128, counts=(3, 20), device=device),
    "nms": lambda device: nms.contests(side=400, counts=(300,), device=device),
    "postprocess": lambda device: postprocess.contests(side=128, classes=5, device=device),
    "step": lambda device: step.contests([TINY], device=device),
}
CUDA = torch.device("cuda")
on_cuda = pytest.param(
    CUDA, marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
)


@pytest.mark.parametrize("device", [CPU, on_cuda], ids=str)
@pytest.mark.parametrize("item", SMALL)
def test_outputs_agree(item, device):
    found = list(SMALL[item](device))
    assert found
    for contest in found:
        assert [*contest.equal.values()] == [None if contest.case.endswith(("ATSS", "varifocal")) else True]
        assert [*contest.equal] == [*contest.peers]
        assert contest.ours() is not None


@pytest.mark.parametrize("item", ["loss", "matching", "nms", "postprocess"])
def test_every_input_is_asked_for_on_the_device(item, monkeypatch):
    """Whoever draws an input has to say where; here it is said, and the input drawn on the CPU all the same."""
    module = {"loss": loss, "matching": matching, "nms": nms, "postprocess": postprocess}[item]
    asked = []
    for name in ("levels_of", "anchors_of", "boxes", "labels", "logits", "distinct_scores"):
        draw = getattr(inputs, name)

        def on_cpu(*sizes, device, draw=draw, **options):
            asked.append(device)
            return draw(*sizes, device=CPU, **options)

        monkeypatch.setattr(module, name, on_cpu, raising=False)
    assert list(SMALL[item](CUDA))
    assert set(asked) == {CUDA}


INPUTS = {
    "levels_of": lambda device: inputs.levels_of(64, device=device)[0],
    "anchors_of": lambda device: inputs.anchors_of(64, device=device),
    "boxes": lambda device: inputs.boxes(3, 64, device=device),
    "labels": lambda device: inputs.labels(3, 5, device=device),
    "logits": lambda device: inputs.logits(3, 5, 0.0, 1.0, device=device),
    "distinct_scores": lambda device: inputs.distinct_scores(3, device=device),
    "step's images": lambda device: step.batch_of(TINY, device).images,
    "step's boxes": lambda device: step.batch_of(TINY, device).targets.boxes,
    "step's classes": lambda device: step.batch_of(TINY, device).targets.classes,
}


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_are_on_the_device(name):
    anchors_of_image.cache_clear()
    with FakeTensorMode():  # tensors without values need no device
        assert INPUTS[name](CUDA).device.type == "cuda"
    anchors_of_image.cache_clear()


def test_our_convolution_is_no_farther_from_float64_than_torchs(monkeypatch):
    given = ((8, 13), (16, 16))
    found = list(convolution.contests(given))
    assert [contest.case for contest in found] == [
        "8 to 8 channels, 13 x 13, batch 2",
        "16 to 16 channels, 16 x 16, batch 2",
    ]
    for contest in found:
        assert contest.equal == {"torch": True}
        assert len(contest.ours()) == 4  # the output, and the gradients of images, weight and bias
    fast = kernels.convolve3x3
    monkeypatch.setattr(kernels, "convolve3x3", lambda *given: 1.0001 * fast(*given))
    assert [contest.equal["torch"] for contest in convolution.contests(given)] == [False, False]


def test_our_convolution_is_one_of_the_cpu(monkeypatch):
    assert list(convolution.contests(device=CUDA)) == []
    monkeypatch.setattr(kernels, "available", lambda _: False)
    assert list(convolution.contests(device=CPU)) == []


def test_detectron2s_loss_is_a_peer_where_fvcore_is(monkeypatch):
    """torchvision's function has the same arguments; whether the head around it is right shows in what comes out."""
    package, nn = ModuleType("fvcore"), ModuleType("fvcore.nn")
    nn.sigmoid_focal_loss_jit = sigmoid_focal_loss
    monkeypatch.setitem(sys.modules, "fvcore", package)
    monkeypatch.setitem(sys.modules, "fvcore.nn", nn)
    contest, _ = SMALL["loss"](CPU)
    assert contest.equal == {"torchvision": True, "detectron2's (fvcore)": True}
    nn.sigmoid_focal_loss_jit = lambda *given, **options: 1.01 * sigmoid_focal_loss(*given, **options)
    contest, _ = SMALL["loss"](CPU)
    assert contest.equal == {"torchvision": True, "detectron2's (fvcore)": False}


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:FutureWarning")  # fvcore compiles when it is imported
def test_detectron2s_loss_with_fvcore_itself(monkeypatch):
    monkeypatch.delitem(sys.modules, "fvcore")
    pytest.importorskip("fvcore")
    contest, _ = SMALL["loss"](CPU)
    assert contest.equal == {"torchvision": True, "detectron2's (fvcore)": True}


def nms_of_opencv(boxes, scores, class_ids, score_threshold, nms_threshold):
    """What OpenCV's function does, from its arguments and to its result."""
    x, y, width, height = torch.as_tensor(boxes).float().unbind(1)
    scores = torch.as_tensor(scores)
    assert (scores > score_threshold).all()
    corners = torch.stack([x, y, x + width, y + height], 1)
    return batched_nms(corners, scores, torch.as_tensor(class_ids), nms_threshold).int().numpy()


def test_opencv_is_a_peer_where_it_is(monkeypatch):
    opencv = ModuleType("cv2")
    opencv.dnn = SimpleNamespace(NMSBoxesBatched=nms_of_opencv)
    monkeypatch.setitem(sys.modules, "cv2", opencv)
    found = list(SMALL["nms"](CPU))
    assert [contest.equal for contest in found] == [{"torchvision": True, "opencv": True}] * 2
    opencv.dnn.NMSBoxesBatched = lambda *given: nms_of_opencv(*given)[1:]
    assert [contest.equal["opencv"] for contest in SMALL["nms"](CPU)] == [False] * 2


def test_opencv_itself(monkeypatch):
    monkeypatch.delitem(sys.modules, "cv2")
    pytest.importorskip("cv2")
    for contest in SMALL["nms"](CPU):
        assert contest.equal == {"torchvision": True, "opencv": True}


PEERS_OF_DATA = ("Pillow and NumPy", "torchvision", "torchvision, uint8")


@pytest.mark.parametrize(("side", "of_reference"), [(128, True), (32, None)])
def test_loaders_give_the_same_pixels_on_one_core(side, of_reference):
    threads = torch.get_num_threads()
    used = []
    for contest in data.contests((side,), 3, (96, 64)):
        assert contest.equal == dict.fromkeys(PEERS_OF_DATA, True) | {"torchvision": of_reference}
        assert contest.images == 3
        for call in (contest.ours, *contest.peers.values()):
            batch = call()
            assert batch.shape == (3, 3, side, -(-(side * 96 // 64) // 32) * 32)
        used.append(torch.get_num_threads())
    assert used == [threads]


def test_a_loader_with_other_pixels_is_not_equal(monkeypatch):
    def brighter(files, flipped, frame):
        return data.of_uint8(files, flipped, frame) + 0.001

    monkeypatch.setattr(data, "plain", brighter)
    monkeypatch.setattr(
        data, "reference", lambda files, flipped, frame: data.of_uint8(files, [False] * 3, frame)
    )
    for contest in data.contests((128,), 3, (96, 64)):
        assert contest.equal == {"Pillow and NumPy": False, "torchvision": False, "torchvision, uint8": True}


def test_loaders_are_timed_in_images_a_second():
    row = Row("data", "c", "Pillow and NumPy", 40.0, 100.0, True, images=8)
    assert table([row])[0][3:5] == ("40 ms, 200/s", "100 ms, 80/s")
    said = row.to_json()
    assert (said["ours_images_per_second"], said["peer_images_per_second"]) == (200.0, 80.0)
    contest = Contest("data", "c", lambda: None, {"p": lambda: None}, {}, images=5)
    assert [row.images for row in measure(contest, repeats=1, seconds=60)] == [5]


def test_postprocess_has_work_to_do():
    for contest in postprocess.contests(side=256, classes=20):
        assert len(contest.ours()[0].scores) > 20


def test_contestants_run_in_turns():
    order = []
    contest = Contest(
        "item",
        "case",
        lambda: order.append("ours"),
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")},
        {"a": True},
    )
    rows = measure(contest, repeats=3, seconds=60)
    assert order[3:] == ["ours", "a", "b", "a", "b", "ours", "b", "ours", "a"]  # after a first run of each
    assert [(row.peer, row.equal) for row in rows] == [("a", True), ("b", None)]


def test_a_time_on_cuda_starts_and_ends_with_an_idle_device(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: seen.append(str(device)))
    contest = Contest("i", "c", lambda: seen.append("ours"), {"p": lambda: seen.append("p")}, {})
    measure(contest, repeats=1, seconds=60, device=torch.device("cuda:1"))
    assert seen == ["ours", "p", *("cuda:1", "ours", "cuda:1"), *("cuda:1", "p", "cuda:1")]


def test_a_slow_case_ends_after_three_turns():
    calls = []
    measure(Contest("i", "c", lambda: calls.append(1), {"p": lambda: None}, {}), repeats=50, seconds=0.0)
    assert len(calls) == 1 + 3


def test_a_row_as_json():
    row = Row("nms", "few boxes", "torchvision", 2.0, 5.0, True, 1.5, 4.5)
    assert row.to_json() == {
        "item": "nms",
        "case": "few boxes",
        "peer": "torchvision",
        "ours_ms": 2.0,
        "peer_ms": 5.0,
        "ratio": 2.5,
        "equal": True,
        "ours_min_ms": 1.5,
        "peer_min_ms": 4.5,
    }
    assert "ours_mib" in Row("step", "c", "torchvision", 1, 2, None, unit="MiB").to_json()


def test_a_difference_is_shown_and_ends_with_1(monkeypatch, capsys):
    row = Row("nms", "c", "torchvision", 1.0, 2.0, False)
    assert table([row])[0][-1] == "NO"
    monkeypatch.setattr("retinanet.bench.items.run", lambda *_: iter([row]))
    assert result_of("bench", "nms", "--json") == 1
    assert json.loads(capsys.readouterr().out)["equal"] is False


def test_the_command_prints_json_rows_alone_on_stdout(capsys):
    assert result_of("bench", "nms", "--repeats", "1", "--seconds", "0", "--json") == 0
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert {row["item"] for row in rows} == {"nms"}
    assert all(row["equal"] and row["ours_ms"] > 0 for row in rows)
    assert "torchvision" in err  # the machine and the versions


def test_the_command_prints_a_table(capsys):
    assert result_of("bench", "nms", "--repeats", "1", "--seconds", "0") == 0
    out = capsys.readouterr().out
    assert "1,000 boxes, 80 classes" in out
    assert "ratio" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "speed"], "speed"),
        (["bench", "nms", "--repeats", "0"], "--repeats needs at least 1; got 0"),
        (["bench", "step", "--backbone", "vgg"], "resnet18 and resnet50"),
        (["bench", "step", "--batch-size", "3"], "batches of 2 and 8"),
        (["bench", "nms", "--device", "tpu"], "--device needs auto, cpu, cuda or cuda:N; got 'tpu'"),
    ],
)
def test_wrong_requests(arguments, message, capsys):
    assert result_of(*arguments) == 2
    assert message in capsys.readouterr().err


def test_cuda_without_a_device(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert result_of("bench", "nms", "--device", "cuda") == 2
    said = capsys.readouterr()
    assert said.err.splitlines() == [
        "retinanet: --device cuda needs a CUDA device; torch sees none. Use --device cpu"
    ]
    assert said.out == ""


def test_the_command_hands_its_device_on(monkeypatch, capsys):
    seen = []
    for module in (loss, matching, nms, postprocess, convolution):
        monkeypatch.setattr(module, "contests", lambda *, device: seen.append(device) or iter(()))
    for contests in ("contests", "compiled_contests"):
        monkeypatch.setattr(step, contests, lambda _, *, device: seen.append(device) or iter(()))
    of_the_cpu = ("import", "data", "checkpointing")
    list(run([item for item in ALL if item not in of_the_cpu], Settings(device=CUDA)))
    assert seen == [CUDA] * 7
    monkeypatch.setattr("retinanet.bench.items.run", lambda _, settings: seen.append(settings.device) or ())
    assert result_of("bench", "nms", "--device", "cpu") == 0
    assert seen[-1] == CPU


def test_a_step_with_a_wrong_gradient_is_not_equal():
    wrong = step.our_step(TINY, CPU)
    wrong.network.box_head.last.weight.register_hook(lambda gradient: -gradient)
    assert not step.agree(wrong, step.their_step(TINY, CPU))


def test_the_compiled_step_is_compared_once_a_batch_size(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda network: compiled.append(network) or network)
    monkeypatch.setattr(torch.compiler, "reset", lambda: compiled.append("reset"))
    monkeypatch.setattr(measuring, "require_cpp_compiler", lambda: None)
    found = list(step.compiled_contests([TINY, replace(TINY, boxes=9), replace(TINY, batch_size=2)]))
    assert [contest.case for contest in found] == [str(TINY), str(replace(TINY, batch_size=2))]
    assert [contest.equal for contest in found] == [{"ours compiled": True}] * 2
    # Each forgets what was compiled for another batch size.
    assert [entry == "reset" for entry in compiled] == [True, False] * 2


def test_nothing_is_compiled_without_a_compiler(monkeypatch, caplog):
    def missing() -> None:
        raise ConfigError("--compile needs a C++ compiler")

    monkeypatch.setattr(measuring, "require_cpp_compiler", missing)
    assert list(step.compiled_contests([TINY])) == []
    assert caplog.messages == ["no compiled rows: --compile needs a C++ compiler"]
    contest, _ = loss.contests(side=64, classes=3, count=2)
    assert list(contest.peers) == ["torchvision"]


@pytest.mark.parametrize("more", [["--json"], ["nms"], ["step", "nms"]])
def test_the_profile_refuses_what_it_would_leave_out(more, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "--profile", *more])
    assert (
        "--profile prints the parts of bench step; leave out --json and other items"
        in capsys.readouterr().err
    )


def test_profile_names_the_convolutions_and_the_utilisation():
    said = step.profile(TINY, rows=1000)
    assert "conv" in said
    assert "match_anchors" in said
    assert "a step in" in said
    assert "GFLOP/s that a matrix product reaches" in said


@pytest.mark.parametrize("of_images", [True, False])
def test_flops_are_those_of_the_direct_convolution(of_images):
    """Whatever computes it: torch, or Winograd's algorithm with fewer products."""
    ours = Convolution3x3(96, 100, 3, padding=1).to(memory_format=torch.channels_last)
    torchs = torch.nn.Conv2d(96, 100, 3, padding=1).to(memory_format=torch.channels_last)
    images = torch.randn(2, 96, 17, 16).to(memory_format=torch.channels_last).requires_grad_(of_images)
    found = [utilisation.flops_of(lambda of=of: of(images).sum().backward()) for of in (ours, torchs)]
    forward = 2 * (2 * 17 * 16) * (96 * 100 * 9)
    assert found == [forward * (2 + of_images)] * 2


def test_a_steps_flops_are_those_of_its_network(monkeypatch):
    found = utilisation.flops_of(step.our_step(TINY, CPU))
    monkeypatch.setattr(Convolution3x3, "_has_fast_path", lambda *_: False)
    assert found == utilisation.flops_of(step.our_step(TINY, CPU)) > 1e9


def test_the_matrix_rate(monkeypatch):
    monkeypatch.setitem(utilisation.SIDES, "cpu", 100)
    monkeypatch.setattr(utilisation, "seconds_of", lambda *_: 1e-3)
    assert utilisation.matrix_rate(CPU, torch.float32) == pytest.approx(2e9)
    assert "3 TFLOP a step in 2 s: 1.5 TFLOP/s, 75 % of the 2 TFLOP/s" in str(
        utilisation.Utilisation(3 * 10**12, 2.0, 2e12)
    )


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own():
    (row,) = memory.rows([TINY])
    assert row.unit == "MiB"
    assert row.ours > 10
    assert row.theirs > 10


def test_checkpointing_is_timed_in_turns(monkeypatch):
    asked = []

    def in_process(call, build, case, *steps):
        asked.append(build)
        if call is checkpointing._equal:
            return call(build, case)
        first = build is memory.ours
        return (300.0 if first else 150.0), ([9e3, 9e3, 1e3, 2e3] if first else [9e3, 9e3, 2e3, 3e3])

    monkeypatch.setattr(checkpointing, "in_process", in_process)
    monkeypatch.setattr(checkpointing, "restart_peak", lambda: True)
    time, peak = checkpointing.rows([TINY], turns=2)
    assert asked == [checkpointing.checkpointed, *[memory.ours, checkpointing.checkpointed] * 2]
    assert (time.ours, time.theirs, time.equal, time.unit) == (1500, 2500, True, "ms")
    assert (peak.ours, peak.theirs, peak.equal, peak.unit) == (300, 150, None, "MiB")
    monkeypatch.setattr(checkpointing, "restart_peak", lambda: False)  # another system than Linux
    assert list(checkpointing.rows([TINY], turns=1)) == []


def test_the_machine_is_described():
    facts = machine()
    assert facts["threads"] == torch.get_num_threads()
    assert "torch" in facts["versions"]


def test_every_item_has_contests():
    with pytest.raises(KeyError):
        list(run(["speed"], Settings()))
    assert all(row.item == "nms" for row in run(["nms"], Settings(repeats=1, seconds=0)))
