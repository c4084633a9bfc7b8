"""The files of a tokenizer in a checkpoint's folder, of both of HF's generations and OpenAI's.

Knows what lies in files, and not how texts are encoded. What a folder holds is what `AutoTokenizer`
of transformers 5 makes of it, with two exceptions. An id that a file gives to an added token is
that token's, where transformers 5 gives it the next one that is free. And a `tokenizer.json` is
followed whatever class goes with it, where transformers 5 takes parts of it from GPT-2's class.
"""

import contextlib
import fnmatch
import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from gpt2_jax.added_tokens import AddedToken
from gpt2_jax.files import listing, read_json_object, replacing

Vocab = dict[str, int]  # token -> id
Pair = tuple[str, str]  # two tokens that become one
Values = dict[str, Any]  # of a JSON object
ModelIds = dict[str, list[int]]  # role -> the ids that a model's config gives it

END_OF_TEXT = "<|endoftext|>"  # ends each document of GPT-2's training text

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
NO_ID = -1  # of a token that files name without one
LFS_POINTER = b"version https://git-lfs"  # what git leaves in the place of a file that it lacks

# HF's names for what tokens are for, in the order in which it gives ids to new ones.
ROLES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
# Lists of further special tokens, under HF's former name and its present one.
LISTS = ("additional_special_tokens", "extra_special_tokens")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")

# HF's classes, without "Fast", that cut and merge as GPT-2's does: with one vocabulary,
# `AutoTokenizer` of transformers 5.24 gave equal ids under each name, but for what is added before
# and after. Each with the tokens that it knows by itself. The last ones are HF's names for whatever
# `tokenizer.json` describes.
GPT2_ROLES = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
ROBERTA_ROLES = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "sep_token": "</s>",
    "pad_token": "<pad>",
    "cls_token": "<s>",
    "mask_token": "<mask>",
}
DEBERTA_ROLES = {
    "bos_token": "[CLS]",
    "eos_token": "[SEP]",
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
GPT2_CLASSES = {
    "GPT2Tokenizer": GPT2_ROLES,
    "CodeGenTokenizer": GPT2_ROLES,
    "RobertaTokenizer": ROBERTA_ROLES,
    "BartTokenizer": ROBERTA_ROLES,
    "LongformerTokenizer": ROBERTA_ROLES,
    "LEDTokenizer": ROBERTA_ROLES,
    "DebertaTokenizer": DEBERTA_ROLES,
    "PreTrainedTokenizer": {},
    "TokenizersBackend": {},
}
WRAPS_EACH_TEXT = (ROBERTA_ROLES, DEBERTA_ROLES)  # in its "cls_token" and its "sep_token"
BERT = "BertTokenizer"
BERT_ROLES = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}


class TokenizerKindError(ValueError):
    """A folder holds a tokenizer of a kind that cannot be read."""


class Template(NamedTuple):
    """The ids that a tokenizer adds to each text."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()


NO_TEMPLATE = Template()


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


class _Folder(NamedTuple):
    """A folder and what its settings say."""

    path: Path
    class_name: str | None  # HF's
    config: Values  # tokenizer_config.json
    token_map: Values  # special_tokens_map.json, where it counts
    model_config: Values  # config.json

    @property
    def named(self) -> Values:
        """HF's names -> tokens, among other settings."""
        return self.config | self.token_map

    @property
    def kind(self) -> str | None:
        """HF's class, of two that do the same the one without "Fast"."""
        return None if self.class_name is None else self.class_name.removesuffix("Fast")

    @property
    def default_roles(self) -> dict[str, str]:
        """The tokens that the class knows by itself."""
        if self.kind == BERT:
            return BERT_ROLES
        # HF takes GPT-2's class where a GPT-2's files say nothing.
        return GPT2_CLASSES.get(self.kind or "GPT2Tokenizer", {})


# Reading.


def read(path: Path) -> TokenizerFiles:
    """Returns what a folder's files hold.

    Raises:
      FileNotFoundError: the folder has no file of a tokenizer, or half of one.
      TokenizerKindError: a `ValueError`; the tokenizer is of a kind that cannot be read.
      ValueError: a file is damaged.
    """
    folder = _open_folder(path)
    file = path / "tokenizer.json"
    # It has all that is in the other files, and is what HF reads if there are both.
    if file.is_file():
        return _read_tokenizer_json(folder, file)
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
    names = [file.name for file in path.glob("*")]
    return sorted(filter(is_tokenizer_file, names))


def is_tokenizer_file(name: str) -> bool:
    """Returns whether a file belongs to a tokenizer of any kind, by its name."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in (*FILES, *OTHER_KINDS))


def _open_folder(path: Path) -> _Folder:
    """Returns a folder's settings."""
    config = _read_if_there(path / "tokenizer_config.json")
    model_config = _read_if_there(path / "config.json")
    # The table of added tokens came with the files' second generation, which needs no other file.
    is_second = "added_tokens_decoder" in config
    token_map = {} if is_second else _read_if_there(path / "special_tokens_map.json")
    class_name = config.get("tokenizer_class") or model_config.get("tokenizer_class")
    if not isinstance(class_name, str):  # many files hold null
        class_name = None
    return _Folder(path, class_name, config, token_map, model_config)


def _check_kind(folder: _Folder) -> None:
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


def _read_vocabulary(folder: _Folder, vocab_file: Path, merges_file: Path) -> TokenizerFiles:
    """Returns what a vocabulary and its merges are, with the settings beside them."""
    vocab = _checked_vocab(_read_object(vocab_file), vocab_file)
    added_tokens, roles = _special_tokens(folder, vocab, [])
    return TokenizerFiles(
        vocab=vocab,
        merges=_read_merges(merges_file),
        added_tokens=added_tokens,
        roles=roles,
        template=_template_of_settings(folder, vocab, added_tokens, roles),
        add_prefix_space=bool(folder.config.get("add_prefix_space")),
        files=(vocab_file, merges_file),
    )


def _read_tokenizer_json(folder: _Folder, file: Path) -> TokenizerFiles:
    """Returns what a file of HF's `tokenizers` holds, with the settings beside it."""
    values = _read_object(file)
    with _damaged(file, "a model, its vocabulary and added tokens as `tokenizers` writes them"):
        listed = [_added_token(token, token["id"]) for token in values.get("added_tokens") or []]
        if is_gpt2s_kind(values):
            return _read_own_kind(folder, file, values, listed)
    declared = _declared(folder, listed)
    # HF's class for a GPT-2 knows nothing of another kind's tokens.
    added_tokens = [token for token in declared.tokens if token.content not in declared.assumed]
    known = {token.content for token in added_tokens}
    roles = {role: token for role, token in declared.roles.items() if token in known}
    return _other_kind(folder, file, _read_text(file), added_tokens, roles)


def _read_own_kind(
    folder: _Folder, file: Path, values: Values, listed: list[AddedToken]
) -> TokenizerFiles:
    """Returns what a `tokenizer.json` holds that describes GPT-2's kind."""
    model = values["model"]
    vocab = _checked_vocab(model["vocab"], file)
    added_tokens, roles = _special_tokens(folder, vocab, listed)
    # GPT-2's class has it from its own settings; a class that knows nothing has it from this file.
    is_generic = folder.kind is not None and not folder.default_roles
    settings = values["pre_tokenizer"] if is_generic else folder.config
    return TokenizerFiles(
        vocab=vocab,
        # Lists since `tokenizers` 0.20, and strings before.
        merges=[_as_pair(merge, file) for merge in model["merges"]],
        added_tokens=added_tokens,
        roles=roles,
        template=_template_of_processor(values.get("post_processor")) or NO_TEMPLATE,
        add_prefix_space=bool(settings.get("add_prefix_space")),
        files=(file,),
    )


def _other_kind(
    folder: _Folder,
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
        model_ids=_model_ids(folder),
    )


def _read_bert(folder: _Folder, file: Path) -> TokenizerFiles:
    """Returns BERT's WordPiece, as a `tokenizer.json` would describe it."""
    lines = _read_text(file).removesuffix("\n").split("\n")
    vocab = {line: id for id, line in enumerate(lines)}
    added_tokens, roles = _special_tokens(folder, vocab, [])
    ids = vocab | {token.content: token.id for token in added_tokens}
    config = folder.config
    with _damaged(folder.path / "tokenizer_config.json", "BERT's special tokens"):
        template = Template((ids[roles["cls_token"]],), (ids[roles["sep_token"]],))
        unk_token = roles["unk_token"]
    pipeline = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": config.get("tokenize_chinese_chars", True),
            "strip_accents": config.get("strip_accents"),
            "lowercase": config.get("do_lower_case", True),
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": _as_processor(template, ids),
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": unk_token,
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": vocab,
        },
    }
    return _other_kind(folder, file, json.dumps(pipeline), added_tokens, roles)


def _read_merges(file: Path) -> list[Pair]:
    lines = _read_text(file).split("\n")
    if lines[0].startswith("#version"):
        del lines[0]
    return [_as_pair(line, file) for line in lines if line]


def _as_pair(merge: Any, file: Path) -> Pair:
    text = merge if isinstance(merge, str) else " ".join(merge)
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if len(parts) != 2:
        expected = "a merge of two tokens with a space between"
        raise ValueError(f"{file}: expected {expected}, got {text!r}.")
    left, right = parts
    return left, right


def _checked_vocab(vocab: Values, file: Path) -> Vocab:
    """Returns a vocabulary, all of whose ids are integers."""
    for token, id in vocab.items():
        if type(id) is not int:  # a bool is one, and no id
            raise ValueError(f"{file}: expected an integer as the id of {token!r}, got {id!r}.")
    return vocab


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
        and pre_tokenizer.get("use_regex", True)
        and _merges_as_gpt2s(model)
        and _template_of_processor(values.get("post_processor")) is not None
    )


def _merges_as_gpt2s(model: Values) -> bool:
    """Returns whether a BPE does nothing but merge."""
    others = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    others += ("byte_fallback", "ignore_merges")
    does_more = any(model.get(name) for name in others)
    # Where each byte has a token nothing is unknown.
    is_whole = all(char in model["vocab"] for char in byte_chars().values())
    return not does_more and (is_whole or model.get("unk_token") is None)


# What is added to a text.


def _template_of_settings(
    folder: _Folder, vocab: Vocab, added_tokens: list[AddedToken], roles: Mapping[str, str]
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


def _template_of_processor(processor: Values | None) -> Template | None:
    """Returns what a `post_processor` adds to a text; None if it does more than that."""
    if processor is None:
        return NO_TEMPLATE
    kind = processor.get("type")
    if kind == "ByteLevel":  # trims spans, which ours are not
        return NO_TEMPLATE
    if kind in ("RobertaProcessing", "BertProcessing"):
        return Template((processor["cls"][1],), (processor["sep"][1],))
    if kind == "Sequence":
        return _template_of_sequence(processor["processors"])
    if kind != "TemplateProcessing":
        return None
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    n_texts = 0
    for piece in processor["single"]:
        if "Sequence" in piece:
            n_texts += 1
            continue
        ids = processor["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
        if n_texts:
            after += tuple(ids)
        else:
            before += tuple(ids)
    return Template(before, after) if n_texts == 1 else None


def _template_of_sequence(processors: Iterable[Values]) -> Template | None:
    """Returns what several processors add, each to what those before it made."""
    template = NO_TEMPLATE
    for processor in processors:
        added = _template_of_processor(processor)
        if added is None:
            return None
        template = Template(added.before + template.before, template.after + added.after)
    return template


def _as_processor(template: Template, ids: Vocab) -> Values:
    """Returns a template as a `post_processor`."""
    tokens = {id: token for token, id in ids.items()}

    def pieces(added: Iterable[int]) -> list[Values]:
        return [{"SpecialToken": {"id": tokens[id], "type_id": 0}} for id in added]

    special_tokens = {}
    for id in (*template.before, *template.after):
        token = tokens[id]
        special_tokens[token] = {"id": token, "ids": [id], "tokens": [token]}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [*pieces(template.before), text, *pieces(template.after)],
        "pair": [text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": special_tokens,
    }


# Added tokens, and what tokens are for.


class _Declared(NamedTuple):
    """What files say of added tokens."""

    tokens: list[AddedToken]  # without a recorded id: NO_ID
    roles: dict[str, str]
    assumed: set[str]  # contents that no file names, only HF's class does


def _special_tokens(
    folder: _Folder, vocab: Vocab, listed: list[AddedToken]
) -> tuple[list[AddedToken], dict[str, str]]:
    """Returns the added tokens, each with an id, and the roles of all that there are."""
    declared = _declared(folder, listed)
    ids = dict(vocab)
    added_tokens = []
    for token in declared.tokens:
        # What the vocabulary says counts; a token that has no id gets the next one, as with HF.
        id = vocab.get(token.content, token.id)
        if id == NO_ID:
            id = max(ids.values(), default=-1) + 1
        ids[token.content] = id
        added_tokens.append(token._replace(id=id))
    # HF gives an id also to an `<|endoftext|>` that no file speaks of. No text has it, and a model
    # has no row for it: here it is none of the tokens.
    absent = declared.assumed - vocab.keys()
    added_tokens = [token for token in added_tokens if token.content not in absent]
    for content in absent:
        del ids[content]
    added_tokens.sort(key=lambda token: token.id)
    roles = {role: token for role, token in declared.roles.items() if token in ids}
    return added_tokens, roles_of_model(_model_ids(folder), ids) | roles


def _declared(folder: _Folder, listed: list[AddedToken]) -> _Declared:
    """Returns the added tokens in the order in which HF gives them ids, and all roles.

    Those with an id come first; `listed` are those of a `tokenizer.json`.
    """
    named = _named_tokens(folder)
    roles = dict(folder.default_roles)
    for role in ROLES:
        if role in folder.named:
            roles.pop(role, None)  # also by null, which says that there is none
        if role in named:
            roles[role] = named[role].content
    mentioned = {token.content for token in named.values()}
    recorded = _recorded_tokens(folder, mentioned, listed)
    specials = mentioned | set(roles.values())
    tokens = {}
    for token in sorted(recorded.values(), key=lambda token: token.id):
        is_special = token.special or token.content in specials
        tokens[token.content] = token._replace(special=is_special)
    for role in ROLES:
        if role in roles:
            content = roles[role]
            tokens.setdefault(content, named.get(role, AddedToken(content, NO_ID)))
    for token in named.values():
        tokens.setdefault(token.content, token)
    assumed = set()
    if folder.default_roles is GPT2_ROLES:
        assumed = set(roles.values()) - mentioned - recorded.keys()
    tokens.pop("", None)
    return _Declared(list(tokens.values()), roles, assumed)


def _named_tokens(folder: _Folder) -> dict[str, AddedToken]:
    """Returns the tokens that the settings name: roles first, then others, then those of lists."""
    named: dict[str, AddedToken] = {}
    map_file = folder.path / "special_tokens_map.json"
    config_file = folder.path / "tokenizer_config.json"
    with _damaged(map_file if map_file.is_file() else config_file, "tokens by their names"):
        for role in ROLES:
            _add_named(named, role, folder.named.get(role))
        for name, value in folder.named.items():
            if name.endswith("_token") and name not in ROLES:  # also `add_bos_token`, a bool
                _add_named(named, name, value)
        for name in LISTS:
            # Those of one file and of the other.
            values = [*_listed(folder.config.get(name)), *_listed(folder.token_map.get(name))]
            for number, value in enumerate(values):
                _add_named(named, f"{name}[{number}]", value)
    return named


def _listed(tokens: Any) -> Iterable[Any]:
    """Returns the tokens of a list, which may have names of their own."""
    return tokens.values() if isinstance(tokens, dict) else tokens or ()


def _add_named(named: dict[str, AddedToken], name: str, value: Any) -> None:
    if isinstance(value, str):
        named[name] = AddedToken(value, NO_ID)
    elif isinstance(value, dict):
        named[name] = _added_token(value | {"special": True}, NO_ID)


def _recorded_tokens(
    folder: _Folder, mentioned: set[str], listed: list[AddedToken]
) -> dict[str, AddedToken]:
    """Returns the added tokens that have an id in a file, by their content."""
    recorded = {}
    added_file = folder.path / "added_tokens.json"
    if "added_tokens_decoder" not in folder.config:
        for content, id in _checked_vocab(_read_if_there(added_file), added_file).items():
            is_special = content in mentioned
            recorded[content] = AddedToken(
                content, id, normalized=not is_special, special=is_special
            )
    for token in listed:
        recorded[token.content] = token
    config_file = folder.path / "tokenizer_config.json"
    with _damaged(config_file, "`added_tokens_decoder`: id -> token"):
        for id, value in (folder.config.get("added_tokens_decoder") or {}).items():
            token = _added_token(value, _as_id(id))
            recorded[token.content] = token
    return recorded


def _added_token(value: Values, id: int) -> AddedToken:
    """Returns a token as HF's files describe it."""
    is_special = bool(value.get("special"))
    # HF's defaults: white space and words do not matter, and special tokens are not normalized.
    flags = {"normalized": not is_special} | {name: value[name] for name in FLAGS if name in value}
    content = value["content"]
    if not isinstance(content, str):
        raise TypeError(f"the content {content!r}")
    return AddedToken(content, id, special=is_special, **flags)


def _as_id(text: str) -> int:
    if not text.isdecimal():
        raise TypeError(f"the id {text!r}")
    return int(text)


def _model_ids(folder: _Folder) -> ModelIds:
    """Returns what begins and ends a text by the model's config, where no other file says it."""
    model_ids = {}
    for role in ("bos_token", "eos_token"):
        found = folder.model_config.get(f"{role}_id")
        if role not in folder.named:
            model_ids[role] = found if isinstance(found, list) else [found]
    return model_ids


def roles_of_model(model_ids: ModelIds, vocab: Vocab) -> dict[str, str]:
    """Returns the tokens of a model's ids, in a vocabulary without GPT-2's own end of a text.

    With it, that counts: many configs have the default ids, whatever their tokens.
    """
    if END_OF_TEXT in vocab:
        return {}
    tokens = {id: token for token, id in vocab.items()}
    roles = {}
    for role, ids in model_ids.items():
        known = [id for id in ids if id in tokens]
        if known:
            roles[role] = tokens[known[0]]
    return roles


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
    merges = [f"{left} {right}" for left, right in files.merges]
    texts = {
        "vocab.json": json.dumps(files.vocab, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
    }
    bos_id = ids.get(settings["bos_token"])
    eos_id = ids.get(settings["eos_token"])
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
    for name in FILES:
        if name not in texts:
            (path / name).unlink(missing_ok=True)


def role_settings(roles: Mapping[str, str], ids: Vocab) -> Values:
    """Returns the roles as settings, null where GPT-2's class would assume a token of its own."""
    settings: Values = {}
    for role, token in GPT2_ROLES.items():
        settings[role] = token if token in ids else None
    return settings | dict(roles)


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
        "post_processor": _as_processor(files.template, ids),
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": files.vocab,
            "merges": [list(pair) for pair in files.merges],
        },
    }


def _as_values(token: AddedToken) -> Values:
    values = token._asdict()
    del values["id"]
    return values


# One file.


def _read_text(file: Path) -> str:
    """Returns a text file's text."""
    _check_pointer(file)
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected UTF-8, got {error}.") from error


def _read_object(file: Path) -> Values:
    """Returns a JSON file's object."""
    _check_pointer(file)
    return read_json_object(file)


def _read_if_there(file: Path) -> Values:
    """Returns a file's object; where there is no file, an empty one."""
    return _read_object(file) if file.is_file() else {}


def _check_pointer(file: Path) -> None:
    """Raises `ValueError` for what git leaves in the place of a large file that it lacks."""
    with file.open("rb") as opened:
        if opened.read(len(LFS_POINTER)) == LFS_POINTER:
            got = "git-lfs's pointer to it: run `git lfs pull`"
            raise ValueError(f"{file}: expected the file itself, got {got}.")


@contextlib.contextmanager
def _damaged(file: Path, expected: str) -> Iterator[None]:
    """Turns what comes of a file of another form into an error that names the file."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: expected {expected}, got {error!r}.") from error


# Bytes and the characters that spell them.


@cache
def byte_chars() -> dict[int, str]:
    """Returns the character that spells each byte in vocabulary files.

    As in openai/gpt-2, src/encoder.py: printable bytes are spelled by themselves, the others by the
    characters from U+0100 on, so that no token holds a space or a control character.
    """
    # The soft hyphen, U+00AD, lies between the last two ranges: it is not printed.
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    chars = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in chars]
    for i, byte in enumerate(others):
        chars[byte] = chr(256 + i)
    return chars
