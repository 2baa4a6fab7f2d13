"""The command line that answers prompts."""

DEFAULT_PROMPT = "A picture of"
