"""The text of a mode in records."""

import pytest

from core.mode import Mode

TEXTS = {
    "compiled": Mode(),
    "unpatched": Mode("unpatched"),
    "eager": Mode("eager", 1),
    "compiled, cohort of 4": Mode("compiled", 4),
    "eager, cohort of 200": Mode("eager", 200),
}


@pytest.mark.parametrize("text", TEXTS)
def test_a_mode_is_read_from_its_text(text):
    assert Mode.parse(text) == TEXTS[text]
    assert str(Mode.parse(text)) == text


@pytest.mark.parametrize("text", ["", "another", "compiled, cohort of 0", "eager, cohort of 2\n", " eager"])
def test_another_text_is_no_mode(text):
    with pytest.raises(ValueError, match="is no mode of a step"):
        Mode.parse(text)
