"""Pipelines as text and as YAML."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate.errors import PassError
from foveate.passes import CutVisual, DropVisualHeads, DropVisualNeurons, FastV, RandomPrune
from foveate.passes.pipeline import parse_pipeline, pipeline_text, recipes, resolve

LAYERS = st.integers(0, 99)
KEEP = st.floats(0, 1, exclude_min=True)
SEED = st.integers(0, 2**31 - 1)
PASS = st.one_of(
    st.builds(CutVisual, LAYERS),
    st.builds(DropVisualHeads, keep=st.integers(0, 64), from_layer=LAYERS),
    st.builds(DropVisualHeads, mask=st.lists(st.lists(st.booleans(), min_size=2, max_size=2), min_size=1, max_size=3)),
    st.builds(
        DropVisualHeads,
        keep=st.integers(0, 2),
        scores=st.lists(st.lists(st.floats(-9, 9), min_size=2, max_size=2), min_size=1, max_size=3),
    ),
    st.builds(DropVisualNeurons, KEEP, st.sampled_from(["prefix", "random", "magnitude"]), SEED, LAYERS),
    st.builds(FastV, st.integers(1, 99), KEEP),
    st.builds(RandomPrune, LAYERS, KEEP, SEED),
)


@given(st.lists(PASS, max_size=4))
def test_a_printed_pipeline_parses_to_the_same_passes(passes):
    assert parse_pipeline(pipeline_text(passes)) == passes


@given(st.text(alphabet="cut-visual{}=,[]:1 fromlayer_\n", max_size=40))
def test_any_text_is_a_pipeline_or_one_pass_error(text):
    try:
        parse_pipeline(text)
    except PassError as error:
        assert str(error)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no-such-pass", "there is no pass 'no-such-pass'; there are: average-pool, cdpruner, cls-curve"),
        ("fastv{depth=2}", "fastv has no option 'depth'; it has: layer, keep"),
        ("neighbor-attention", "needs the option 'radius', as in neighbor-attention{radius=...}"),
        ("cut-visual", "give either from_layer or last"),
        ("fastv{layer=2", "column 6: the brace opened here is not closed"),
        ("fastv{layer}", "not of the form field=value"),
        ("fastv{layer=}", "layer of fastv has no value"),
        ("fastv{layer=1,layer=2}", "sets layer twice"),
        ("fastv{layer=[}", "not closed"),
        ("fastv fastv", "expected a comma"),
        ("fastv,", "a pass is missing"),
        (",fastv", "expected the name of a pass"),
        ("{layer=2}", "expected the name of a pass"),
        ("fastv{layer: 2}", "not of the form field=value"),
        ("fastv{layer=!!python/object:os.system {}}", "cannot read the value"),
    ],
)
def test_a_bad_text_is_refused_by_what_is_wrong(text, message):
    with pytest.raises(PassError) as error:
        parse_pipeline(text)
    assert message in str(error.value)


def test_exponents_are_numbers():
    assert parse_pipeline("fastv{layer=1,keep=1e-3}") == [FastV(1, 0.001)]
    assert parse_pipeline(pipeline_text([FastV(1, 1e-5)])) == [FastV(1, 1e-5)]


def test_white_space_and_empty_text():
    assert parse_pipeline("") == parse_pipeline("  \n ") == []
    assert parse_pipeline(" fastv { layer = 3 , keep = 0.25 } ,\n cut-visual{from_layer=4} ") == [
        FastV(3, 0.25),
        CutVisual(4),
    ]


def test_resolve_takes_every_form(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("passes:\n  - fastv: {layer: 3, keep: 0.25}\n  - random-prune\n")
    assert resolve(None) == [] and resolve(FastV()) == [FastV()] and resolve((FastV(),)) == [FastV()]
    assert resolve(str(path)) == [FastV(3, 0.25), RandomPrune()]
    with pytest.raises(PassError, match="is not a pass"):
        resolve(["fastv"])


def test_every_shipped_recipe_reads_and_says_where_it_comes_from():
    assert recipes()
    for name, path in recipes().items():
        assert resolve(f"recipe:{name}")
        assert path.read_text().startswith("#")
    with pytest.raises(PassError, match="there is no recipe 'nope'; there are: digits-yopo"):
        resolve("recipe:nope")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"passes: 5", "no list named `passes`"),
        (b"[1]", "no list named `passes`"),
        (b"passes: [[1]]", "neither a name nor one name"),
        (b"passes: [{fastv: 5}]", "must be a mapping"),
        (b"passes: [{fastv: {}, cut-visual: {}}]", "neither a name nor one name"),
        (b"passes: [", "cannot be read"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"passes: [!!python/object/apply:os.system ['true']]", "cannot be read"),
    ],
)
def test_a_bad_recipe_file_is_one_error(tmp_path, content, message):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(PassError) as error:
        resolve(str(path))
    assert message in str(error.value) and "bad.yaml" in str(error.value)
    with pytest.raises(PassError, match="does not exist"):
        resolve(str(tmp_path / "missing.yaml"))
