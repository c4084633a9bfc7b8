import contextlib
import io
import re
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_python_blocks_print_what_the_readme_says():
    blocks = re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", README, re.DOTALL)
    assert len(blocks) == 9
    scope = {}
    for code, expected in blocks:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, scope)
        assert printed.getvalue() == expected


def test_every_file_in_the_reading_order_exists():
    table = README.split("## Files, in reading order")[1]
    files = re.findall(r"^\| `([\w/.]+)` \|", table, re.MULTILINE)
    assert len(files) >= 9
    assert all((Path(__file__).parent.parent / file).exists() for file in files)
