"""An OpenAI-compatible server on the engine: several adapters by name over one base model.

`engine_queue.ServedEngine` samples in the thread that owns mlx, `app.create_app` makes the HTTP
application in front of it, and `server.running_server` listens in a second thread.
"""
