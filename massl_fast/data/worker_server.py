"""Imported by the process that loader workers are forked from (multiprocessing's fork server), and nowhere else.

It imports once what every worker needs. And it outlives a SIGTERM, which a scheduler sends to every process of a job: workers end
when their server does, but the main process is still to finish its step. The server ends with the main process in any case.
"""

import signal

import massl_fast.data.torchvision_loader  # noqa: F401

signal.signal(signal.SIGTERM, signal.SIG_IGN)
