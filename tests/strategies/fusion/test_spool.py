"""Tensors of many clients in a file, and files that are used again."""

import gc
from itertools import pairwise, product
from tempfile import TemporaryFile

import torch

from fedbasin.strategies.fusion import spool
from fedbasin.strategies.fusion.spool import SpoolFiles


def test_tensors_come_back_from_a_spool_bit_by_bit_in_pieces_of_bounded_length(monkeypatch):
    monkeypatch.setattr(spool, "_PIECE", 6)
    kept = SpoolFiles().open()
    for dtype, shape in product((torch.float32, torch.bfloat16, torch.int64, torch.bool), ((2, 5), (), (0, 2))):
        tensors = [torch.randint(2, shape).to(dtype) for _ in range(3)]
        places = [kept.write(tensor) for tensor in tensors]
        assert all(torch.equal(kept.read(p), t) for p, t in zip(places, tensors, strict=True))
        pieces = list(kept.pieces(places))
        assert all(values.numel() <= 6 for _, values in pieces)
        assert all(a.stop == b.start for (a, _), (b, _) in pairwise(pieces))
        together = [values for _, values in pieces] or [torch.empty(3, 0, dtype=dtype)]
        assert torch.equal(torch.cat(together, 1), torch.stack(tensors).reshape(3, -1))


class Files:
    """Counts what is opened."""

    def __init__(self):
        self.made = []
        self.files = SpoolFiles(self.make)

    def make(self):
        self.made.append(TemporaryFile())  # noqa: SIM115 - the spool closes it
        return self.made[-1]


def test_a_file_is_used_again_by_the_next_spool_which_overwrites_it():
    files = Files()
    for value in range(3):
        kept = files.files.open()
        place = kept.write(torch.full((5,), value))
        assert torch.equal(kept.read(place), torch.full((5,), value))
        del kept
    assert len(files.made) == 1


def test_a_file_is_not_used_again_while_a_tensor_that_was_read_from_it_exists():
    files = Files()
    kept = files.files.open()
    tensor = kept.read(kept.write(torch.arange(5.0)))[1:3]
    del kept
    gc.collect()
    files.files.open().write(torch.zeros(5))
    assert torch.equal(tensor, torch.tensor([1.0, 2.0]))
    assert len(files.made) == 2
    del tensor
    files.files.open()
    assert len(files.made) == 2


def test_what_is_written_into_a_tensor_does_not_change_the_file():
    kept = SpoolFiles().open()
    place = kept.write(torch.zeros(5))
    kept.read(place).fill_(7.0)
    assert torch.equal(kept.read(place), torch.zeros(5))


def test_all_files_are_closed_when_nothing_uses_them():
    files = Files()
    kept = files.files.open()
    del files.files
    assert not files.made[0].closed
    del kept
    assert files.made[0].closed
