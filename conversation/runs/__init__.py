"""Run folders: records, logs, reports, publishing."""
