from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from coterie.data import byte_tokenizer

TOKENIZER = byte_tokenizer(512)


@given(st.text())
def test_ids_are_the_utf8_bytes_and_decode_to_the_text(text):
    ids = TOKENIZER(text)["input_ids"]
    assert ids == list(text.encode())
    assert TOKENIZER.decode(ids) == text


def test_every_byte_has_its_own_token_and_the_end_of_text_is_256(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert len(again) == 257
    assert again.eos_token_id == again.pad_token_id == 256
    assert again("a<|endoftext|>")["input_ids"] == [97, 256]
