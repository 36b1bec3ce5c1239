"""What columns are called, in any case and spelling."""

from __future__ import annotations

import re

# The usual names of what is asked, what is answered and what goes before, the commonest first.
PROMPT = (
    "prompt", "question", "instruction", "query", "input", "user", "human", "request", "problem", "q", "user_prompt",
    "user_message", "user_input", "inputs", "source", "instructions", "questions", "prompts",
    "frage", "pregunta", "domanda", "pergunta", "вопрос", "问题", "問題", "質問", "질문",
)  # fmt: skip
COMPLETION = (
    "completion", "response", "answer", "output", "reply", "assistant", "target", "solution", "bot", "gpt", "chatgpt",
    "model", "a", "assistant_response", "assistant_message", "model_response", "expected_output", "expected_answer",
    "targets", "outputs", "answers", "responses", "completions", "replies", "antwort", "réponse", "reponse",
    "respuesta", "risposta", "resposta", "ответ", "答案", "回答", "답변",
)  # fmt: skip
SYSTEM = ("system", "system_prompt", "system_message", "system_instruction")
CONTEXT = ("context", "input")
OTHERS = ("messages", "conversations", "conversation", "text", "tools", "chosen", "rejected")


def plain(name: object) -> str:
    """A column's name without case, outer white space and what stands between its words."""
    return re.sub(r"[\s_\-.]+", "_", str(name).strip().strip(":?*").casefold())


_KNOWN = frozenset(map(plain, (*PROMPT, *COMPLETION, *SYSTEM, *CONTEXT, *OTHERS)))


def is_known(name: object) -> bool:
    """Whether a column of this name is one that a format reads."""
    return plain(name) in _KNOWN
