"""The process that reads adapters, alone with PEFT and torch: the API's end, the messages, and what
runs in the child.
"""
