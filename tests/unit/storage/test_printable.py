"""Names that are no text can be printed, drawn and encoded; names that are stay as they are."""

from hypothesis import given
from hypothesis import strategies as st

from gdd_dist.storage.printable import printable


def test_what_is_no_text_becomes_an_escape_and_text_stays():
    assert printable("caf\udce9\n") == "caf\\udce9\\n"
    assert printable("Äpfel 林檎 🍎\u3000x") == "Äpfel 林檎 🍎\u3000x"


@given(st.binary(max_size=20))
def test_any_name_of_a_file_system_can_be_encoded(name):
    text = printable(name.decode("utf-8", "surrogateescape"))
    assert text.encode().decode() == text
    assert len(text.splitlines()) <= 1 or "\u2028" in text or "\u2029" in text
    assert printable(text) == text
