"""How pages are read and how output is compared: the checks of the documentation can fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.pages import agrees, blocks

PAGE = """\
# Title

```console
$ septum status 0
TDX_SUCCESS
$ septum status \\
    zzz
septum status: ...
$ echo $?
2
```

- in a list:

    ```bash
    # a comment
    septum --help
    ```

```console
$ make demo
```

<!-- not run: needs an hour -->

```console
$ septum explore everything
```

```python
$ septum status 0
```
"""


def test_reading(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    first, second = blocks(page)
    assert first.line == 3
    assert [(c.line, c.text, c.output, c.may_fail) for c in first.commands] == [
        (4, "septum status 0", ("TDX_SUCCESS",), False),
        (6, "septum status \\\n    zzz", ("septum status: ...",), True),
        (9, "echo $?", ("2",), False),
    ]
    assert [(c.text, c.output) for c in second.commands] == [("septum --help", None)]


@pytest.mark.parametrize(
    ("claimed", "printed", "expected"),
    [
        (("a", "b"), "a\nb\n", True),
        (("a", "b"), "a\nc\n", False),
        (("a",), "a\nb\n", False),
        (("a", "..."), "a\nb\nc\n", True),
        (("...", "c"), "a\nb\nc\n", True),
        (("a", "...", "c"), "a\nc\n", True),
        (("took ... s",), "took 1.25 s\n", True),
        (("took ... s",), "took 1.25 ms\n", False),
        (("a.c",), "abc\n", False),
        (("a", ""), "a\n\n", True),
        (("a",), "a", True),
        (("a  b",), "a  b   \n", True),
    ],
)
def test_comparing(claimed: tuple[str, ...], printed: str, expected: bool) -> None:
    assert agrees(claimed, printed) is expected
