"""
The gateway: one OpenAI-compatible address for all that a plane has deployed.

    process.py     the process: one for each home, told by its lock
    deploying.py   moves deployments: starts servers, loads adapters, proves them, has them back
    routes.py      which server answers for which model name
    app.py         the HTTP side: keys, limits, what a request may say, streams, usage
"""
