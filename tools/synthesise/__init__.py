"""Rows that a model writes: instructions, answers, paraphrases and more, with what each filter removed and what it cost."""
