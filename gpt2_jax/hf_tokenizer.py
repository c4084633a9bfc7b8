"""Tokenizers of other kinds than GPT-2's, by the library `tokenizers`, with the same interface.

WordPiece, SentencePiece's models and whatever else a `tokenizer.json` describes. The library is an
extra; `tokenizer.py` imports this module where it meets such a file.
"""

import threading
from collections.abc import Collection, Iterable, Sequence
from functools import partial
from operator import index
from pathlib import Path
from typing import Any, SupportsIndex

from gpt2_jax import tokenizer_files, tokenizer_settings
from gpt2_jax.added_tokens import AddedToken
from gpt2_jax.tokenizer import (
    EncodedText,
    StreamDecoder,
    Tokenizer,
    as_list,
    check_no_surrogates,
    check_not_negative,
    one_by_one,
    without_surrogates,
)
from gpt2_jax.tokenizer_files import TokenizerFiles
from gpt2_jax.tokenizer_template import Template

try:
    import tokenizers
except ImportError as error:
    raise ImportError(
        "A tokenizer of another kind than GPT-2's byte-level BPE needs the library `tokenizers`: "
        f'pip install "gpt2_jax[tokenizers]" ({error}).'
    ) from None

# HF's `clean_up_tokenization`, step by step: what WordPiece has parted is joined again.
CLEAN_UPS = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)
SHOWN = 40  # characters of a text in a message
UNFINISHED = "\ufffd"  # what a character decodes to whose bytes are not all there


class HFTokenizer(Tokenizer):
    """A tokenizer that the library `tokenizers` carries out.

    Special tokens are found in a text all or none of them; those that are not allowed become what
    HF's `split_special_tokens` makes of them, which in a Unigram's vocabulary may be the token all
    the same. `decode` gives HF's text, which is not the text that was encoded where the kind loses
    spaces or letters' case.

    Args:
      pipeline: the contents of a `tokenizer.json`.
      added_tokens: further tokens; those without an id get the next one.
      roles: HF's names for what tokens are for.
      clean_up: whether `decode` takes away the spaces before punctuation.

    Raises:
      ValueError: the library cannot read the pipeline.
    """

    def __init__(
        self,
        pipeline: str,
        added_tokens: Sequence[AddedToken] = (),
        *,
        roles: dict[str, str],
        clean_up: bool = False,
    ):
        try:
            self._engine = tokenizers.Tokenizer.from_str(pipeline)
        except Exception as error:  # the library raises no other kind
            raise ValueError(f"expected what `tokenizers` reads, got {error}") from error
        self._setting = threading.Lock()
        # Settings of batches that were made with it, which are none of the tokenizer's.
        self._engine.no_truncation()
        self._engine.no_padding()
        _add_tokens(self._engine, added_tokens)
        # As with HF: of a BPE, whose tokens hold their spaces, it would take some away.
        self.clean_up = clean_up and not isinstance(self._engine.model, tokenizers.models.BPE)
        self.vocab = self._engine.get_vocab(with_added_tokens=False)
        # What a `Tokenizer` has besides. The engine keeps its merges to itself, and drops what it
        # lacks.
        self.merges = []
        self.missing_bytes = "drop"
        self.add_prefix_space = False
        # Read back, as the engine has given ids to those that came without one.
        known = []
        for id, token in self._engine.get_added_tokens_decoder().items():
            flags = {name: getattr(token, name) for name in tokenizer_settings.FLAGS}
            known.append(AddedToken(token.content, id, special=token.special, **flags))
        self._set_special(known, dict(roles), _template(self._engine))

    @staticmethod
    def from_files(files: TokenizerFiles) -> "HFTokenizer":
        """Returns the tokenizer that files describe.

        Raises:
          ValueError: the library cannot read them.
        """
        try:
            made = HFTokenizer(
                files.pipeline or "",
                files.added_tokens,
                roles=files.roles,
                clean_up=files.clean_up,
            )
        except ValueError as error:
            raise ValueError(f"{', '.join(map(str, files.files))}: {error}.") from error
        # With the added tokens, unlike `made.vocab`: what has a role is often one of these.
        vocab = made._engine.get_vocab()
        # What the tokenizer's files say counts before what the model's config says.
        made.roles = tokenizer_settings.roles_of_model(files.model_ids, vocab) | made.roles
        return made

    def _arguments(self) -> dict[str, Any]:
        # The pipeline has the added tokens by now, with their ids.
        return {"pipeline": self._engine.to_str(), "roles": self.roles, "clean_up": self.clean_up}

    def save(self, folder: str | Path) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, which HF reads back equal."""
        settings = {
            # HF's class for whatever a `tokenizer.json` says: others bring tokens of their own.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": self.clean_up,
            **self.roles,
        }
        texts = {
            "tokenizer.json": self._engine.to_str(),
            "tokenizer_config.json": tokenizer_files.as_json(settings),
        }
        tokenizer_files.write_texts(Path(folder), texts)

    def encode(
        self,
        text: str,
        allowed_special: Collection[str] = (),
        *,
        disallowed_special: Collection[str] = (),
        add_special_tokens: bool = True,
    ) -> list[int]:
        """Returns the ids of a text: see `Tokenizer.encode`.

        Raises:
          ValueError: as there, or some of the special tokens are allowed, and not all.
        """
        self._check_special(text, allowed_special, disallowed_special)
        return self._encoded(text, allowed_special, add_special_tokens).ids

    def encode_with_spans(
        self,
        text: str,
        allowed_special: Collection[str] = (),
        *,
        disallowed_special: Collection[str] = (),
        add_special_tokens: bool = True,
    ) -> EncodedText:
        """Returns the ids of a text with the characters of each: see `Tokenizer`."""
        self._check_special(text, allowed_special, disallowed_special)
        check_no_surrogates(text)
        encoded = self._encoded(text, allowed_special, add_special_tokens)
        return EncodedText(encoded.ids, encoded.offsets)

    def encode_batch(
        self,
        texts: Iterable[str],
        allowed_special: Collection[str] = (),
        *,
        disallowed_special: Collection[str] = (),
        add_special_tokens: bool = True,
    ) -> list[list[int]]:
        """Returns the ids of each text: see `Tokenizer.encode_batch`."""
        encode = partial(
            self.encode,
            allowed_special=allowed_special,
            disallowed_special=disallowed_special,
            add_special_tokens=add_special_tokens,
        )
        return one_by_one(encode, texts)

    def _encoded(
        self, text: str, allowed_special: Collection[str], add_special_tokens: bool
    ) -> tokenizers.Encoding:
        allowed = self.special_tokens.keys() & set(allowed_special)
        is_all = allowed_special == "all" or allowed == self.special_tokens.keys()
        if allowed and not is_all:
            expected = "'all' or nothing for a tokenizer that is not GPT-2's kind"
            raise ValueError(f"`allowed_special` must be {expected}, got {sorted(allowed)}.")
        spelled = without_surrogates(text)
        try:
            # The library has it as a setting of the engine, not of a call: so it is set anew each
            # time, and no other thread's call may come between.
            with self._setting:
                self._engine.encode_special_tokens = not is_all  # as ordinary text
                return self._engine.encode(spelled, add_special_tokens=add_special_tokens)
        except Exception as error:  # the library raises no other kind
            got = f"{text[:SHOWN]!r} and {error}"
            raise ValueError(f"Expected a text that `tokenizers` encodes, got {got}.") from error

    def decode_bytes(self, ids: Iterable[SupportsIndex]) -> bytes:
        """Returns the UTF-8 of what `decode` returns."""
        return self.decode(ids).encode()

    def decode(self, ids: Iterable[SupportsIndex], errors: str = "replace") -> str:
        """Returns HF's text of ids; those that no token has stand for nothing.

        Raises:
          ValueError: an id is negative, or `errors` is not "replace".
        """
        if errors != "replace":
            expected = "'replace' for a tokenizer that is not GPT-2's kind"
            raise ValueError(f"`errors` must be {expected}, got {errors!r}.")
        listed = as_list(ids)
        check_not_negative(listed)
        # The library by itself leaves special tokens out; HF's `decode` and ours show them.
        text = self._engine.decode(list(map(index, listed)), skip_special_tokens=False)
        if self.clean_up:
            for parted, joined in CLEAN_UPS:
                text = text.replace(parted, joined)
        return text

    def stream_decoder(self, context: Sequence[int] = ()) -> "HFStreamDecoder":
        """Returns a decoder that takes ids as they come, after those of a context."""
        return HFStreamDecoder(self, context)

    @property
    def vocab_size(self) -> int:
        """The largest id plus one."""
        return max(self._engine.get_vocab().values(), default=-1) + 1

    @property
    def is_seamless(self) -> bool:
        """False: what a piece's ids are depends on what stands before it."""
        return False


class HFStreamDecoder(StreamDecoder):
    """Turns ids into text as they come, where a token's text depends on those before it."""

    def __init__(self, tokenizer: HFTokenizer, context: Sequence[int] = ()):
        self._tokenizer = tokenizer
        # Ids whose text is shown and, from `_n_shown` on, those whose text is not. What was shown
        # last stays, since a token's text depends on its neighbour.
        self._ids = list(map(int, context))
        self._n_shown = len(self._ids)

    def push(self, ids: Iterable[SupportsIndex]) -> str:
        """Returns the text that these ids complete."""
        self._ids += map(index, as_list(ids))
        text = self._unshown()
        # A U+FFFD that was in the text itself waits too, for the next token or for `flush`.
        if not text or text.endswith(UNFINISHED):
            return ""
        # To decode the whole text again at each token would be quadratic.
        del self._ids[: self._n_shown]
        self._n_shown = len(self._ids)
        return text

    def flush(self) -> str:
        """Returns what is left."""
        text = self._unshown()
        self._n_shown = len(self._ids)
        return text

    def _unshown(self) -> str:
        # The difference of two texts: the new ids alone might lose the space before their first
        # word.
        shown = self._tokenizer.decode(self._ids[: self._n_shown])
        return self._tokenizer.decode(self._ids)[len(shown) :]


def _template(engine: tokenizers.Tokenizer) -> Template:
    """Returns what an engine adds to each text."""
    try:
        encoded = engine.encode("a")  # any text that has a token
    except Exception:  # what has no token, and no token for it, is an error to the library
        encoded = engine.encode("")
    # Where all of it was added, to an empty text, it is taken to stand before.
    is_added = encoded.special_tokens_mask
    n_before = is_added.index(0) if 0 in is_added else len(is_added)
    n_after = is_added[::-1].index(0) if 0 in is_added else 0
    n_kept = len(is_added) - n_after
    return Template(tuple(encoded.ids[:n_before]), tuple(encoded.ids[n_kept:]))


def _add_tokens(engine: tokenizers.Tokenizer, added_tokens: Sequence[AddedToken]) -> None:
    """Adds those tokens that the engine does not have yet."""
    known = {token.content for token in engine.get_added_tokens_decoder().values()}
    # In their order, by which the engine gives ids: the library's class has no field for one.
    for token in added_tokens:
        # The pipeline's own stay as they are, flags included.
        if token.content in known:
            continue
        flags = {name: getattr(token, name) for name in tokenizer_settings.FLAGS}
        added = tokenizers.AddedToken(token.content, special=token.special, **flags)
        if token.special:
            engine.add_special_tokens([added])
        else:
            engine.add_tokens([added])
