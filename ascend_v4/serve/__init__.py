"""The OpenAI API over one engine: HTTP, request bodies and answers. Knows nothing of the model."""
