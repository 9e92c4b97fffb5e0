"""Chat templates: the texts of `AutoTokenizer.apply_chat_template`, in a sandbox, and errors in a line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hlat.errors import UserError
from hlat.evaluate.chat import ChatTemplates

PLAIN = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TRIMMING = (
    "{%- for m in messages %}\n    {%- if m.role == 'user' %}\n[INST] {{ m.content | trim }} [/INST]\n"
    "    {%- elif m.role == 'assistant' %}\n"
    "{% generation %}{{ m.content | trim }}{{ eos_token }}{% endgeneration %}\n"
    "    {%- endif %}\n{%- endfor %}"
)
WITHOUT_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + PLAIN
OTHERS = (
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% if loop.index > 9 %}{% break %}{% endif %}"
    "{% set ns.n = ns.n + 1 %}{{ m | tojson }} {{ m.content }}|{% endfor %}{{ ns.n }}{{ unknown }}"
)
CHATS = [
    [{"role": "user", "content": "Where is Ü <b>?\n"}],
    [
        {"role": "user", "content": " one "},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ],
    [{"role": "user", "content": "say"}, {"role": "assistant", "content": "Answer: "}],
]


def write(folder: Path, template: object = None, **config: object) -> Path:
    folder.mkdir(exist_ok=True)
    named = {} if template is None else {"chat_template": template}
    tokens = {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}}
    text = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **tokens, **named, **config})
    (folder / "tokenizer_config.json").write_text(text)
    return folder


def read(folder: Path) -> ChatTemplates:
    found = ChatTemplates.read(folder)
    assert found is not None
    return found


def test_texts(tmp_path: Path) -> None:
    chat = read(write(tmp_path, PLAIN))
    user, prompt = "<s><user>Where is Ü <b>?\n</s>\n", "<assistant>"
    assert chat.render(CHATS[0]) == user + prompt and chat.render([]) == "<s>" + prompt
    assert chat.render(CHATS[2], False) == "<s><user>say</s>\n<assistant>Answer: "
    trimming = read(write(tmp_path, TRIMMING))
    assert trimming.render(CHATS[1]) == "[INST] one [/INST]two</s>[INST] three [/INST]"
    assert trimming.render(CHATS[2], False).endswith("Answer:")
    assert (
        read(write(tmp_path, OTHERS)).render(CHATS[0]).startswith('{"role": "user", "content": "Where is Ü <')
    )
    assert CHATS[2][1]["content"] == "Answer: "  # what is given stays as it is


@pytest.mark.slow
@pytest.mark.parametrize("template", [PLAIN, TRIMMING, OTHERS])
def test_texts_are_those_of_transformers(tmp_path: Path, template: str) -> None:
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models

    backend = Tokenizer(models.BPE(vocab={"a": 0, "<s>": 1, "</s>": 2}, merges=[]))
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=template
    )
    ours = read(write(tmp_path, template))
    for chat in CHATS:
        last = chat[-1]["role"] == "assistant" and template != OTHERS  # which shows each message twice
        for prompt in (True, False) if last else (True,):
            options = {"add_generation_prompt": prompt, "continue_final_message": not prompt}
            assert ours.render(chat, prompt) == theirs.apply_chat_template(chat, tokenize=False, **options)


def test_files_come_before_the_configuration_and_names_are_known(tmp_path: Path) -> None:
    assert ChatTemplates.read(None) is None and ChatTemplates.read(write(tmp_path)) is None
    named = [{"name": "default", "template": "d{{ eos_token }}"}, {"name": "rag", "template": "r"}]
    found = read(write(tmp_path, named))
    assert found.choose() == "d{{ eos_token }}" and found.render([]) == "d</s>"
    assert found.choose("rag") == "r" and found.render([]) == "r"
    with pytest.raises(UserError, match="no chat template named 'chat'; there are: default, rag"):
        found.choose("chat")
    first = found.digest
    (tmp_path / "chat_template.jinja").write_text("from a file {{ bos_token }}")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tools.jinja").write_text("tools")
    found = read(tmp_path / "tokenizer.json")  # a file of the folder stands for it
    assert (
        found.render([]) == "from a file <s>" and found.choose("tools") == "tools" and found.digest != first
    )
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer_config.json: not JSON"):
        ChatTemplates.read(tmp_path)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}",
        WITHOUT_SYSTEM,
        "{{ messages[7].content }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{% set names = namespace(n=1) %}{% set names.__class__ = 2 %}",
        "{{ namespace(__html__=1).n }}",
        "{{ 1 / 0 }}",
    ],
)
def test_a_template_that_fails_or_reaches_out_is_one_line(tmp_path: Path, template: str) -> None:
    chat = read(write(tmp_path, template))
    with pytest.raises(UserError, match="the chat template cannot be applied"):
        chat.render([{"role": "system", "content": "be brief"}])


def test_a_template_that_hides_the_beginning_of_an_answer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not show the last message"):
        read(write(tmp_path, "nothing")).render(CHATS[2], add_generation_prompt=False)


def test_special_tokens_of_a_template_are_tokens_of_a_model_that_hlat_trained(tmp_path: Path) -> None:
    """Its documents are plain text, in which `<user>` is six characters; in a template it is a token."""
    pytest.importorskip("lm_eval")
    from types import SimpleNamespace

    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    from hlat.data.tokenizer import load_tokenizer
    from hlat.evaluate.harness import lm_class
    from hlat.evaluate.text import TextCodec

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.add_special_tokens([AddedToken("</s>"), AddedToken("<user>")])
    backend.save(str(write(tmp_path, "<user>{{ messages[0].content }}") / "tokenizer.json"))
    codec, live = TextCodec(load_tokenizer(tmp_path)), SimpleNamespace(config=SimpleNamespace(max_seq_len=99))
    team = SimpleNamespace(codec=codec, live=live, chat=read(tmp_path))
    model = lm_class()(pretrained=team)
    assert len(model.tok_encode("<user>ab")) == 8
    text = model.apply_chat_template([{"role": "user", "content": "ab"}])
    assert len(model.tok_encode(text)) == 3
    assert model.tokenizer_name.endswith(team.chat.digest) and model.chat_template(False) is None
