"""What a tokenizer adds before and after each text, as it is and as a `tokenizer.json` says it."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

Values = dict[str, Any]  # of a JSON object


class Template(NamedTuple):
    """The ids that a tokenizer adds to each text."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()


NO_TEMPLATE = Template()


def template_of_processor(processor: Values | None) -> Template | None:
    """Returns what a `post_processor` adds to a text; None if it does more than that."""
    if processor is None:
        return NO_TEMPLATE
    kind = processor.get("type")
    if kind == "ByteLevel":  # trims spans, which ours are not
        return NO_TEMPLATE
    # Older forms, with one token on each side, each as a pair of its spelling and its id.
    if kind in ("RobertaProcessing", "BertProcessing"):
        return Template((processor["cls"][1],), (processor["sep"][1],))
    if kind == "Sequence":
        return _template_of_sequence(processor["processors"])
    if kind != "TemplateProcessing":
        return None
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    n_texts = 0
    # What it does with pairs of texts does not matter: each text is encoded alone.
    for piece in processor["single"]:
        if "Sequence" in piece:
            n_texts += 1
            continue
        ids = processor["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
        if n_texts:
            after += tuple(ids)
        else:
            before += tuple(ids)
    # A text that is left out, or stands there twice, is more than something added.
    return Template(before, after) if n_texts == 1 else None


def _template_of_sequence(processors: Iterable[Values]) -> Template | None:
    """Returns what several processors add, each to what those before it made."""
    template = NO_TEMPLATE
    for processor in processors:
        added = template_of_processor(processor)
        if added is None:
            return None
        template = Template(added.before + template.before, template.after + added.after)
    return template


def as_processor(template: Template, ids: Mapping[str, int]) -> Values:
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
        # Nothing is added to pairs, which this library never makes.
        "pair": [text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": special_tokens,
    }
