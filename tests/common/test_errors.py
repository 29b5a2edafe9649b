import pytest

from common.errors import one_line


@pytest.mark.parametrize(
    ("error", "longest", "line"),
    [
        (ValueError("a  b\n\tc "), None, "a b c"),
        (ValueError("abc def"), 5, "abc d"),
        (NotImplementedError(), None, "NotImplementedError"),
        ("a text\nof two lines", None, "a text of two lines"),
    ],
)
def test_an_error_is_one_line_or_the_name_of_its_class(error: object, longest: int | None, line: str) -> None:
    assert one_line(error, longest) == line
