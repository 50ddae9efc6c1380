"""Swaps of weights from several threads, and swaps that fail on the way in."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from torch import nn

import polyak
from polyak._model import refuse_swapped
from polyak._swap import Swap, copy_into
from polyak.errors import StructureError, SwapError


def test_of_two_swaps_that_were_begun_one_goes_in():
    weight = torch.tensor([1.0, 2.0])
    first, second = Swap([weight]), Swap([weight])
    first.put_in([torch.tensor([5.0, 6.0])])
    with pytest.raises(SwapError, match="holds averaged weights already"):
        second.put_in([torch.tensor([7.0, 8.0])])
    assert not second.active
    assert weight.tolist() == [5.0, 6.0]
    with pytest.raises(SwapError):
        refuse_swapped([weight])
    first.undo()
    assert weight.tolist() == [1.0, 2.0]
    second.put_in([torch.tensor([7.0, 8.0])])
    second.undo()
    assert weight.tolist() == [1.0, 2.0]


def test_what_does_not_fit_is_refused_and_one_that_never_went_in_undoes_nothing():
    weight = torch.tensor([1.0, 2.0])
    swap = Swap([weight])
    assert not swap.active
    with pytest.raises(StructureError, match=r"shape \(1,\) does not go into \(2,\)"):
        swap.put_in([torch.tensor([5.0])])
    with pytest.raises(ValueError):
        copy_into([weight, weight], [torch.tensor([5.0, 6.0])])
    assert not swap.active and weight.tolist() == [1.0, 2.0]


def test_a_backup_that_does_not_fit_leaves_everything(monkeypatch):
    weight = torch.tensor([1.0, 2.0])
    swap = Swap([weight])

    def full(tensor, device):
        raise torch.OutOfMemoryError("no room for the backup")

    monkeypatch.setattr("polyak._swap._copies", full)
    with pytest.raises(torch.OutOfMemoryError):
        swap.put_in([torch.tensor([5.0, 6.0])])
    assert not swap.active and weight.tolist() == [1.0, 2.0]
    refuse_swapped([weight])


def test_a_model_that_is_dropped_while_swapped_is_let_go():
    model = nn.Linear(2, 1)
    average = polyak.Average(model, polyak.Uniform())
    average.update()
    average.swap_in()
    gone = weakref.ref(model.weight)
    del model, average
    gc.collect()
    assert gone() is None


def test_models_trained_in_several_threads_swap_on_their_own():
    failures = []

    def train(seed):
        try:
            generator = torch.Generator().manual_seed(seed)
            for _ in range(10):  # models come and go while others are swapped
                model = nn.Linear(4, 4)
                average = polyak.Average(model, polyak.Uniform())
                for _ in range(20):
                    model.weight.data = torch.randn(4, 4, generator=generator)
                    average.update()
                    live = model.weight.detach().clone()
                    with average.applied():
                        assert not torch.equal(model.weight, live) or average.n_averaged == 1
                    assert torch.equal(model.weight, live)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=train, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not failures
