"""The files of a tokenizer in a checkpoint's folder, of both of HF's generations and OpenAI's.

Knows what lies in files, and not how texts are encoded. What a folder holds is what `AutoTokenizer`
of transformers 5 makes of it, with two exceptions. An id that a file gives to an added token is
that token's, where transformers 5 gives it the next one that is free. And a `tokenizer.json` is
followed whatever class goes with it, where transformers 5 takes parts of it from GPT-2's class.
"""

import fnmatch
import json
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from gpt2_jax.added_tokens import AddedToken
from gpt2_jax.byte_spelling import byte_chars
from gpt2_jax.files import listing, read_json_object, replacing
from gpt2_jax.tokenizer_settings import (
    BERT,
    END_OF_TEXT,
    GPT2_CLASSES,
    GPT2_ROLES,
    WRAPS_EACH_TEXT,
    Folder,
    ModelIds,
    Values,
    Vocab,
    added_token,
    checked_vocab,
    damaged,
    declared_tokens,
    model_ids,
    read_settings,
    read_text,
    special_tokens,
)
from gpt2_jax.tokenizer_template import (
    NO_TEMPLATE,
    Template,
    as_processor,
    template_of_processor,
)

Pair = tuple[str, str]  # two tokens that become one

# The files of a tokenizer in a checkpoint's folder, under HF's names and under OpenAI's.
VOCABULARIES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
OWN_VOCABULARIES = ("vocab.json", "encoder.json", "tokenizer.json")
FILES = (
    "vocab.json",
    "merges.txt",
    "encoder.json",
    "vocab.bpe",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
# Patterns of files that only tokenizers of other kinds have: WordPiece, and SentencePiece's models.
OTHER_KINDS = ("vocab.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model", "*.spm")


class TokenizerKindError(ValueError):
    """A folder holds a tokenizer of a kind that cannot be read."""


class TokenizerFiles(NamedTuple):
    """What the files of a tokenizer hold."""

    vocab: Vocab
    merges: list[Pair]
    added_tokens: list[AddedToken]
    roles: dict[str, str]  # HF's name -> token
    template: Template
    add_prefix_space: bool = False
    files: tuple[Path, ...] = ()  # where it was read, for messages
    pipeline: str | None = None  # a whole `tokenizer.json`, where it is not GPT-2's kind
    clean_up: bool = False  # HF's `clean_up_tokenization_spaces`
    model_ids: ModelIds = {}  # of roles that no file of the tokenizer speaks of


# Reading.


def read(path: Path) -> TokenizerFiles:
    """Returns what a folder's files hold.

    Raises:
      FileNotFoundError: the folder has no file of a tokenizer, or half of one.
      TokenizerKindError: a `ValueError`; the tokenizer is of a kind that cannot be read.
      ValueError: a file is damaged.
    """
    folder = read_settings(path)
    file = path / "tokenizer.json"
    # It has all that is in the other files, and is what HF reads if there are both.
    if file.is_file():
        return _read_tokenizer_json(folder, file)
    # Only now, as a `tokenizer.json` can be read whatever its kind.
    _check_kind(folder)
    if folder.kind == BERT:
        return _read_bert(folder, path / "vocab.txt")
    for vocab_name, merges_name in VOCABULARIES:
        vocab_file = path / vocab_name
        merges_file = path / merges_name
        if vocab_file.is_file() and merges_file.is_file():
            return _read_vocabulary(folder, vocab_file, merges_file)
    expected = "vocab.json and merges.txt, or tokenizer.json, or encoder.json and vocab.bpe"
    got = listing(path) if path.is_dir() else "no such folder"
    raise FileNotFoundError(f"{path}: expected {expected}, got {got}.")


def files_in(path: Path) -> list[str]:
    """Returns the names of a folder's files that belong to a tokenizer of any kind."""
    # Not `iterdir`, which raises where there is no folder.
    names = [file.name for file in path.glob("*")]
    return sorted(filter(is_tokenizer_file, names))


def is_tokenizer_file(name: str) -> bool:
    """Returns whether a file belongs to a tokenizer of any kind, by its name."""
    # Not `fnmatch`, which takes capitals for small letters on Windows alone.
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in (*FILES, *OTHER_KINDS))


def _check_kind(folder: Folder) -> None:
    """Raises `TokenizerKindError` if a folder has a tokenizer of a kind that cannot be read.

    That is what its class says, or a file that only other kinds have, with none of ours beside it.
    """
    path = folder.path
    if folder.kind == BERT and (path / "vocab.txt").is_file():
        return
    is_other_class = folder.kind is not None and folder.kind not in GPT2_CLASSES
    # A converter may leave another kind's file beside the byte-level BPE that it has made of it.
    has_own = any((path / name).is_file() for name in OWN_VOCABULARIES)
    has_other = any(any(path.glob(name)) for name in OTHER_KINDS)
    if is_other_class or (has_other and not has_own):
        files = ", ".join(files_in(path)) or "no file of it"
        expected = "a byte-level BPE as GPT-2's, or a `tokenizer.json`"
        got = f"the class {folder.class_name or 'unknown'} and {files}"
        advice = (
            "Where transformers can read the folder, its `save_pretrained` writes a "
            "`tokenizer.json`, which can be read here."
        )
        raise TokenizerKindError(f"{path}: expected {expected}, got {got}. {advice}")


def _read_vocabulary(folder: Folder, vocab_file: Path, merges_file: Path) -> TokenizerFiles:
    """Returns what a vocabulary and its merges are, with the settings beside them."""
    vocab = checked_vocab(read_json_object(vocab_file), vocab_file)
    added_tokens, roles = special_tokens(folder, vocab, [])
    return TokenizerFiles(
        vocab=vocab,
        merges=_read_merges(merges_file),
        added_tokens=added_tokens,
        roles=roles,
        template=_template_of_settings(folder, vocab, added_tokens, roles),
        add_prefix_space=bool(folder.config.get("add_prefix_space")),
        files=(vocab_file, merges_file),
    )


def _read_tokenizer_json(folder: Folder, file: Path) -> TokenizerFiles:
    """Returns what a file of HF's `tokenizers` holds, with the settings beside it."""
    values = read_json_object(file)
    with damaged(file, "a model, its vocabulary and added tokens as `tokenizers` writes them"):
        listed = [added_token(token, token["id"]) for token in values.get("added_tokens") or []]
        if is_gpt2s_kind(values):
            return _read_own_kind(folder, file, values, listed)
    declared = declared_tokens(folder, listed)
    # HF's class for a GPT-2 knows nothing of another kind's tokens.
    added_tokens = [token for token in declared.tokens if token.content not in declared.assumed]
    known = {token.content for token in added_tokens}
    roles = {role: token for role, token in declared.roles.items() if token in known}
    # The file's own text, so that what the library alone knows reaches it as it is.
    return _other_kind(folder, file, read_text(file), added_tokens, roles)


def _read_own_kind(
    folder: Folder, file: Path, values: Values, listed: list[AddedToken]
) -> TokenizerFiles:
    """Returns what a `tokenizer.json` holds that describes GPT-2's kind."""
    model = values["model"]
    vocab = checked_vocab(model["vocab"], file)
    added_tokens, roles = special_tokens(folder, vocab, listed)
    # For the types alone: `is_gpt2s_kind` has seen that it is no `None`.
    template = template_of_processor(values.get("post_processor")) or NO_TEMPLATE
    known = {*vocab.values(), *(token.id for token in added_tokens)}
    unknown = sorted({*template.before, *template.after} - known)
    if unknown:
        expected = "ids of tokens in the `post_processor`"
        raise ValueError(f"{file}: expected {expected}, got {unknown}.")
    # GPT-2's class has it from its own settings; a class that knows nothing has it from this file.
    is_generic = folder.kind is not None and not folder.default_roles
    settings = values["pre_tokenizer"] if is_generic else folder.config
    return TokenizerFiles(
        vocab=vocab,
        # Lists since `tokenizers` 0.20, and strings before.
        merges=_as_pairs(model["merges"], file),
        added_tokens=added_tokens,
        roles=roles,
        template=template,
        add_prefix_space=bool(settings.get("add_prefix_space")),
        files=(file,),
    )


def _other_kind(
    folder: Folder,
    file: Path,
    pipeline: str,
    added_tokens: list[AddedToken],
    roles: dict[str, str],
) -> TokenizerFiles:
    """Returns what the library is to carry out. It knows the vocabulary, and what is added."""
    return TokenizerFiles(
        vocab={},
        merges=[],
        added_tokens=added_tokens,
        roles=roles,
        template=NO_TEMPLATE,
        files=(file,),
        pipeline=pipeline,
        clean_up=bool(folder.config.get("clean_up_tokenization_spaces")),
        model_ids=model_ids(folder),
    )


def _read_bert(folder: Folder, file: Path) -> TokenizerFiles:
    """Returns BERT's WordPiece, as a `tokenizer.json` would describe it."""
    # Not `splitlines`, which would also part a line at a character that may be a token itself.
    lines = read_text(file).removesuffix("\n").split("\n")
    vocab = {line: id for id, line in enumerate(lines)}
    added_tokens, roles = special_tokens(folder, vocab, [])
    ids = vocab | {token.content: token.id for token in added_tokens}
    config = folder.config
    with damaged(folder.path / "tokenizer_config.json", "BERT's special tokens"):
        template = Template((ids[roles["cls_token"]],), (ids[roles["sep_token"]],))
        unk_token = roles["unk_token"]
    pipeline = {
        "version": "1.0",
        # They travel beside the pipeline, and `HFTokenizer` adds them with their flags.
        "added_tokens": [],
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": config.get("tokenize_chinese_chars", True),
            # By null, accents go where capitals go: the rule of the library, and of HF.
            "strip_accents": config.get("strip_accents"),
            "lowercase": config.get("do_lower_case", True),
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": as_processor(template, ids),
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": unk_token,
            "continuing_subword_prefix": "##",
            # HF's: a longer word is one unknown token.
            "max_input_chars_per_word": 100,
            "vocab": vocab,
        },
    }
    return _other_kind(folder, file, json.dumps(pipeline), added_tokens, roles)


def _read_merges(file: Path) -> list[Pair]:
    lines = read_text(file).split("\n")
    # The first line alone, and by the whole word: merges may begin with "#" as well.
    if lines[0].startswith("#version"):
        del lines[0]
    return _as_pairs([line for line in lines if line], file)


def _as_pairs(merges: list[Any], file: Path) -> list[Pair]:
    """Returns merges, each a text or two tokens, as pairs."""
    pairs: list[Any] = []
    for merge in merges:
        pairs.append(tuple(merge.split(" ") if isinstance(merge, str) else merge))
    # All at once, as every start waits for it: which one is wrong is looked for only then.
    if set(map(len, pairs)) <= {2} and set(map(type, chain.from_iterable(pairs))) <= {str}:
        return pairs
    wrong = next(pair for pair in pairs if len(pair) != 2 or set(map(type, pair)) != {str})
    got = " ".join(map(str, wrong))
    expected = "a merge of two tokens with a space between"
    raise ValueError(f"{file}: expected {expected}, got {got!r}.")


# Whether a `tokenizer.json` does with a text what GPT-2's tokenizer does.


def is_gpt2s_kind(values: Values) -> bool:
    """Returns whether a `tokenizer.json` describes a byte-level BPE that merges as GPT-2's."""
    model = values["model"]
    pre_tokenizer = values.get("pre_tokenizer") or {}
    decoder = values.get("decoder") or {}
    kinds = {
        "model": model.get("type", "BPE" if "merges" in model else None),
        "pre_tokenizer": pre_tokenizer.get("type"),
        "decoder": decoder.get("type"),
    }
    return (
        kinds == {"model": "BPE", "pre_tokenizer": "ByteLevel", "decoder": "ByteLevel"}
        and not values.get("normalizer")
        # Files that are older than this setting lack it, and cut by GPT-2's pattern.
        and pre_tokenizer.get("use_regex", True)
        and _merges_as_gpt2s(model)
        and template_of_processor(values.get("post_processor")) is not None
    )


def _merges_as_gpt2s(model: Values) -> bool:
    """Returns whether a BPE does nothing but merge."""
    others = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    others += ("byte_fallback", "ignore_merges")
    does_more = any(model.get(name) for name in others)
    # Where each byte has a token nothing is unknown.
    is_whole = all(char in model["vocab"] for char in byte_chars().values())
    return not does_more and (is_whole or model.get("unk_token") is None)


def _template_of_settings(
    folder: Folder, vocab: Vocab, added_tokens: list[AddedToken], roles: Mapping[str, str]
) -> Template:
    """Returns what a class adds to a text, without a `tokenizer.json` to say it."""
    ids = vocab | {token.content: token.id for token in added_tokens}

    def ids_of(role: str) -> tuple[int, ...]:
        token = roles.get(role)
        return (ids[token],) if token in ids else ()

    if folder.default_roles in WRAPS_EACH_TEXT:
        return Template(ids_of("cls_token"), ids_of("sep_token"))
    return Template(
        before=ids_of("bos_token") if folder.config.get("add_bos_token") else (),
        after=ids_of("eos_token") if folder.config.get("add_eos_token") else (),
    )


# Writing.


def write(path: Path, files: TokenizerFiles) -> None:
    """Writes a tokenizer of GPT-2's kind; HF reads it back equal."""
    ids = files.vocab | {token.content: token.id for token in files.added_tokens}
    settings: Values = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": files.add_prefix_space,
    }
    settings |= role_settings(files.roles, ids)
    decoder = {}
    for token in files.added_tokens:
        decoder[str(token.id)] = _as_values(token)
    settings["added_tokens_decoder"] = decoder
    # With a line for the version, as the slow class of transformers 4 drops the first, whatever it
    # is.
    merges = [f"{left} {right}" for left, right in files.merges]
    texts = {
        "vocab.json": json.dumps(files.vocab, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
    }
    bos_id = ids.get(settings["bos_token"])
    eos_id = ids.get(settings["eos_token"])
    # Two flags say it, where they can: then there is no second copy of the vocabulary to write.
    if files.template.before in ((), (bos_id,)) and files.template.after in ((), (eos_id,)):
        settings["add_bos_token"] = bool(files.template.before)
        settings["add_eos_token"] = bool(files.template.after)
    else:
        pipeline = _as_pipeline(files, ids)
        texts["tokenizer.json"] = json.dumps(pipeline, ensure_ascii=False)
    texts["tokenizer_config.json"] = as_json(settings)
    write_texts(path, texts)


def write_texts(path: Path, texts: Mapping[str, str]) -> None:
    """Writes a tokenizer's files, and removes those of another that would speak against them."""
    for name, text in texts.items():
        with replacing(path / name, overwrite=True) as temporary:
            # Without `newline`, Windows would write "\r\n", and the merges would end in "\r".
            temporary.write_text(text, encoding="utf-8", newline="\n")
    # After the new ones: a stop in between leaves a file too many, and none too few.
    for name in FILES:
        if name not in texts:
            (path / name).unlink(missing_ok=True)


def role_settings(roles: Mapping[str, str], ids: Vocab) -> Values:
    """Returns the roles as settings, null where GPT-2's class would assume a token of its own."""
    if not roles and END_OF_TEXT in ids:
        return dict(GPT2_ROLES)  # as of a vocabulary of which nothing else is said
    return dict.fromkeys(GPT2_ROLES) | dict(roles)


def as_json(values: Values) -> str:
    """Returns an object as indented JSON."""
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def _as_pipeline(files: TokenizerFiles, ids: Vocab) -> Values:
    """Returns a tokenizer of GPT-2's kind as a `tokenizer.json`."""
    added_tokens = [{"id": token.id} | _as_values(token) for token in files.added_tokens]
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    byte_level["add_prefix_space"] = files.add_prefix_space
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": as_processor(files.template, ids),
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": files.vocab,
            # As lists, which keep a token that holds a space.
            "merges": [list(pair) for pair in files.merges],
        },
    }


def _as_values(token: AddedToken) -> Values:
    values = token._asdict()
    del values["id"]
    return values
