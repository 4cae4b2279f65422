"""``TrainingArguments``: fields, converters, validation, serialization, older names, parsing."""
