"""A page and an HTTP server over one `Pipeline`: requests queue and share batches.

`batching` queues jobs, `service` answers them with the model, `api` and `page` are what HTTP clients and people see,
`server` runs them all.
"""
