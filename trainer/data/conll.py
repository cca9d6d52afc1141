"""Files with a word on each line and a blank line between sentences, as in CoNLL's shared tasks."""

from __future__ import annotations

from collections import Counter

from ..errors import UserError

# Suffixes of such files. For other tasks, .txt, .tsv and .tab are files of other kinds.
SUFFIXES = (".conll", ".conllu", ".iob", ".iob2", ".bio", ".txt", ".tsv", ".tab")
# The message for a csv file, whose fields are texts and not lists.
NO_LISTS = (
    "A csv file has no lists, and a sentence is a list of words with a list of tags. Write a line a sentence as json "
    '(.jsonl), such as {"tokens": ["Anna", "sleeps"], "tags": ["B-person", "O"]}; or Parquet; or CoNLL, a word and its '
    "tag a line (.conll, .conllu, .iob, .bio)."
)
# The line that stands for the beginning of a document.
_DOCUMENT = "-DOCSTART-"


def read_conll(text: str, where: str) -> dict[str, list[list[str]]]:
    """The columns of a file, which are called "1", "2", ...: for each sentence a list of fields.

    Fields are separated by tabs if the file has any between fields, else by blanks. A line of blanks alone ends a
    sentence. Lines that begin with # before a sentence are comments if they have another number of fields.

    Args:
        text: of the file.
        where: its name, for messages.

    Raises:
        UserError: a line has another number of fields than the others.
    """
    # Not splitlines(): words of tweets contain other characters at which it would break a line.
    lines = [line.rstrip("\r") for line in text.split("\n")]
    tabs = any("\t" in line.strip() for line in lines)
    rows = [line.strip(" ").split("\t") if tabs else line.split() for line in lines]
    # The most frequent width is that of words; comments and broken lines are few.
    counts = Counter(len(row) for line, row in zip(lines, rows) if line.strip() and row[0] != _DOCUMENT)
    if not counts:
        raise UserError(f'"trainer.task_options.data": {where} has no words.')
    width = counts.most_common(1)[0][0]
    sentences: list[list[list[str]]] = [[]]
    for number, (line, row) in enumerate(zip(lines, rows), start=1):
        if not line.strip() or row[0] == _DOCUMENT:
            if sentences[-1]:
                sentences.append([])
        elif len(row) == width:
            sentences[-1].append([field.strip() for field in row])
        elif sentences[-1] or not line.startswith("#"):
            raise UserError(
                f'"trainer.task_options.data": line {number} of {where} has {len(row)} field{"s" * (len(row) > 1)}, '
                f"but most lines have {width}: {line[:60]!r}.\nEach line holds a word and its tag, and a blank line "
                "ends a sentence."
            )
    whole = [sentence for sentence in sentences if sentence]
    return {str(i + 1): [[row[i] for row in sentence] for sentence in whole] for i in range(width)}
