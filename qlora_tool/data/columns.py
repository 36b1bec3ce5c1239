"""Which columns of a source are read as what.

The names of the formats' own columns come first; then `data.columns`, for columns of any other name; and then the usual
names of questions and answers in any case (`data/names.py`). What could be meant in two ways is an error that shows the
line to set.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import NoReturn

from qlora_tool.data import names
from qlora_tool.data.faults import hint
from qlora_tool.data.formats import FORMATS
from qlora_tool.data.layout import Layout
from qlora_tool.data.readers.rows import Row
from qlora_tool.errors import UserError, did_you_mean

LOOKED_AT = 1000  # rows, to find the columns
NAMED = 20  # columns in an error


def find_layout(
    rows: Iterable[Row],
    wanted: str = "auto",
    columns: Mapping[str, str] | None = None,
    *,
    need_answers: bool = True,
) -> Layout:
    """How rows are read, by the columns of the first of them.

    Args:
        rows: at least one.
        wanted: a format, or `auto`.
        columns: `data.columns`, the source's column by the format's.
        need_answers: whether the columns with the answers must be there (they need not be to generate).

    Raises:
        UserError: no row has the columns of a format, or it could be read in two ways; says what to set.
    """
    head = list(islice(rows, LOOKED_AT))
    return _Search(head, wanted, columns or {}, need_answers).layout()


def columns_there(rows: Iterable[Row], columns: Mapping[str, str]) -> Mapping[str, str]:
    """`columns` where the first rows have all that it names, else nothing: what a run was told of its own files need
    not be so in others."""
    found = {str(column) for row in islice(rows, LOOKED_AT) for column in row.fields}
    return columns if found.issuperset(columns.values()) else {}


class _Search:
    """The search for a layout.

    Attributes:
        found: the source's columns, in order.
        given: `data.columns`, with the source's own spelling.
    """

    def __init__(self, head: Sequence[Row], wanted: str, columns: Mapping[str, str], need_answers: bool):
        self.head, self.wanted, self.need_answers = head, wanted, need_answers
        self.found = list(dict.fromkeys(str(column) for row in head for column in row.fields))
        self.given = {ours: self._column(ours, theirs) for ours, theirs in columns.items()}
        # Names as if `data.columns` had been applied.
        taken = {*self.given.values()}
        self.rest = [column for column in self.found if column not in taken and column not in self.given]
        self.by_plain: dict[str, str] = {}
        for column in self.rest:
            self.by_plain.setdefault(names.plain(column), column)

    def layout(self) -> Layout:
        name = self._by_own_names()
        if name == "text" and self.wanted == "auto":
            self._refuse_text_beside_others()
        if name is not None:
            return self._made(name, self.given)
        if self.wanted == "auto" and not self.given.keys() & {"completion", "messages", "text", "response", "output"}:
            self._refuse_preferences()
        return self._by_usual_names() or self._refuse()

    def _column(self, ours: str, theirs: str) -> str:
        """The column that `data.columns` names, in the source's spelling."""
        if theirs in self.found:
            return theirs
        alike = [column for column in self.found if names.plain(column) == names.plain(theirs)]
        if len(alike) != 1:
            close = did_you_mean(theirs, self.found) or f"; found are {self._named()}"
            raise UserError(f"data.columns.{ours}: {self._where()} has no column '{theirs}'{close}")
        return alike[0]

    def _where(self) -> str:
        return self.head[0].where

    def _named(self) -> str:
        return ", ".join(self.found[:NAMED]) + (", …" if len(self.found) > NAMED else "") or "none"

    def _candidates(self) -> list[str]:
        return list(FORMATS) if self.wanted == "auto" else [self.wanted]

    def _by_own_names(self) -> str | None:
        """The first format all of whose columns a row has under their own names, or under those of `data.columns`."""
        kinds = dict.fromkeys(frozenset(map(str, row.fields)) for row in self.head)
        # Columns with answers first, even where they may be missing: they tell Dolly from Alpaca.
        for with_answers in (True,) if self.need_answers else (True, False):
            for there in kinds:
                have = {column for column in there if column in self.rest}
                have |= {ours for ours, theirs in self.given.items() if theirs in there}
                for name in self._candidates():
                    if all(column in have for column in FORMATS[name].columns(with_answers)):
                        return name
        return None

    def _made(self, name: str, columns: Mapping[str, str]) -> Layout:
        """A layout, with the system column where it has another of its names.

        Raises:
            UserError: `data.columns` names what the format does not read.
        """
        columns = dict(columns)
        form = FORMATS[name]
        reads = (*form.columns(True), *form.optional)
        used = columns.values()
        if left := [ours for ours, theirs in self.given.items()
                    if ours not in reads and (ours in columns or theirs not in used)]:  # fmt: skip
            other = ", ".join(f"{ours}: {theirs}" for ours, theirs in self._renamed(left[0]).items())
            raise UserError(
                f"data.columns.{left[0]}: rows of the format {name} have none; it reads {', '.join(reads)}"
                f"{f'; perhaps data.columns: {{{other}}}' if other else ''}"
            )
        system = next((self.by_plain[each] for each in names.SYSTEM if each in self.by_plain), None)
        if system not in (None, "system") and "system" not in columns and "system" in FORMATS[name].optional:
            columns["system"] = system
        return Layout(name, columns, self.need_answers)

    def _renamed(self, left: str) -> dict[str, str]:
        """`data.columns` for a question with something beside it, where that is what is left over."""
        if left not in names.CONTEXT or not self.given.keys() >= {"prompt", "completion"}:
            return {}
        return {"instruction": self.given["prompt"], "context": self.given[left], "response": self.given["completion"]}

    def _usual(self, tiers: tuple[tuple[str, ...], ...], ours: str) -> list[str]:
        """The columns that have one of the usual names; the one of `data.columns` where that names it."""
        if ours in self.given:
            return [self.given[ours]]
        for tier in tiers:
            if columns := [column for column in self.rest if names.plain(column) in tier]:
                return columns
        return []

    def _by_usual_names(self) -> Layout | None:
        if self.wanted in ("auto", "messages", "sharegpt"):
            turns = [self.by_plain[each] for each in names.TURNS if each in self.by_plain]
            if turns:
                format = "messages" if self.wanted == "auto" else self.wanted
                return self._made(format, {**self.given, FORMATS[format].asks[0]: turns[0]})
        if self.wanted not in ("auto", "prompt_completion"):
            return self._by_case(self.wanted)
        asks, answers = self._usual(names.PROMPT, "prompt"), self._usual(names.COMPLETION, "completion")
        if len(asks) > 1 or len(answers) > 1:
            self._refuse_two(asks, answers)
        if not asks or (self.need_answers and not answers):
            return self._by_case("text") if self.wanted == "auto" and not asks and not answers else None
        ask, answer = asks[0], answers[0] if answers else None
        context = [self.given[ours] for ours in names.CONTEXT if ours in self.given]
        context = context or [column for column in self.rest if names.plain(column) in names.CONTEXT and column != ask]
        if len(context) > 1:
            self._refuse_two(context, answers)
        columns = {ours: theirs for ours, theirs in self.given.items() if ours in ("system", "tools")}
        if context and self.wanted == "auto":
            return self._made("dolly", {**columns, "instruction": ask, "context": context[0],
                                        **({"response": answer} if answer else {})})  # fmt: skip
        return self._made("prompt_completion", {**columns, "prompt": ask, **({"completion": answer} if answer else {})})

    def _by_case(self, name: str) -> Layout | None:
        """A format by its own names, written otherwise."""
        form = FORMATS[name]
        columns = dict(self.given)
        for ours in (*form.columns(True), *form.optional):
            if ours not in columns and names.plain(ours) in self.by_plain:
                columns[ours] = self.by_plain[names.plain(ours)]
        there = all(column in columns for column in form.columns(self.need_answers))
        return self._made(name, columns) if there else None

    def _refuse_two(self, asks: list[str], answers: list[str]) -> NoReturn:
        several = asks if len(asks) > 1 else answers
        kind = "question" if len(asks) > 1 else "answer"
        self._refuse_unclear(f"{' and '.join(map(repr, several))} may each be the {kind}", asks, answers)

    def _refuse_unclear(self, reason: str, asks: list[str], answers: list[str], instead: str = "") -> NoReturn:
        ask, answer = (asks or ["…"])[0], (answers or ["…"])[0]
        raise UserError(
            f"{self._where()}: the columns ({self._named()}) can be read in two ways: {reason}; set data.columns: "
            f"{{prompt: {ask}, completion: {answer}}}{instead}"
        )

    def _refuse_text_beside_others(self) -> None:
        """Text is a document by itself; beside an answer it may be the question, beside a question the answer."""
        text = self.given.get("text", "text")
        asks = [column for column in self.rest if names.plain(column) in names.PROMPT[0]]
        answers = [column for column in self.rest if names.plain(column) in names.COMPLETION[0]]
        if "text" not in self.given and (asks or answers):
            role = "question" if answers and not asks else "answer"
            self._refuse_unclear(
                f"'{text}' may be the {role} or a document", asks or [text], answers or [text], ", or data.format: text"
            )

    def _refuse_preferences(self) -> None:
        chosen, rejected = (self.by_plain.get(each) for each in names.PREFERENCES)
        if chosen is None or rejected is None:
            return
        values = [row.fields.get(chosen) for row in self.head if row.fields.get(chosen)]
        first = values[0][0] if values and isinstance(values[0], list) and isinstance(values[0][0], dict) else {}
        whole = bool(first) and str(first.get("role", first.get("from"))).lower() not in ("assistant", "gpt")
        asks = self._usual(names.PROMPT, "prompt")
        columns = f"{{messages: {chosen}}}" if whole else f"{{completion: {chosen}}}"
        if not whole and not asks:
            columns = f"{{prompt: …, completion: {chosen}}}"
        raise UserError(
            f"{self._where()}: preference rows ({self._named()}), and there is no training on preferences; to train on "
            f"the chosen answers alone set data.columns: {columns}"
        )

    def _refuse(self) -> NoReturn:
        candidates = {name: FORMATS[name] for name in self._candidates()}
        known = {column for form in candidates.values() for column in form.columns(True)}
        needs = "; ".join(f"{name}: {form.form}" for name, form in candidates.items())
        reason = "are those of no format" if self.wanted == "auto" else f"are not those of the format {self.wanted}"
        other = "; or name them, data.columns: {prompt: …, completion: …}" if self.wanted == "auto" else ""
        close = hint(self.found, known)
        raise UserError(f"{self._where()}: the columns ({self._named()}) {reason}; needed are {needs}{other}{close}")
