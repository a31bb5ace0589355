"""An OpenAI-compatible endpoint over one model.

wire.py     what a client may ask, and errors as it expects them
text.py     tokens to text, thinking, answer and tool calls, as they come
choice.py   one answer of a request, while it is drawn
form.py     answers in OpenAI's JSON, whole and in pieces
limits.py   what a request may cost before it is understood
live.py     the embedded engine in this process, token by token
server.py   the HTTP application
command.py  `miles-lite serve`; on a GPU it hands over to SGLang
"""
