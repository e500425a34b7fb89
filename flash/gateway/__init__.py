"""
The gateway: one OpenAI-compatible address for all that a plane has deployed.

    process.py     the process: one for each home, told by its lock
    deploying.py   a thread for each server that something is wanted of
    servers.py     one server: its deployments moved step by step, itself started anew
    gate.py        what an adapter must pass before anybody gets an answer of it
    live.py        how a server is started, and called under time limits; bases.py has its model
    parts.py       what servers share; trouble.py says what went wrong, asking.py asks over HTTP
    routes.py      which server answers for which model name

    listening.py   the socket: bounded in connections, closed without cutting answers off
    app.py         who asks, how much at once, and which way a request takes
    keys.py        who a bearer key is
    limits.py      what a request may ask, and how long anybody may take
    requests.py    what a request may say (checks.py, messages.py), and what of it is forwarded
    forwarding.py  the connections to the servers
    answering.py   one request, to the end of its answer
    relaying.py    what a server says, as the client gets it; reasoning.py tells a trace apart,
                   template.py whether it was opened before the answer
    usage.py       what requests used, on the disk before they end
    errors.py      what went wrong, in OpenAI's shape
"""
