"""The signals that ask a run to stop, which whoever listens for them or must not hear them agrees on."""

from __future__ import annotations

import signal

# SIGUSR1 is what schedulers send ahead of a time limit, SIGHUP what a closed terminal or a lost ssh sends
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
