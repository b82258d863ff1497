"""Traces of training steps for OpenTelemetry; ranks and coordinator share this room."""
