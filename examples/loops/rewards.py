"""A reward that a policy without any training can learn: which characters a response has."""


def share(prompt: str, response: str, wanted: str) -> float:
    """Return the share of a response's characters that are wanted."""
    return sum(character in wanted for character in response) / max(len(response), 1)
