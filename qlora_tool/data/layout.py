"""Rows as conversations or documents, once it is known which column is what."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qlora_tool.data.faults import RowFault, RowFaults, hint
from qlora_tool.data.formats import FORMATS, conversation_of, document_of
from qlora_tool.data.messages import Conversation
from qlora_tool.data.readers.rows import Row


@dataclass(frozen=True)
class Layout:
    """How the rows of a source are read.

    Attributes:
        format: one of `formats.FORMATS`.
        columns: the source's column by the format's, where their names differ.
        need_answers: whether the columns with the answers must be there.
    """

    format: str
    columns: Mapping[str, str] = field(default_factory=dict)
    need_answers: bool = True

    def fields(self, row: Row) -> dict[str, Any]:
        """A row's values by the names of the format's columns.

        Raises:
            RowFault: one that is needed is missing.
        """
        form, found = FORMATS[self.format], row.fields
        if self.columns:
            taken = {*self.columns, *self.columns.values()}
            found = {name: value for name, value in found.items() if name not in taken}
            found |= {ours: row.fields[theirs] for ours, theirs in self.columns.items() if theirs in row.fields}
        for column in form.columns(self.need_answers):
            if column not in found:
                name = self.columns.get(column, column)
                there = ", ".join(map(str, row.fields)) or "none at all"
                close = hint(map(str, row.fields), [self.columns.get(each, each) for each in form.columns(True)])
                raise RowFault(f"no column '{name}', which the format {self.format} needs (found {there}){close}")
        return found

    def unused(self, columns: Iterable[str]) -> list[str]:
        """Those of the source's columns that are not read."""
        form = FORMATS[self.format]
        read = {self.columns.get(ours, ours) for ours in (*form.columns(True), *form.optional)}
        return [column for column in columns if column not in read]

    def told(self) -> str:
        """The format, and which columns are read as its own: `prompt_completion (Question as prompt, …)`."""
        renamed = ", ".join(f"{theirs} as {ours}" for ours, theirs in self.columns.items() if ours != theirs)
        return f"{self.format} ({renamed})" if renamed else self.format

    def in_its_words(self, fault: RowFault) -> RowFault:
        """A fault with the source's name of the column in the place of ours."""
        text = str(fault)
        for ours, theirs in self.columns.items():
            if text.startswith(f"'{ours}'"):
                return RowFault(f"'{theirs}'{text[len(ours) + 2 :]}")
        return fault

    def conversation(self, row: Row) -> Conversation:
        """A row as a conversation, without an answer too.

        Raises:
            RowFault: the row does not have the format.
        """
        fields = self.fields(row)
        try:
            return conversation_of(fields, self.format, row.where)
        except RowFault as fault:
            raise self.in_its_words(fault) from fault

    def document(self, row: Row) -> str:
        """The text of a row; an empty string where it has none.

        Raises:
            RowFault: the row does not have the format.
        """
        fields = self.fields(row)
        try:
            return document_of(fields)
        except RowFault as fault:
            raise self.in_its_words(fault) from fault


def read_conversations(rows: Iterable[Row], layout: Layout) -> list[Conversation]:
    """Every row as a conversation, those without an answer too.

    Raises:
        UserError: rows that do not have the format; the first few are named.
    """
    conversations, faults = [], RowFaults()
    for row in rows:
        try:
            conversations.append(layout.conversation(row))
        except RowFault as fault:
            faults.add(row.where, fault)
    faults.raise_any()
    return conversations


def read_documents(rows: Iterable[Row], layout: Layout) -> list[str]:
    """The text of every row, in order; an empty string where a row has none.

    Raises:
        UserError: as `read_conversations`.
    """
    documents, faults = [], RowFaults()
    for row in rows:
        try:
            documents.append(layout.document(row))
        except RowFault as fault:
            faults.add(row.where, fault)
    faults.raise_any()
    return documents
