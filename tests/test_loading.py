"""What is read from files: json of the expected shape, whole weights, parts that fit each other; else one sentence."""
import json

import pytest

from checkpoint import misfit, read_config, read_json, read_lines

# ---- json ----


@pytest.mark.parametrize("value, shape, says", [
    ({"a": 1}, {"a": int}, ""),
    ({"a": 1}, {"a": float}, ""),
    ({}, {"a": (None, [int, int])}, ""),
    ({"a": [1, 2]}, {"a": (None, [int, int])}, ""),
    ({"x": {"y": 1}, "z": {}}, {str: {str: float}}, ""),
    (None, dict, "it is missing or null, expected an object"),
    ([3], {"a": int}, "it is [3], expected an object"),
    ({"a": True}, {"a": int}, "a is true, expected a whole number"),
    ({"a": True}, {"a": float}, "a is true, expected a number"),
    ({"a": 1}, {"a": bool}, "a is 1, expected true or false"),
    ({}, {"a": {"b": int}}, "a is missing or null, expected an object"),
    ({"a": {"b": None}}, {"a": {"b": int}}, "a.b is missing or null, expected a whole number"),
    ({"a": [1]}, {"a": (None, [int, int])}, "a has 1 entries, expected 2"),
    ({"a": ["b", 3]}, {"a": [str]}, "a[1] is 3, expected a string"),
    ({"x": {"y": "no"}}, {str: {str: float}}, 'x.y is "no", expected a number'),
])
def test_a_json_is_compared_with_its_shape(value, shape, says):
    """The first thing that is not as expected is named with the way to it; what may be None may be missing."""
    assert misfit(value, shape) == says


@pytest.mark.parametrize("text, says", [
    ("{", "Expecting"), ("", "Expecting"), ("\xff", "Expecting"), ("[" * 100_000, "recursion"),
    ("[]", r"it is \[\], expected an object"), ("null", "it is missing"),
    ('{"a": 1}', "b is missing or null, expected a string"),
], ids=["cut", "empty", "not utf-8", "deep", "list", "null", "missing key"])
def test_a_damaged_json_ends_in_a_sentence(tmp_path, text, says):
    """Malformed or foreign json ended in KeyError, TypeError and AttributeError at nine places."""
    path = tmp_path / "x.json"
    path.write_text(text, "latin-1")
    with pytest.raises(ValueError, match=f"x.json is damaged, or of another program .*{says}.*: throw it away"):
        read_json(path, "", {"b": str}, "throw it away")
    with pytest.raises(FileNotFoundError, match="^there is none$"):
        read_json(tmp_path / "y.json", "there is none")


def test_lines_of_json(tmp_path):
    """A last line that a kill cut short is left out; any other damaged or foreign line is named."""
    path, shape = tmp_path / "log.jsonl", {"step": int}
    assert read_lines(path, shape) == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert read_lines(path, shape) == [{"step": 1}, {"step": 2}]
    for bad in ("{", '{"step": "x"}', "7"):
        path.write_text(f'{{"step": 1}}\n{bad}\n{{"step": 3}}\n')
        with pytest.raises(ValueError, match="log.jsonl, line 2, is damaged.*: delete this line"):
            read_lines(path, shape)


def test_config_of_a_checkpoint(tmp_path):
    """What is not known is None, as without a config.json; imported weights have the size they were trained at."""
    unknown = {"train": None, "stage1": None, "size": None}
    assert read_config(tmp_path) == unknown
    (tmp_path / "config.json").write_text(json.dumps({"imported": {"base": "x"}}))
    assert read_config(tmp_path) == unknown | {"imported": {"base": "x"}, "size": [288, 384]}
    (tmp_path / "config.json").write_text(json.dumps({"train": {"stage": 1}}))
    with pytest.raises(ValueError, match="config.json is damaged.*train.steps is missing.*copy the whole checkpoint"):
        read_config(tmp_path)
