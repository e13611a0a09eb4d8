"""A web page and an HTTP API for one `Pipeline`; requests are queued and share batches.

`batching` queues jobs, `service` processes them with the model, `api` and `page` are the interfaces, `guard` checks
every connection, and `server` runs the process.
"""
