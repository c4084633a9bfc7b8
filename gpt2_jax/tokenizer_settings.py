"""What the files beside a vocabulary say: which class it is, its added tokens, what tokens are for.

Knows the names and the rules of HF's settings, of both generations, and how a damaged file is
reported; not what a vocabulary is.
"""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gpt2_jax.added_tokens import AddedToken
from gpt2_jax.files import check_content, read_json_object

Vocab = dict[str, int]  # token -> id
Values = dict[str, Any]  # of a JSON object
ModelIds = dict[str, list[int]]  # role -> the ids that a model's config gives it

END_OF_TEXT = "<|endoftext|>"  # ends each document of GPT-2's training text
NO_ID = -1  # of a token that files name without one

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
GPT2_ROLES: dict[str, str] = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
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


class Folder(NamedTuple):
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


def read_settings(path: Path) -> Folder:
    """Returns a folder's settings."""
    config = read_if_there(path / "tokenizer_config.json")
    model_config = read_if_there(path / "config.json")
    # The table of added tokens came with the files' second generation, which needs no other file.
    is_second = "added_tokens_decoder" in config
    token_map = {} if is_second else read_if_there(path / "special_tokens_map.json")
    class_name = config.get("tokenizer_class") or model_config.get("tokenizer_class")
    if not isinstance(class_name, str):  # many files hold null
        class_name = None
    return Folder(path, class_name, config, token_map, model_config)


# Added tokens, and what tokens are for.


class Declared(NamedTuple):
    """What files say of added tokens."""

    tokens: list[AddedToken]  # without a recorded id: NO_ID
    roles: dict[str, str]
    assumed: set[str]  # contents that no file names, only HF's class does


def special_tokens(
    folder: Folder, vocab: Vocab, listed: list[AddedToken]
) -> tuple[list[AddedToken], dict[str, str]]:
    """Returns the added tokens, each with an id, and the roles of all that there are."""
    declared = declared_tokens(folder, listed)
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
    return added_tokens, roles_of_model(model_ids(folder), ids) | roles


def declared_tokens(folder: Folder, listed: list[AddedToken]) -> Declared:
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
    return Declared(list(tokens.values()), roles, assumed)


def _named_tokens(folder: Folder) -> dict[str, AddedToken]:
    """Returns the tokens that the settings name: roles first, then others, then those of lists."""
    named: dict[str, AddedToken] = {}
    map_file = folder.path / "special_tokens_map.json"
    config_file = folder.path / "tokenizer_config.json"
    with damaged(map_file if map_file.is_file() else config_file, "tokens by their names"):
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
        named[name] = added_token(value | {"special": True}, NO_ID)


def _recorded_tokens(
    folder: Folder, mentioned: set[str], listed: list[AddedToken]
) -> dict[str, AddedToken]:
    """Returns the added tokens that have an id in a file, by their content."""
    recorded = {}
    added_file = folder.path / "added_tokens.json"
    if "added_tokens_decoder" not in folder.config:
        for content, id in checked_vocab(read_if_there(added_file), added_file).items():
            is_special = content in mentioned
            recorded[content] = AddedToken(
                content, id, normalized=not is_special, special=is_special
            )
    for token in listed:
        recorded[token.content] = token
    config_file = folder.path / "tokenizer_config.json"
    with damaged(config_file, "`added_tokens_decoder`: id -> token"):
        for id, value in (folder.config.get("added_tokens_decoder") or {}).items():
            token = added_token(value, _as_id(id))
            recorded[token.content] = token
    return recorded


def added_token(value: Values, id: int) -> AddedToken:
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


def model_ids(folder: Folder) -> ModelIds:
    """Returns what begins and ends a text by the model's config, where no other file says it."""
    ids = {}
    for role in ("bos_token", "eos_token"):
        found = folder.model_config.get(f"{role}_id")
        if role not in folder.named:
            listed = found if isinstance(found, list) else [found]
            ids[role] = [id for id in listed if id is not None]
    return ids


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


def checked_vocab(vocab: Values, file: Path) -> Vocab:
    """Returns a vocabulary, all of whose ids are integers."""
    for token, id in vocab.items():
        if type(id) is not int:  # a bool is one, and no id
            raise ValueError(f"{file}: expected an integer as the id of {token!r}, got {id!r}.")
    return vocab


# One file.


def read_text(file: Path) -> str:
    """Returns a text file's text."""
    check_content(file)
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected UTF-8, got {error}.") from error


def read_if_there(file: Path) -> Values:
    """Returns a file's object; where there is no file, an empty one."""
    return read_json_object(file) if file.is_file() else {}


@contextlib.contextmanager
def damaged(file: Path, expected: str) -> Iterator[None]:
    """Turns what comes of a file of another form into an error that names the file."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: expected {expected}, got {error!r}.") from error
