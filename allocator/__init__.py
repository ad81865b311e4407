"""The allocator: hands out work, exits and personas under one fenced lease."""
