"""Training data as JSON Lines: what a line may hold, and what is wrong with the lines that hold something else.

Five formats; a file keeps to the one of its first line:
  messages           {"messages": [{"role": "system" | "user" | "assistant", "content": str, "weight"?: 0 | 1}, ...]}
  sharegpt           {"conversations": [{"from": "human" | "gpt" | ..., "value": str, "weight"?: 0 | 1}, ...],
                      "system"?: str}
  alpaca             {"instruction": str, "input"?: str, "output": str, "system"?: str,
                      "history"?: [[instruction, output], ...]}
  prompt_completion  {"prompt": str, "completion": str}
  text               {"text": str}
UTF-8 with or without a byte order mark, LF or CRLF, plain or gzipped (told by the first bytes, not by the name); lines
of nothing but white space are skipped.

Conversations, sharegpt and alpaca lines become turns of a chat and go through the base model's chat template; for a
base without one, alpaca lines have a text form (`formats.alpaca_prompt`). Keys that only keep books, such as "id" and
"source" (`fields.BOOKKEEPING`), are skipped in every format and named in the report; any other key that the format
does not know is an error, since it may be a misspelt one or ask for what is not done here.
"""

from shared.data_format.report import MAX_PROBLEMS, FileReport, check_file, read_samples
from shared.data_format.samples import Conversation, Kind, Pair, Problem, Sample, Text, Turn

__all__ = [
    "MAX_PROBLEMS",
    "Conversation",
    "FileReport",
    "Kind",
    "Pair",
    "Problem",
    "Sample",
    "Text",
    "Turn",
    "check_file",
    "read_samples",
]
