import pytest

from foveate.models.random import random_llava

LAYERS, HEADS, FFN = 4, 4, 96


@pytest.fixture(scope="session", params=[4, 2, 1], ids=["mha", "gqa", "mqa"])
def model(request):
    return random_llava(layers=LAYERS, heads=HEADS, kv_heads=request.param, ffn=FFN)


@pytest.fixture(scope="session")
def mha():
    return random_llava(layers=LAYERS, heads=HEADS, ffn=FFN)


@pytest.fixture(scope="session")
def gqa():
    return random_llava(layers=LAYERS, heads=HEADS, kv_heads=2, ffn=FFN)
