"""Adapters in a bank of their own, without an engine: how large they are, and how to wait for them."""

import time

import torch

from shared.specs import AdapterShare
from tests.worker.inference.conftest import AdapterShelf
from worker.base_model import BaseModel
from worker.inference.adapters import Readiness, ResidentAdapters, Shares
from worker.lora.bank import AdapterBank
from worker.lora.format import read_adapter


def bank_of(base: BaseModel) -> AdapterBank:
    """A bank over the model, which computes as before once the bank is closed."""
    return AdapterBank(base.model, lambda: base.model(torch.zeros(1, 2, dtype=torch.long)))


def size_bytes(base: BaseModel, shelf: AdapterShelf, name: str) -> int:
    """What an adapter takes in the model's memory."""
    bank = bank_of(base)
    try:
        return bank.pack(read_adapter(shelf.directory / name), name=name).size_bytes
    finally:
        bank.close()


def shares(*names: str) -> Shares:
    return [AdapterShare(version_id=name) for name in names]


def acquire(adapters: ResidentAdapters, *names: str) -> Readiness:
    """Ask until it is no longer being read."""
    for _ in range(1000):
        readiness = adapters.acquire(shares(*names))
        if readiness is not Readiness.LOADING:
            return readiness
        time.sleep(0.01)
    raise AssertionError("never read")
