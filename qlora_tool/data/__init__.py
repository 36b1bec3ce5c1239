"""From data files to batches: sources, formats, messages, chat, labels, tokenize, batches; prompts for generation."""
