"""What columns are called, in any case and spelling."""

from __future__ import annotations

import re

# What is asked and what is answered, by their usual names; the second of each counts only where none of the first is
# there, because other things are called so as well.
PROMPT = (
    ("prompt", "question", "instruction", "query", "questions", "prompts", "instructions", "queries",
     "frage", "pregunta", "domanda", "pergunta", "вопрос", "问题", "問題", "質問", "질문"),
    ("input", "user", "human", "request", "problem", "q", "user_prompt", "user_message", "user_input", "inputs",
     "task"),
)  # fmt: skip
COMPLETION = (
    ("completion", "response", "answer", "output", "reply", "completions", "responses", "answers", "outputs", "replies",
     "solution", "antwort", "réponse", "reponse", "respuesta", "risposta", "resposta", "ответ", "答案", "回答", "答え",
     "답변"),
    ("assistant", "target", "bot", "gpt", "chatgpt", "a", "assistant_response", "assistant_message", "model_response",
     "expected_output", "expected_answer", "expected_response", "targets"),
)  # fmt: skip
SYSTEM = ("system", "system_prompt", "system_message", "system_instruction")
CONTEXT = ("context", "input")
TURNS = ("messages", "conversations", "conversation")
PREFERENCES = ("chosen", "rejected")


def plain(name: object) -> str:
    """A column's name without case, outer white space and what stands between its words."""
    return re.sub(r"[\s_\-.]+", "_", str(name).strip().strip(":?*").casefold())


_KNOWN = frozenset(
    map(plain, (*PROMPT[0], *PROMPT[1], *COMPLETION[0], *COMPLETION[1], *SYSTEM, *CONTEXT, *TURNS, *PREFERENCES,
                "text", "tools"))
)  # fmt: skip


def is_known(name: object) -> bool:
    """Whether a column of this name is one that a format reads."""
    return plain(name) in _KNOWN
