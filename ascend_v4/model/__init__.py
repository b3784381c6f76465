"""DeepSeek-V4 over the operator contracts. Sees no backend: every layer is handed its bound callables."""
