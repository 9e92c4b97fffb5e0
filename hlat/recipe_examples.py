"""The recipe's section on finetuning examples."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hlat.data.template import parse_template
from hlat.section import PathText, Rows, Section, Text, problem

_TEMPLATES = ("prompt", "completion", "label_field")


class ExamplesSection(Section):
    """Finetuning data, in place of `data.sources`: records with a prompt and its completion or its label."""

    path: PathText | None = None
    """A jsonl, parquet or arrow file of records, or a folder of them; relative to the working directory."""
    dataset: Text | None = None
    """A Hugging Face data set NAME[:CONFIG][@SPLIT]; stdlib-packages, stdlib-docstrings or stdlib-chat,
    which are always there.
    """
    eval_path: PathText | None = None
    """Held-out records, as path. With it or eval_dataset, data.holdout takes none of the others."""
    eval_dataset: Text | None = None
    """Held-out records, as dataset: such as glue:sst2@validation."""
    format: Literal["auto", "template", "messages"] = "auto"
    """template: prompt and completion, or label_field, say what is made of a record. messages: its field
    `messages` is a conversation, [{role: user, content: …}, {role: assistant, content: …}], which a chat
    template makes a text of; the assistant's turns are learned. auto: messages where the first record has
    such a field, and neither prompt, completion nor label_field is given.
    """
    prompt: Text = "{prompt}"
    """Template of the prompt: text with the names of fields in braces; {{ and }} are braces."""
    completion: Text = "{completion}"
    """Template of what directly follows the prompt, space included; with label_field the label's word."""
    label_field: Text | None = None
    """Field with the label of a record, a text or a number: the completion is then the label's word."""
    labels: dict[str, Text] = Field(default_factory=dict)
    """Each label and the word that follows the prompt for it, space included: {"0": " bad", "1": " good"};
    objective.by=head only counts them.
    """
    group_field: Text | None = None
    """Field whose value decides which side of the held-out split a record is on, such as the document it is
    from; null: the prompt.
    """
    allow_dropped: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Largest share of the records that may turn out to be no examples. More is an error."""
    limit: Rows | None = None
    """Train on at most so many examples, chosen by the hash of their prompt; null: all."""

    def own_templates(self) -> list[str]:
        """Which of the keys are given that say what is made of a record."""
        defaults = {name: type(self).model_fields[name].default for name in _TEMPLATES}
        return [name for name, default in defaults.items() if getattr(self, name) != default]

    @model_validator(mode="after")
    def _one_format(self) -> ExamplesSection:
        if self.format == "messages" and (own := self.own_templates()):
            raise problem("messages have a chat template instead", own[0], "leave it out")
        return self

    @model_validator(mode="after")
    def _complete(self) -> ExamplesSection:
        for name, path, dataset, needed in (
            ("path", self.path, self.dataset, True),
            ("eval_path", self.eval_path, self.eval_dataset, False),
        ):
            other = name.replace("path", "dataset")
            if path and dataset or (needed and not path and not dataset):
                what = f"{'both' if path else 'neither'} {name} {'and' if path else 'nor'} {other}"
                raise problem(f"examples have {what}", "", "give exactly one of them")
        for key in ("prompt", "completion"):
            try:
                parse_template(getattr(self, key))
            except ValueError as error:
                fix = "write fields as {name}, and braces themselves as {{ and }}"
                raise problem("{why}", key, fix, why=str(error)) from None
        if self.label_field is not None and len(self.labels) < 2:
            fix = "list all labels with their words, such as {'0': ' bad', '1': ' good'}"
            raise problem("label_field needs at least two labels", "labels", fix)
        if self.label_field is not None and self.completion != type(self).model_fields["completion"].default:
            fix = "remove completion, or label_field and labels"
            raise problem("the completion of a labelled example is its label's word", "completion", fix)
        if self.label_field is None and self.labels:
            fix = "name the field that holds the label"
            raise problem("there are labels but no label_field", "label_field", fix)
        if len(set(self.labels.values())) < len(self.labels):
            raise problem("two labels have the same word", "labels", "give each a word of its own")
        return self
