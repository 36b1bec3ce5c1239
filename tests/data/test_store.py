"""Tokenized data on the disk: the same as in memory, never stale, never half."""

from __future__ import annotations

import json
import os
import random

import datasets
import pytest
from tokenizers_for_tests import CHATML, REWRITING, byte_level

from qlora_tool import workers
from qlora_tool.config import DataConfig
from qlora_tool.data import one_source, store
from qlora_tool.data.tokenize import build_dataset, build_evaluation_sets
from qlora_tool.errors import MachineError, UserError
from qlora_tool.files.cache import cache_folder, clear_cache


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """A cache of its own, in which every source is kept."""
    monkeypatch.setenv("QLORA_TOOL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(one_source, "KEPT_FROM", 0)
    monkeypatch.setattr(one_source, "ROWS_AT_A_TIME", 7)
    monkeypatch.setattr(store, "TOKENS_OF_CHUNK", 700)
    monkeypatch.setattr(store, "GIVEN_BACK_AFTER", 10 * store.MAPPED_BY_EXAMPLE)


@pytest.fixture
def rows(tmp_path) -> str:
    draw = random.Random(0)
    path = tmp_path / "rows.jsonl"
    talks = []
    for number in range(100):
        turns = []
        for turn in range(draw.randint(1, 3)):
            turns.append({"role": "user", "content": f"how many boats? {number}.{turn} é"})
            turns.append({"role": "assistant", "content": "yes " * draw.randint(0 if number % 9 == 0 else 1, 30)})
        talks.append({"messages": turns, "id": number})
    path.write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    return str(path)


def facts(dataset) -> tuple:
    examples = dataset.examples
    return (
        list(examples), list(dataset.lengths), list(dataset.trained), list(examples.rows), list(examples.answers),
        examples.digests.tolist(), dataset.highest_token, dataset.report,
    )  # fmt: skip


def in_memory(source, data, template=CHATML):
    whole = one_source.KEPT_FROM
    one_source.KEPT_FROM = 1 << 60
    try:
        return build_dataset(source, data, byte_level(template))
    finally:
        one_source.KEPT_FROM = whole


def folders() -> list:
    return [entry for entry in (cache_folder() / "datasets").glob("*") if not entry.name.startswith(".")]


@pytest.mark.parametrize("template", [CHATML, REWRITING])
def test_the_same_from_memory_from_new_and_from_the_disk(kept, rows, template):
    data = DataConfig(max_length=80)
    expected = in_memory(rows, data, template)
    new, again = (build_dataset(rows, data, byte_level(template)) for _ in range(2))
    assert len(folders()) == 1
    assert facts(new) == facts(again) == facts(expected)
    assert new.report.lines() == again.report.lines()
    assert "columns not used: id" in again.report.warnings()
    assert new.examples[-3:] == expected.examples[-3:] and new.examples[5:50:7] == expected.examples[5:50:7]
    with pytest.raises(IndexError):
        new.examples[len(expected.examples)]


def test_no_row_is_read_the_second_time(kept, rows, monkeypatch):
    first = build_dataset(rows, DataConfig(), byte_level(CHATML))
    monkeypatch.setattr(one_source, "encode_all", None)
    tokenizer = byte_level(None)
    tokenizer.chat_template = CHATML
    assert facts(build_dataset(rows, DataConfig(), tokenizer)) == facts(first)


def test_datasets_reads_the_file(kept, rows):
    made = build_dataset(rows, DataConfig(), byte_level(CHATML))
    (folder,) = folders()
    read = datasets.Dataset.from_file(str(folder / "examples.arrow"))
    assert read["input_ids"][:] == [example.input_ids for example in made.examples]
    assert read["where"][:] == [example.where for example in made.examples]
    trained = [[label != -100 for label in example.labels] for example in made.examples]
    assert read["trained"][:] == trained


def test_several_processes_make_the_same(kept, rows, monkeypatch):
    data = DataConfig(max_length=80)
    expected = in_memory(rows, data)
    monkeypatch.setattr(one_source, "processes_for", lambda size: 2)
    assert facts(build_dataset(rows, data, byte_level(CHATML))) == facts(expected)


def test_faulty_rows_in_several_processes(kept, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(one_source, "processes_for", lambda size: 2)
    with open(rows, "a", encoding="utf-8") as stream:
        stream.write('{"messages": 5}\nbroken\n{"messages": [{"role": "usr", "content": "a"}]}\n')
    with pytest.raises(UserError) as raised:
        build_dataset(rows, DataConfig(), byte_level(CHATML))
    assert [line.partition(":")[0] for line in raised.value.lines] == [f"{rows}, line {n}" for n in (101, 102, 103)]
    assert not folders()
    made = build_dataset(rows, DataConfig(on_error="skip"), byte_level(CHATML))
    assert made.report.faulty == 3 and len(made.report.faulty_lines) == 3
    with pytest.raises(UserError, match=r"data\.multi_turn: together cannot go with this chat template"):
        build_dataset(rows, DataConfig(on_error="skip", multi_turn="together"), byte_level(REWRITING))


def test_a_process_that_dies_is_the_machines_fault(kept, rows, monkeypatch):
    monkeypatch.setattr(one_source, "processes_for", lambda size: 2)
    monkeypatch.setattr(workers.Workers, "__enter__", lambda pool: _killed(pool))
    with pytest.raises(MachineError, match="a process that tokenizes ended early"):
        build_dataset(rows, DataConfig(), byte_level(CHATML))
    assert not folders()


def _killed(pool):
    import subprocess
    import sys

    for _ in range(pool.count):
        process = subprocess.Popen([sys.executable, "-c", "pass"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        process.wait()
        pool._processes.append(process)
        pool._idle.put(process)
    return pool


class TestWhatItDependsOn:
    @pytest.mark.parametrize(
        "change",
        [{"max_length": 40}, {"train_on": "all"}, {"format": "messages"}, {"columns": {"messages": "messages"}},
         {"on_error": "skip"}, {"multi_turn": "one_per_answer"}],
    )  # fmt: skip
    def test_keys(self, kept, rows, change):
        build_dataset(rows, DataConfig(), byte_level(CHATML))
        build_dataset(rows, DataConfig(**change), byte_level(CHATML))
        assert len(folders()) == 2

    def test_where_the_tokenizer_came_from_is_no_matter(self, kept, rows):
        for offline in (False, True):
            tokenizer = byte_level(CHATML)
            tokenizer.init_kwargs |= {"is_local": offline, "local_files_only": offline}  # as `from_pretrained` notes it
            build_dataset(rows, DataConfig(), tokenizer)
        assert len(folders()) == 1

    def test_keys_that_change_no_token(self, kept, rows):
        build_dataset(rows, DataConfig(), byte_level(CHATML))
        build_dataset(rows, DataConfig(packing=False, shuffle=False, eval=0.5), byte_level(CHATML))
        assert len(folders()) == 1

    def test_the_file(self, kept, rows):
        first = build_dataset(rows, DataConfig(), byte_level(CHATML))
        with open(rows, encoding="utf-8") as stream:
            text = stream.read()
        with open(rows, "w", encoding="utf-8") as stream:
            stream.write(text.replace("boats", "ships"))
        second = build_dataset(rows, DataConfig(), byte_level(CHATML))
        assert first.examples[0] != second.examples[0]

    def test_the_template(self, kept, rows, tmp_path):
        first = build_dataset(rows, DataConfig(), byte_level(CHATML))
        other = byte_level(CHATML.replace("helpful", "useful"))
        assert build_dataset(rows, DataConfig(), other).examples[0] != first.examples[0]
        file = tmp_path / "chat.jinja"
        file.write_text(CHATML.replace("helpful", "quick"))
        third = build_dataset(rows, DataConfig(chat_template=str(file)), byte_level(CHATML))
        file.write_text(CHATML.replace("helpful", "slow"))
        fourth = build_dataset(rows, DataConfig(chat_template=str(file)), byte_level(CHATML))
        assert len({tuple(made.examples[0].input_ids) for made in (first, third, fourth)}) == 3

    def test_the_tokenizer(self, kept, rows):
        build_dataset(rows, DataConfig(), byte_level(CHATML))
        other = byte_level(CHATML)
        other.add_tokens(["boats"])
        made = build_dataset(rows, DataConfig(), other)
        assert made.highest_token == len(other) - 1

    def test_what_generation_stops_at(self, kept, rows, tmp_path):
        """It ends the answers of a template that does not."""
        tokenizer = byte_level(CHATML.replace("+ '<|im_end|>\\n' }}{% endfor %}", "}}{% endfor %}"))
        tokenizer.name_or_path = str(tmp_path)
        first = build_dataset(rows, DataConfig(), tokenizer)
        (tmp_path / "generation_config.json").write_text('{"eos_token_id": 1}')
        second = build_dataset(rows, DataConfig(), tokenizer)
        ends = [made.examples[0].input_ids[-1] for made in (first, second)]
        assert tokenizer.convert_ids_to_tokens(ends) == ["<|im_end|>", "<|endoftext|>"]

    def test_the_day_where_the_template_writes_it(self, kept, rows, monkeypatch):
        from qlora_tool.data import fingerprint

        class Day(fingerprint.datetime.date):
            @classmethod
            def today(cls):
                return cls(2030, 1, 2)

        template = "{{ strftime_now('%Y') }}" + CHATML
        build_dataset(rows, DataConfig(), byte_level(template))
        monkeypatch.setattr(fingerprint.datetime, "date", Day)
        build_dataset(rows, DataConfig(), byte_level(template))
        assert len(folders()) == 2
        build_dataset(rows, DataConfig(), byte_level(CHATML))
        monkeypatch.undo()


def flip(file, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


class TestDamage:
    def damaged(self, rows, expected):
        made = build_dataset(rows, DataConfig(), byte_level(CHATML))
        assert facts(made) == expected

    @pytest.mark.parametrize("name", ["examples.arrow", "numbers.npz", "meta.json"])
    def test_a_file_that_is_gone_or_cut_short(self, kept, rows, name):
        expected = facts(build_dataset(rows, DataConfig(), byte_level(CHATML)))
        (folder,) = folders()
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
        self.damaged(rows, expected)
        (folder / name).unlink()
        self.damaged(rows, expected)

    @pytest.mark.parametrize("name", ["examples.arrow", "numbers.npz", "meta.json"])
    def test_a_bit_that_changed_anywhere(self, kept, rows, name, caplog):
        """They are made again, with a line."""
        expected, draw = facts(build_dataset(rows, DataConfig(), byte_level(CHATML))), random.Random(0)
        (folder,) = folders()
        for _ in range(8):
            flip(folder / name, draw.randrange(8 * (folder / name).stat().st_size))
            caplog.clear()
            self.damaged(rows, expected)
            assert f"{folder}: tokenized data that are not as they were written" in caplog.text

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes and /dev/zero")
    @pytest.mark.parametrize("name", ["examples.arrow", "numbers.npz", "meta.json"])
    @pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/dev/zero", path), os.mkdir])
    def test_what_is_no_file(self, kept, rows, name, make):
        expected = facts(build_dataset(rows, DataConfig(), byte_level(CHATML)))
        (folder,) = folders()
        (folder / name).unlink()
        make(folder / name)
        self.damaged(rows, expected)

    def test_bytes_that_change_while_they_are_used(self, kept, rows):
        """The run ends, as a part of them may have been used, and the next one makes them again."""
        expected = facts(build_dataset(rows, DataConfig(), byte_level(CHATML)))
        made = build_dataset(rows, DataConfig(), byte_level(CHATML))
        (folder,) = folders()
        with open(folder / "examples.arrow", "r+b") as stream:  # the same file, which is mapped
            stream.seek(place := (folder / "examples.arrow").stat().st_size // 2)
            (byte,) = stream.read(1)
            stream.seek(place)
            stream.write(bytes([byte ^ 1]))
        with pytest.raises(MachineError, match="start again to make them anew"):
            list(made.examples)
        assert facts(build_dataset(rows, DataConfig(), byte_level(CHATML))) == expected

    def test_an_interruption_leaves_nothing(self, kept, rows, monkeypatch):
        real = one_source.encode_all

        def interrupted(*arguments):
            for number, encoded in enumerate(real(*arguments)):
                if number == 3:
                    raise KeyboardInterrupt
                yield encoded

        monkeypatch.setattr(one_source, "encode_all", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build_dataset(rows, DataConfig(), byte_level(CHATML))
        assert list((cache_folder() / "datasets").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_said(kept, rows, monkeypatch, tmp_path, caplog):
    expected = facts(build_dataset(rows, DataConfig(), byte_level(CHATML)))
    file = tmp_path / "a file"
    file.write_text("")
    monkeypatch.setenv("QLORA_TOOL_CACHE", str(file))
    made = build_dataset(rows, DataConfig(), byte_level(CHATML))
    assert facts(made) == expected
    assert "cannot be written" in caplog.text and "QLORA_TOOL_CACHE" in caplog.text


def test_clearing_the_cache_forgets_them(kept, rows):
    build_dataset(rows, DataConfig(), byte_level(CHATML))
    assert clear_cache().nbytes > 0
    assert not folders()


def test_those_used_longest_ago_go_first(kept, rows, monkeypatch):
    for number, length in enumerate((50, 60, 70)):
        build_dataset(rows, DataConfig(max_length=length), byte_level(CHATML))
        for folder in folders():
            os.utime(folder, (number, number) if folder.stat().st_mtime > 10 else None)
    monkeypatch.setattr(store, "KEPT_BYTES", 0)
    build_dataset(rows, DataConfig(max_length=80), byte_level(CHATML))
    (left,) = folders()
    assert max(build_dataset(rows, DataConfig(max_length=80), byte_level(CHATML)).lengths) <= 80
    assert folders() == [left]


def test_a_fraction_takes_the_same_examples_from_the_disk(kept, rows):
    data = DataConfig(eval=0.2)
    whole = in_memory(rows, data)
    train, sets = build_evaluation_sets(data, byte_level(CHATML), build_dataset(rows, data, byte_level(CHATML)))
    other, other_sets = build_evaluation_sets(data, byte_level(CHATML), whole)
    assert list(sets["eval"].examples) == list(other_sets["eval"].examples)
    assert list(train.examples) == list(other.examples)
    assert sets["eval"].report == other_sets["eval"].report
