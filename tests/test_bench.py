"""`retinanet bench`: contestants that agree are timed in turns; rows say what was found."""

import json

import pytest
import torch

from retinanet.bench import loss, matching, memory, nms, postprocess, step
from retinanet.bench.items import Settings, run
from retinanet.bench.measuring import Contest, Row, machine, measure, table
from retinanet.cli import main

TINY = step.StepCase("resnet18", side=128, batch_size=1, boxes=3)


def result_of(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    return end.value.code


@pytest.mark.parametrize(
    "contests",
    [
        lambda: loss.contests(side=128, classes=5, count=4, compiled=False),
        lambda: matching.contests(side=128, counts=(3, 20)),
        lambda: nms.contests(side=400, counts=(300,)),
        lambda: postprocess.contests(side=128, classes=5),
        lambda: step.contests([TINY]),
    ],
)
def test_outputs_agree(contests):
    found = list(contests())
    assert found
    for contest in found:
        assert contest.equal == {"torchvision": True}
        assert contest.ours() is not None


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
    ],
)
def test_wrong_requests(arguments, message, capsys):
    assert result_of(*arguments) == 2
    assert message in capsys.readouterr().err


def test_profile_names_the_convolutions():
    assert "conv" in step.profile(TINY)


def test_memory_is_measured_in_a_process_of_its_own():
    (row,) = memory.rows([TINY])
    assert row.unit == "MiB"
    assert row.ours > 10
    assert row.theirs > 10


def test_the_machine_is_described():
    facts = machine()
    assert facts["threads"] == torch.get_num_threads()
    assert "torch" in facts["versions"]


def test_every_item_has_contests():
    with pytest.raises(KeyError):
        list(run(["speed"], Settings()))
    assert all(row.item == "nms" for row in run(["nms"], Settings(repeats=1, seconds=0)))
