"""One reader for JSON files that hold an object."""

import subprocess
import sys

import pytest
from camshaft.graph.json_file import read_json_object


def test_fields_of_an_object(tmp_path):
    file = tmp_path / "config.json"
    file.write_text('{"name": "é", "layers": [1]}', encoding="utf-8")
    assert read_json_object(file, fix="") == {"name": "é", "layers": [1]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r" has no config\.json; write one$"),
        (b'{"a"', r"config\.json is not JSON \(Expecting ':' delimiter: .*\); write one$"),
        (b'{"a": "\xff"}', r"config\.json is not JSON \('utf-8' codec can't decode byte 0xff .*\); write one$"),
        (b"[1]", r"config\.json holds a list; allowed: a JSON object; write one$"),
    ],
)
def test_errors_name_the_file_and_the_fix(tmp_path, content, message):
    file = tmp_path / "config.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_json_object(file, fix="write one")


def test_readers_need_no_torch():
    code = "import sys, camshaft.graph.json_file; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
