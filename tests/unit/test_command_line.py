"""Wrong command lines: one line each, with what to write instead, and exit code 2."""

from __future__ import annotations

import pytest

from hlat import cli


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "train tiny --run.steps=20",
            "recipe values are given without dashes: run.steps=20; see: hlat train --help",
        ),
        ("train tiny --run.steps 20", "without dashes: run.steps=20;"),
        ("sweep tiny --steps 20", "without dashes: run.steps=20;"),
        ("train --precompil2 tiny", "unknown option --precompil2; did you mean '--precompile'?"),
        ("generate runs/x --promt hi", "unknown option --promt; did you mean '--prompt'?"),
        ("eval runs/x --tasks a --steps 20", "unknown option --steps; see: hlat eval --help"),
        ("trian tiny", "unknown verb 'trian'; did you mean 'train'? (see: hlat --help)"),
        ("recipes lst", "unknown action 'lst'; did you mean 'list'? (see: hlat recipes --help)"),
        ("convert to-hff", "unknown way 'to-hff'; did you mean 'to-hf'?"),
        ("recipes", "no action is given; write one of list, show, diff, check, schema;"),
        ("train", "missing: recipe; write: hlat train RECIPE; see: hlat train --help"),
        ("generate", "missing: CHECKPOINT, --prompt; write: hlat generate CHECKPOINT --prompt PROMPT;"),
        ("generate x --prompt hi --dtype fp31", "--dtype: unknown value 'fp31'; did you mean 'fp32'?"),
        (
            "generate x --prompt hi --top-k z",
            "--top-k: expected a whole number, got 'z'; see: hlat generate --help",
        ),
        ("recipes list optim.lr=1", "'optim.lr=1' is one argument too many; see: hlat recipes list --help"),
        ("eval x y --tasks a", "'y' is one argument too many; see: hlat eval --help"),
        ("train tiny -q", "unknown option -q; see: hlat train --help"),
    ],
)
def test_one_line_says_what_to_write(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("hlat: error: ") and said in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "usage"), [(["help"], "hlat [-h]"), (["help", "train"], "hlat train [-h]")]
)
def test_help_is_a_verb_too(words: list[str], usage: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 0 and capsys.readouterr().out.startswith(f"usage: {usage}")


def test_texts_and_overrides_may_look_like_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "nowhere", "--prompt", "--x=a b"]) == 2
    assert "nowhere: no such checkpoint" in capsys.readouterr().err
    assert cli.main(["recipes", "show", "tiny", "--changed", "--", "run.steps=70"]) == 0
    assert "steps: 70" in capsys.readouterr().out


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_no_option_takes_a_number_that_is_none(value: str, capsys) -> None:
    for words in (
        ["generate", "x", "--prompt", "a", f"--temperature={value}"],
        ["data", "tokenize", "x", "--tokenizer", "bytes", "--out", "y", f"--holdout={value}"],
        ["doctor", f"--min-bandwidth={value}"],
    ):
        assert cli.main(words) == 2
        assert f"expected a number, got '{value}'" in capsys.readouterr().err
