#!/usr/bin/env bash
# Checks what has to pass before a change goes in: exactly what CI runs, in a fresh .venv.
exec bash "$(dirname "${BASH_SOURCE[0]}")/../.ci/run"
