"""Checkpoints: what they keep, with other numbers of processes too; those that are broken, of another model, or cannot be
written: one line that names them; and that reading one runs nothing that is in it."""

import json
import pickle
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from sidrec_torchrec.errors import SidrecError
from sidrec_torchrec.files import read_json, write_json
from sidrec_torchrec.training import checkpoints as checkpoints_module
from sidrec_torchrec.training import storage
from sidrec_torchrec.training.checkpoints import LAST, Checkpoints
from sidrec_torchrec.training.group import process_group


def state(rows: int, value: float = 0.0) -> dict:
    return {"model": {"weight": torch.full((rows,), value)}, "place": "start"}


EXACT = {
    "f64": torch.rand(3, 2, dtype=torch.float64),
    "f16": torch.rand(5).half(),
    "bf16": torch.rand(2, 3).bfloat16(),
    "i64": torch.tensor([-1, 2**62]),
    "i16": torch.tensor([[-3], [4]], dtype=torch.int16),
    "u8": torch.arange(7, dtype=torch.uint8),
    "bool": torch.tensor([True, False]),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
    "a view": torch.arange(12.0).reshape(3, 4).T,
    "not finite": torch.tensor([torch.nan, torch.inf]),
}


def test_every_kind_of_value_is_kept_exactly(tmp_path):
    values = {"betas": (0.9, 0.95), "rate": 1e-3, "none": None, "on": True, "text": "a\u00e9", "group": {"step": 3}}
    with process_group():
        Checkpoints(tmp_path).save(LAST, {"tensors": EXACT, "values": values})
        held = {
            "tensors": {name: torch.zeros_like(x) for name, x in EXACT.items()},
            "values": {"betas": (0.0, 0.0), "rate": 0.0, "none": 1, "on": False, "text": "", "group": {"step": 0}},
        }
        Checkpoints(tmp_path).load(LAST, held)
    for name, tensor in EXACT.items():
        assert held["tensors"][name].dtype == tensor.dtype
        torch.testing.assert_close(held["tensors"][name], tensor, rtol=0, atol=0, equal_nan=True)
    assert held["values"] == values


def test_files_are_safetensors(tmp_path):
    """By the format's own words: eight bytes of length, a header of JSON, and the tensors' bytes one after another."""
    with process_group():
        Checkpoints(tmp_path).save(LAST, {"a": EXACT["f64"], "b": EXACT["i16"]})
    content = (tmp_path / LAST / "process-0.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    assert {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()} == {
        "a": ("F64", [3, 2]),
        "b": ("I16", [2, 1]),
    }
    places = sorted(entry["data_offsets"] for entry in header.values())
    assert places[0][0] == 0 and places[0][1] == places[1][0] and places[1][1] == len(data)
    start, end = header["a"]["data_offsets"]
    assert np.frombuffer(data[start:end]).reshape(3, 2).tolist() == EXACT["f64"].tolist()


TABLE = torch.arange(35.0).reshape(7, 5)


def test_any_number_of_processes_reads_what_another_wrote(run_distributed, tmp_path):
    with process_group():
        Checkpoints(tmp_path / "one").save(LAST, {"table": TABLE, "dense": torch.ones(3), "place": "here"})
    assert run_distributed(_write_and_read, 2, tmp_path) == [True, True]
    assert {path.name for path in (tmp_path / "two" / LAST).iterdir()} == {
        "checkpoint.json",
        "process-0.safetensors",
        "process-1.safetensors",
    }
    held = {"table": torch.zeros(7, 5), "dense": torch.zeros(3), "place": ""}
    with process_group():
        Checkpoints(tmp_path / "two").load(LAST, held)
    assert torch.equal(held["table"], TABLE) and held["place"] == "here" and torch.equal(held["dense"], torch.ones(3))


def test_no_file_of_another_number_of_processes_stays(tmp_path):
    (tmp_path / LAST).mkdir()
    (tmp_path / LAST / "process-3.safetensors").touch()  # of a job of four, killed while it wrote
    with process_group():
        Checkpoints(tmp_path).save(LAST, state(3))
    assert sorted(path.name for path in (tmp_path / LAST).iterdir()) == ["checkpoint.json", "process-0.safetensors"]


def test_the_checkpoint_before_is_whole_until_the_new_one_is(tmp_path, monkeypatch):
    """Killed at any moment of saving: the index, which is written last, names files that nobody has touched since."""
    with process_group():
        checkpoints = Checkpoints(tmp_path)
        for number in range(1, 4):
            checkpoints.save(LAST, state(10, float(number)))
            before = {path.name: path.read_bytes() for path in (tmp_path / LAST).iterdir()}
            assert len(before) == 2
            monkeypatch.setattr(storage, "write_json", _killed)
            monkeypatch.setattr(
                checkpoints_module, "remove_others", lambda folder: None
            )  # a killed process tidies nothing
            with pytest.raises(SidrecError, match="KeyboardInterrupt"):
                checkpoints.save(LAST, state(10, -1.0))
            monkeypatch.undo()
            after = {path.name: path.read_bytes() for path in (tmp_path / LAST).iterdir()}
            assert before.items() <= after.items() and len(after) == 3
            held = state(10)
            checkpoints.load(LAST, held)
            assert (held["model"]["weight"] == number).all()


def _killed(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def _state(table: torch.Tensor, split: int, place: str) -> dict:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    dense = distribute_tensor(torch.full((3,), float(place == "here")), mesh, [Replicate()])
    return {"table": distribute_tensor(table, mesh, [Shard(split)]), "dense": dense, "place": place}


def _write_and_read(folder: Path) -> bool:
    Checkpoints(folder / "two").save(LAST, _state(TABLE, 0, "here"))
    return _read(folder / "two") and _read(folder / "one")


def _read(folder: Path) -> bool:
    held = _state(torch.zeros(7, 5), 1, "")  # split along the other axis
    Checkpoints(folder).load(LAST, held)
    assert isinstance(held["table"], DTensor)
    return torch.equal(held["table"].full_tensor(), TABLE) and held["place"] == "here"


def test_a_flipped_bit_is_seen(tmp_path):
    with process_group():
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(LAST, state(100, 1.0))
        generator = np.random.default_rng(0)
        for path in (tmp_path / LAST).iterdir():
            content = path.read_bytes()
            for place in generator.integers(0, 8 * len(content), 40):
                flipped = bytearray(content)
                flipped[place // 8] ^= 1 << place % 8
                path.write_bytes(flipped)
                held = state(100)
                try:
                    checkpoints.load(LAST, held)
                except SidrecError as error:
                    assert "last: a broken checkpoint" in str(error)
                else:  # a header that only other tools read
                    assert path.suffix == ".safetensors" and (held["model"]["weight"] == 1).all()
            path.write_bytes(content)


class Payload:
    """Its pickle touches a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_that_is_in_a_foreign_one_runs(tmp_path):
    touched, payload = tmp_path / "touched", pickle.dumps(Payload(tmp_path / "touched"))
    pickle.loads(payload)
    touched.unlink()  # it would
    with process_group():
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(LAST, state(10))
        for path in (tmp_path / LAST).iterdir():
            content = path.read_bytes()
            path.write_bytes(payload)
            with pytest.raises(SidrecError, match="a broken checkpoint"):
                checkpoints.load(LAST, state(10))
            path.write_bytes(content)
        (tmp_path / LAST / ".metadata").write_bytes(payload)  # beside its own index, which is read
        checkpoints.load(LAST, state(10))
        (tmp_path / LAST / "checkpoint.json").unlink()
        dcp.save({"model": {"weight": torch.zeros(10)}, "place": Payload(touched)}, checkpoint_id=tmp_path / "old")
        for name in (LAST, "old"):  # as torch writes them, with an index that is a pickle
            assert not checkpoints.has(name)
            for read in (
                lambda name=name: checkpoints.load(name, state(10)),
                lambda name=name: checkpoints.names(name),
            ):
                with pytest.raises(SidrecError, match="a broken checkpoint"):
                    read()
    assert not touched.exists()


def test_a_foreign_index_names_no_file_elsewhere(tmp_path):
    with process_group():
        checkpoints = Checkpoints(tmp_path / "checkpoints")
        checkpoints.save(LAST, state(10))
        path = tmp_path / "checkpoints" / LAST / "checkpoint.json"
        (tmp_path / "secret").write_bytes(bytes(1000))
        index = read_json(path)
        index["entries"]["model.weight"]["chunks"][0]["file"] = "../../secret"
        write_json(path, index, sealed=True)
        with pytest.raises(SidrecError, match="'../../secret' is no file of tensors"):
            checkpoints.load(LAST, state(10))


def test_a_broken_checkpoint_is_named(tmp_path):
    with process_group():
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(LAST, state(100))
        with pytest.raises(SidrecError, match=r"last: a broken checkpoint, or of another model \(.*; remove "):
            checkpoints.load(LAST, state(99))
        for path in (tmp_path / LAST).iterdir():
            content = path.read_bytes()
            path.write_bytes(content[: len(content) // 2])
            with pytest.raises(SidrecError, match="last: a broken checkpoint, or of another model"):
                checkpoints.load(LAST, state(100))
            path.write_bytes(content)
        checkpoints.load(LAST, state(100))


def test_on_a_full_disk_the_checkpoint_before_stays(tmp_path):
    with process_group():
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(LAST, state(100, 1.0))
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        try:
            with pytest.raises(SidrecError, match="last: cannot be written"):
                checkpoints.save(LAST, state(100_000, 2.0))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        held = state(100)
        checkpoints.load(LAST, held)
        assert (held["model"]["weight"] == 1).all()
        checkpoints.save(LAST, state(100_000, 2.0))  # over what was left of the failed one
        checkpoints.load(LAST, state(100_000))
