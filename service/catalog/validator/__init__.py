"""The validator process, which alone checks adapters by PEFT and torch:
the API process's end, the messages, and the child's part.
"""
