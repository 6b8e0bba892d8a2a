"""docs/security.md against the tests: each statement's test exists."""

import re

from tests.ranks import ROOT

TEXT = (ROOT / "docs" / "security.md").read_text()


def test_tests_named_in_security_doc_exist() -> None:
    file, named = "", 0
    for path, test in re.findall(r"`((?:chaos/)?test_\w+\.py)?(?:::(test_\w+))?`", TEXT):
        file = path or file
        assert (ROOT / "tests" / file).is_file(), file
        if test:
            assert f"def {test}(" in (ROOT / "tests" / file).read_text(), f"{file}::{test}"
            named += 1
    assert named >= 10
